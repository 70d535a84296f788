//! podman's seccomp profile as a filter, which is made once for all sandboxes: to make it takes longer than to make one of
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};
use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use syscalls::Sysno;

use super::seccomp::{Rules, allow_first, compile};

/// Calls that podman's profile does not allow fail with this, also those that it refuses by name.
const REFUSAL: u32 = nix::libc::ENOSYS as u32;

/// An instruction of a filter: code, steps where it is true and where not, and its value.
pub type Step = (u16, u8, u8, u32);

/// The filter of a profile: what the profile allows is allowed, all else is refused, and other architectures than this
/// one, which the profile may allow, are killed. `None` where the profile is not of that kind.
pub fn compiled(profile: &LinuxSeccomp) -> Option<Vec<Step>> {
    if profile.default_action() != LinuxSeccompAction::ScmpActErrno {
        return None;
    }
    let mut always = BTreeSet::new();
    let mut sometimes: Rules = BTreeMap::new();
    for entry in profile.syscalls().iter().flatten() {
        if entry.action() != LinuxSeccompAction::ScmpActAllow {
            continue;
        }
        // A name that this machine does not have stays refused.
        for call in entry.names().iter().filter_map(|name| Sysno::from_str(name).ok()) {
            match entry.args() {
                Some(args) if !args.is_empty() => {
                    let conditions = args.iter().map(condition).collect::<Option<Vec<_>>>()?;
                    sometimes.entry(call.id().into()).or_default().push(SeccompRule::new(conditions).ok()?);
                }
                _ => drop(always.insert(i64::from(call.id()))),
            }
        }
    }
    sometimes.retain(|call, _| !always.contains(call));
    let refused = SeccompAction::Errno(REFUSAL);
    let filter = compile(sometimes, refused, SeccompAction::Allow).ok()?;
    let filter = allow_first(|call| always.contains(&call), &filter)?;
    Some(filter.iter().map(|step| (step.code, step.jt, step.jf, step.k)).collect())
}

fn condition(arg: &LinuxSeccompArg) -> Option<SeccompCondition> {
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (SeccompCmpOp::Ne, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (SeccompCmpOp::Lt, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (SeccompCmpOp::Le, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (SeccompCmpOp::Eq, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (SeccompCmpOp::Ge, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (SeccompCmpOp::Gt, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (SeccompCmpOp::MaskedEq(arg.value()), arg.value_two()?),
    };
    SeccompCondition::new(u8::try_from(arg.index()).ok()?, SeccompCmpArgLen::Qword, operator, value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> LinuxSeccomp {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_profile_that_allows_by_name_is_compiled() {
        let one = profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}]}"#,
        );
        assert!(compiled(&one).unwrap().len() > 10);
    }

    #[test]
    fn always_wins_over_sometimes() {
        let text = |second: &str| {
            format!(
                r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
                {{"names": ["personality"], "action": "SCMP_ACT_ALLOW"}}{second}]}}"#
            )
        };
        let sometimes = r#", {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}"#;
        assert_eq!(compiled(&profile(&text(sometimes))), compiled(&profile(&text(""))));
    }

    #[test]
    fn a_profile_that_refuses_by_name_is_not_taken() {
        assert_eq!(compiled(&profile(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#)), None);
    }
}
