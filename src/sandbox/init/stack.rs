//! The guarded stack on which a child runs until it is the program.

use std::{io, ptr, slice};

use nix::libc;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// Size of a child's stack in bytes, used until it is the program. Our own functions need little, but those of the
/// libraries that they call on failure may need more; pages that are not touched take no memory.
const CHILD_STACK: usize = 256 * 1024;

/// Size of the inaccessible guard below the stack in bytes: one page of the largest size that kernels use.
const GUARD: usize = 64 * 1024;

/// The stack of children, which grows down from its end. A child that overflows it is ended by a signal and overwrites
/// nothing of the memory that it shares with us. Mapped before there is a job, and used by one child at a time.
pub(super) struct Stack(*mut libc::c_void);

impl Stack {
    pub(super) fn new() -> io::Result<Stack> {
        let flags = MapFlags::PRIVATE | MapFlags::STACK | MapFlags::NORESERVE;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new memory, where the kernel has room for it.
        let stack = Stack(unsafe { mmap_anonymous(ptr::null_mut(), GUARD + CHILD_STACK, rights, flags) }?);
        // SAFETY: it is ours, and nobody uses it yet.
        unsafe { mprotect(stack.0, GUARD, MprotectFlags::empty()) }?;
        Ok(stack)
    }

    /// The usable part, above the guard.
    pub(super) fn usable(&mut self) -> &mut [u8] {
        // SAFETY: it is mapped as long as we have it, can be read and written, and is zeros at first. Nobody else has it as
        // long as it is borrowed.
        unsafe { slice::from_raw_parts_mut(self.0.cast::<u8>().add(GUARD), CHILD_STACK) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: whoever borrowed it has given it back.
        let _ = unsafe { munmap(self.0, GUARD + CHILD_STACK) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_page_below_the_stack_is_inaccessible() {
        let mut stack = Stack::new().unwrap();
        let usable = stack.usable();
        usable.fill(1);
        let lowest = usable.as_ptr().addr();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let holds = |line: &&str| {
            let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let address = |text| usize::from_str_radix(text, 16).unwrap();
            (address(from)..address(to)).contains(&(lowest - 1))
        };
        let below = maps.lines().find(holds).unwrap();
        assert!(below.contains(" ---p "), "{below}");
    }
}
