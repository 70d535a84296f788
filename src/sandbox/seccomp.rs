//! System calls that no program gets, besides those that podman's own filter refuses.
//!
//! podman's filter is made for containers of friends: it lets anyone make user namespaces, and with them
//! mounts without our limits; keys, which outlive the container with their uid; and sockets that no network
//! namespace holds back. Refused calls fail as if the kernel had none of them.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use seccompiler::SeccompCmpOp::{MaskedEq, Ne};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Refused whatever their arguments.
const REFUSED: [i64; 12] = [
    libc::SYS_unshare,
    libc::SYS_setns,
    // Its flags are behind a pointer, where no filter sees them; C libraries fall back to clone.
    libc::SYS_clone3,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
];

/// Flags of clone that make a namespace.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Families of sockets that a lone machine needs.
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Set in the number of a call of x86-64's other ABI, which the kernel may have: same calls, other numbers.
#[cfg(target_arch = "x86_64")]
const X32: i64 = 0x4000_0000;

/// The filter, to be installed by each program's process before it becomes the program.
pub fn filter() -> io::Result<BpfProgram> {
    let make = || {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
        let condition = |operator, value: libc::c_int| {
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, operator, u64::from(value.cast_unsigned()))
        };
        let namespaces = NAMESPACES.iter().map(|flag| {
            let is_set = condition(MaskedEq(u64::from(flag.cast_unsigned())), *flag)?;
            SeccompRule::new(vec![is_set])
        });
        rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
        for call in [libc::SYS_socket, libc::SYS_socketpair] {
            let none_of = FAMILIES.iter().map(|family| condition(Ne, *family)).collect::<Result<_, _>>()?;
            rules.insert(call, vec![SeccompRule::new(none_of)?]);
        }
        #[cfg(target_arch = "x86_64")]
        rules.extend(rules.clone().into_iter().map(|(call, rules)| (call | X32, rules)));
        let refusal = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        SeccompFilter::new(rules, SeccompAction::Allow, refusal, arch)?.try_into()
    };
    make()
        .map_err(|error: seccompiler::BackendError| io::Error::other(format!("cannot make a seccomp filter: {error}")))
}
