//! The guarded stack on which a child runs until `execve`.

use std::{io, ptr, slice};

use nix::libc;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// Size of a child's stack in bytes. Init's own functions need little, but library functions that they call on failure
/// may need more. Pages that are not touched take no memory.
const CHILD_STACK: usize = 256 * 1024;

/// Size of the inaccessible guard below the stack in bytes: one page of the largest page size that kernels use.
const GUARD: usize = 64 * 1024;

/// The stack of children, which grows down from its end. A child that overflows it is killed by a signal before it
/// overwrites any memory that it shares with init. Mapped before a job arrives, and used by one child at a time.
pub(super) struct Stack(*mut libc::c_void);

impl Stack {
    pub(super) fn new() -> io::Result<Stack> {
        let flags = MapFlags::PRIVATE | MapFlags::STACK | MapFlags::NORESERVE;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: this maps new memory at an address that the kernel selects.
        let stack = Stack(unsafe { mmap_anonymous(ptr::null_mut(), GUARD + CHILD_STACK, rights, flags) }?);
        // SAFETY: the memory was just mapped, and nothing uses it yet.
        unsafe { mprotect(stack.0, GUARD, MprotectFlags::empty()) }?;
        Ok(stack)
    }

    /// The usable part, above the guard.
    pub(super) fn usable(&mut self) -> &mut [u8] {
        // SAFETY: the memory is mapped, readable and writable as long as `self` exists, and initialised with zeros. The
        // mutable borrow of `self` keeps others from using it.
        unsafe { slice::from_raw_parts_mut(self.0.cast::<u8>().add(GUARD), CHILD_STACK) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: no borrow of the stack can exist while it is dropped.
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
