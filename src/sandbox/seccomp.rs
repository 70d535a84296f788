//! System calls that no program gets, besides those that podman's own filter refuses.
//!
//! podman's filter is made for containers of friends: it lets anyone make user namespaces, and with them
//! mounts without our limits; keys, which outlive the container with their uid; sockets that no network
//! namespace holds back; and calls that use up, watch or slow down what is the whole host's. Refused calls fail as if
//! the kernel had none of them, refused sockets as if it did not know their family.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use seccompiler::SeccompCmpOp::{self, MaskedEq, Ne};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
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

/// By number of a call: the rules of which one must be true; none at all is always.
pub type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn calls() -> Result<Rules, BackendError> {
    let mut rules: Rules = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let namespaces = NAMESPACES.iter().map(|flag| argument(0, MaskedEq(u64::from(flag.cast_unsigned())), *flag));
    rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_fcntl, vec![argument(1, SeccompCmpOp::Eq, libc::F_NOTIFY)?]);
    Ok(rules)
}

/// A program is alone in its network namespace, without any interface: local sockets are all that it can use.
fn sockets() -> Result<Rules, BackendError> {
    let calls = [libc::SYS_socket, libc::SYS_socketpair];
    calls.into_iter().map(|call| Ok((call, vec![argument(0, Ne, libc::AF_UNIX)?]))).collect()
}

fn argument(number: u8, operator: SeccompCmpOp, value: libc::c_int) -> Result<SeccompRule, BackendError> {
    let value = u64::from(value.cast_unsigned());
    SeccompRule::new(vec![SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value)?])
}

/// Refuses with `errno` what one of the rules is true of.
fn filter(rules: Rules, errno: libc::c_int) -> Result<BpfProgram, BackendError> {
    let allowed = |call| !rules.contains_key(&call);
    #[cfg(target_arch = "x86_64")]
    let rules = rules.iter().flat_map(|(call, rules)| [(call | X32, rules.clone()), (*call, rules.clone())]).collect();
    let refused = SeccompAction::Errno(errno.cast_unsigned());
    let filter = compile(rules, SeccompAction::Allow, refused)?;
    Ok(allow_first(allowed, &filter).unwrap_or(filter))
}

/// A filter for this machine: one answer where a rule is true, the other one where none is.
pub fn compile(rules: Rules, none_true: SeccompAction, one_true: SeccompAction) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, none_true, one_true, arch)?.try_into()
}

/// More than any machine has calls.
const CALLS: i64 = 1024;

/// Has a filter begin with what it allows whatever the arguments. It looks at one call after the other, and the kernel
/// tries it with each call there is when it is installed: with podman's list that takes as long as all else in the
/// making of a container. A comparison for each run of numbers instead is a tenth of the steps. `None` where the filter
/// is not of the form that is known.
pub fn allow_first(allowed: impl Fn(i64) -> bool, filter: &BpfProgram) -> Option<BpfProgram> {
    // The architecture is right and the number of the call is loaded: here any other question may be asked.
    const START: usize = 4;
    let is_loaded =
        |step: &sock_filter| (u32::from(step.code), step.k) == (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0);
    filter.get(START - 1).filter(|step| is_loaded(step))?;
    // Where runs of numbers begin, from the last one, beyond which all is left to the filter.
    let begins = |call: &i64| *call == 0 || *call == CALLS || allowed(*call) != allowed(call - 1);
    let runs: Vec<i64> = (0..=CALLS).rev().filter(begins).collect();
    let answer = sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let question = |(place, &call): (usize, &i64)| {
        let others = runs.len() - place - 1;
        let skipped = if call < CALLS && allowed(call) { others } else { others + 1 };
        let code = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
        Some(sock_filter { code, jt: u8::try_from(skipped).ok()?, jf: 0, k: u32::try_from(call).ok()? })
    };
    let questions = runs.iter().enumerate().map(question).collect::<Option<Vec<_>>>()?;
    let mut filter = filter.clone();
    filter.splice(START..START, questions.into_iter().chain([answer]));
    Some(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a filter says of a call on this machine whose first two arguments are this one.
    fn verdict(filter: &BpfProgram, call: u32, argument: u64) -> u32 {
        let arch = filter[1].k;
        let (mut place, mut loaded) = (0, 0);
        loop {
            let step = &filter[place];
            place += 1;
            let operation = u32::from(step.code);
            match operation & 0x07 {
                libc::BPF_LD => {
                    loaded = match step.k {
                        0 => call,
                        4 => arch,
                        16 | 24 => argument as u32,
                        20 | 28 => (argument >> 32) as u32,
                        other => panic!("loads {other}"),
                    }
                }
                libc::BPF_RET => return step.k,
                libc::BPF_ALU => loaded &= step.k,
                libc::BPF_JMP => {
                    let yes = match operation & 0xf0 {
                        libc::BPF_JA => {
                            place += step.k as usize;
                            continue;
                        }
                        libc::BPF_JEQ => loaded == step.k,
                        libc::BPF_JGT => loaded > step.k,
                        libc::BPF_JGE => loaded >= step.k,
                        other => panic!("jumps by {other}"),
                    };
                    place += usize::from(if yes { step.jt } else { step.jf });
                }
                other => panic!("does {other}"),
            }
        }
    }

    #[test]
    fn what_is_allowed_first_changes_no_answer() {
        let rules = calls().unwrap();
        let slow = compile(rules.clone(), SeccompAction::Allow, SeccompAction::Errno(1)).unwrap();
        let fast = allow_first(|call| !rules.contains_key(&call), &slow).unwrap();
        assert!(fast.len() > slow.len());
        for call in (0..2000).chain([u32::MAX, 0x4000_0000, 0x4000_0038]) {
            for argument in [0, 1, libc::F_NOTIFY as u64, 0x1000_0000, u64::MAX] {
                assert_eq!(verdict(&fast, call, argument), verdict(&slow, call, argument), "{call}({argument:#x})");
            }
        }
    }

    #[test]
    fn a_filter_of_another_form_is_refused() {
        let other = vec![sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }];
        assert_eq!(allow_first(|_| true, &other), None);
    }
}
