//! The seccomp filter of programs: an allow-list of the system calls that compilers and runtimes need.
//!
//! podman's own filter applies as well. It is made for trusted containers, and refuses only calls that could break out
//! of a container. It does not consider what a call costs the host: memory that no cgroup counts, work that the kernel
//! does not charge to the program, state that all containers share. A deny-list of such calls would never be complete,
//! so this is an allow-list. Each group names the reason why programs need it. Any other call fails as if the kernel
//! did not have it, which programs are prepared to handle.

mod compile;
mod list;
pub mod podman_profile;

use std::str::FromStr;

use nix::libc;
use seccompiler::BpfProgram;
use syscalls::Sysno;

use compile::{Action, Check, Rule, Rules, compile};
pub use list::NAMESPACES;
use list::{ALLOWED, ATTRIBUTES, NO_OPS, arguments};

/// The filter for programs. Each process installs it before it becomes a program.
pub fn filter() -> BpfProgram {
    compile(&rules(), Action::Errno(libc::ENOSYS))
}

fn rules() -> Rules {
    let always = |names: &'static str, action| names.split_whitespace().map(move |name| (name, Rule::Always(action)));
    let allowed = ALLOWED.iter().flat_map(|(_, names)| always(names, Action::Allow));
    let no_ops = always(NO_OPS, Action::Errno(0));
    let attributes = always(ATTRIBUTES, Action::Errno(libc::ENOTSUP));
    let all = allowed.chain(no_ops).chain(attributes).chain(arguments());
    // Skips names of calls that this architecture does not have.
    all.filter_map(|(name, rule)| Some((Sysno::from_str(name).ok()?.id().cast_unsigned(), rule))).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::compile::tests::verdict;
    use super::*;

    fn action(call: Sysno, arguments: [u64; 6]) -> Action {
        verdict(&filter(), call.id().cast_unsigned(), arguments)
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn each_listed_name_is_a_system_call_and_unique() {
        let listed = ALLOWED.iter().map(|(_, names)| *names).chain([NO_OPS, ATTRIBUTES]);
        let names = listed.flat_map(str::split_whitespace).chain(arguments().map(|(name, _)| name));
        let names: Vec<&str> = names.collect();
        for name in &names {
            assert!(Sysno::from_str(name).is_ok(), "{name}");
        }
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }

    #[test]
    fn calls_that_reach_the_host_are_refused() {
        let refused = [
            Sysno::unshare,
            Sysno::setns,
            Sysno::clone3,
            Sysno::mount,
            Sysno::fsopen,
            Sysno::pivot_root,
            Sysno::chroot,
            Sysno::add_key,
            Sysno::keyctl,
            Sysno::request_key,
            Sysno::io_uring_setup,
            Sysno::io_setup,
            Sysno::bpf,
            Sysno::seccomp,
            Sysno::perf_event_open,
            Sysno::userfaultfd,
            Sysno::inotify_init1,
            Sysno::fanotify_init,
            Sysno::mq_open,
            Sysno::memfd_secret,
            Sysno::openat2,
            Sysno::open_by_handle_at,
            Sysno::cachestat,
            Sysno::process_madvise,
            Sysno::kcmp,
            Sysno::landlock_create_ruleset,
            Sysno::quotactl,
            Sysno::syslog,
        ];
        for call in refused {
            assert_eq!(action(call, [0; 6]), Action::Errno(libc::ENOSYS), "{call}");
        }
        for call in [Sysno::fsync, Sysno::fdatasync, Sysno::fadvise64, Sysno::sync, Sysno::syncfs] {
            assert_eq!(action(call, [0; 6]), Action::Errno(0), "{call}");
        }
        for call in [Sysno::setxattr, Sysno::fsetxattr, Sysno::getxattr, Sysno::listxattr] {
            assert_eq!(action(call, [0; 6]), Action::Errno(libc::ENOTSUP), "{call}");
        }
    }

    #[test]
    fn multiplexed_calls_are_filtered_by_argument() {
        let allows = |call, arguments| action(call, arguments) == Action::Allow;
        for (call, argument, good, bad) in [
            (Sysno::clone, 0, 0x11, 0x1000_0011_u64),
            (Sysno::clone, 0, 0x003d_0f00, 0x0002_0000),
            (Sysno::mmap, 3, 0x22, 0x4_0022),
            (Sysno::memfd_create, 1, 1, 5),
            (Sysno::shmget, 2, 0o1600, 0o5600),
            (Sysno::socket, 0, 1, 2),
            (Sysno::socketpair, 0, 1, 16),
            (Sysno::ioctl, 1, 0x541b, 0x8940),
            (Sysno::ioctl, 1, 0x5401, 0x5412),
            (Sysno::prctl, 0, 15, 22),
            (Sysno::fcntl, 1, 3, 1026),
            (Sysno::openat, 2, 0o2_000_000, 0o40_000),
            (Sysno::madvise, 2, 4, 12),
            (Sysno::personality, 0, 0xffff_ffff, 0x0040_0000),
            (Sysno::membarrier, 0, 8, 2),
            (Sysno::preadv2, 5, 8, 0x80),
        ] {
            for (value, allowed) in [(good, true), (bad, false), (bad | 1 << 40, false)] {
                let mut arguments = [0; 6];
                arguments[argument] = value;
                assert_eq!(allows(call, arguments), allowed, "{call}: {value:#x}");
            }
        }
        let setsockopt = |level, option| allows(Sysno::setsockopt, [3, level, option, 0, 0, 0]);
        assert!(setsockopt(1, 7) && !setsockopt(1, 26) && !setsockopt(6, 7));
        let set_flags = |flags| allows(Sysno::fcntl, [0, 4, flags, 0, 0, 0]);
        assert!(set_flags(0o4000) && !set_flags(0o44000));
        assert_eq!(action(Sysno::msync, [0, 1, 4, 0, 0, 0]), Action::Errno(0));
        assert!(allows(Sysno::msync, [0, 1, 1, 0, 0, 0]));
        // The flags of LeakSanitizer's tracer, and those of vfork.
        assert_eq!(action(Sysno::clone, [0x0080_0700, 0, 0, 0, 0, 0]), Action::Notify);
        assert!(allows(Sysno::clone, [0x4111, 0, 0, 0, 0, 0]));
        // RLIMIT_CORE cannot be changed, but read; RLIMIT_NOFILE can be changed.
        assert_eq!(action(Sysno::setrlimit, [4, 1, 0, 0, 0, 0]), Action::Errno(0));
        assert_eq!(action(Sysno::prlimit64, [0, 4, 1 << 40, 0, 0, 0]), Action::Errno(0));
        assert!(allows(Sysno::setrlimit, [7, 1, 0, 0, 0, 0]) && allows(Sysno::prlimit64, [0, 7, 1, 0, 0, 0]));
        assert!(allows(Sysno::prlimit64, [0, 4, 0, 1, 0, 0]));
    }

    /// Each step costs some 0.4 microseconds at each start of a program.
    #[test]
    fn filter_has_fewer_than_300_instructions() {
        assert!(filter().len() < 300, "{} steps", filter().len());
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn x32_system_call_numbers_are_refused() {
        let filter = filter();
        for call in 0..600 {
            assert_eq!(verdict(&filter, 0x4000_0000 | call, [0; 6]), Action::Errno(libc::ENOSYS), "{call}");
        }
    }
}
