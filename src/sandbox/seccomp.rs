//! System calls that no program gets, besides those that podman's own filter refuses.
//!
//! podman's filter is made for containers of friends: it lets anyone make user namespaces, and with them
//! mounts without our limits; keys, which outlive the container with their uid; sockets that no network
//! namespace holds back; and calls that use up, watch or slow down what is the whole host's. Refused calls fail as if
//! the kernel had none of them, refused sockets as if it did not know their family.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use seccompiler::SeccompCmpOp::{MaskedEq, Ne};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Refused whatever their arguments.
const REFUSED: &[i64] = &[
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
    // The host has 65,536 of these contexts in all (fs.aio-max-nr), and one call takes them.
    libc::SYS_io_setup,
    // Device nodes, and the files of an image, are one for all: who watches them sees what others do.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_inotify_init,
    libc::SYS_inotify_init1,
    libc::SYS_fanotify_init,
    // Nothing of a program's is on a disk; these write out the host's.
    libc::SYS_sync,
    libc::SYS_syncfs,
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

/// Set in the number of a call of x86-64's other ABI, which the kernel may have: same calls, other numbers.
#[cfg(target_arch = "x86_64")]
const X32: i64 = 0x4000_0000;

/// The filters, to be installed by each program's process before it becomes the program: one for each way to refuse.
pub fn filters() -> io::Result<[BpfProgram; 2]> {
    let make = || Ok([filter(calls()?, libc::ENOSYS)?, filter(sockets()?, libc::EAFNOSUPPORT)?]);
    make().map_err(|error: BackendError| io::Error::other(format!("cannot make a seccomp filter: {error}")))
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn calls() -> Result<Rules, BackendError> {
    let mut rules: Rules = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let namespaces = NAMESPACES.iter().map(|flag| first_argument(MaskedEq(u64::from(flag.cast_unsigned())), *flag));
    rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    Ok(rules)
}

/// A program is alone in its network namespace, without any interface: local sockets are all that it can use.
fn sockets() -> Result<Rules, BackendError> {
    let calls = [libc::SYS_socket, libc::SYS_socketpair];
    calls.into_iter().map(|call| Ok((call, vec![first_argument(Ne, libc::AF_UNIX)?]))).collect()
}

fn first_argument(operator: SeccompCmpOp, value: libc::c_int) -> Result<SeccompRule, BackendError> {
    let value = u64::from(value.cast_unsigned());
    SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, operator, value)?])
}

/// Refuses with `errno` what one of the rules is true of.
fn filter(rules: Rules, errno: libc::c_int) -> Result<BpfProgram, BackendError> {
    #[cfg(target_arch = "x86_64")]
    let rules = rules.into_iter().flat_map(|(call, rules)| [(call | X32, rules.clone()), (call, rules)]).collect();
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno.cast_unsigned()), arch)?.try_into()
}
