//! podman's seccomp profile as a compiled filter: crun would compile it anew for every container, which costs
//! more than all the rest of making one.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};
use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use syscalls::Sysno;

use super::seccomp::{Rules, allow_first, compile};

/// crun takes a compiled filter from this annotation, in base64.
pub const ANNOTATION: &str = "run.oci.seccomp_bpf_data";

/// Calls that podman's profile does not allow fail with this, also those that it refuses by name.
const REFUSAL: u32 = nix::libc::ENOSYS as u32;

/// The filter of a profile, ready for [`ANNOTATION`]: what the profile allows is allowed, all else is refused,
/// and other architectures than this one, which the profile may allow, are killed. `None` where the profile is
/// not of that kind; then crun has to compile it.
pub fn compiled(profile: &LinuxSeccomp) -> Option<String> {
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
    let bytes: Vec<u8> = filter
        .iter()
        .flat_map(|step| {
            let [code_low, code_high] = step.code.to_ne_bytes();
            let [k0, k1, k2, k3] = step.k.to_ne_bytes();
            [code_low, code_high, step.jt, step.jf, k0, k1, k2, k3]
        })
        .collect();
    Some(STANDARD.encode(bytes))
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
        let compiled = compiled(&one).unwrap();
        let steps = STANDARD.decode(compiled).unwrap();
        assert_eq!(steps.len() % 8, 0);
        assert!(steps.len() > 10 * 8);
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
    fn a_profile_that_refuses_by_name_is_left_to_crun() {
        assert_eq!(compiled(&profile(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#)), None);
    }
}
