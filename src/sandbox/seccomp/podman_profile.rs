//! Compiles podman's seccomp profile into a filter. This is done once per template, because it takes longer than
//! creating a sandbox.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};
use syscalls::Sysno;

use crate::sandbox::seccomp::compile::{Action, Check, Rule, compile};

/// The error of all calls that podman's profile does not allow, including those that it refuses by name.
const REFUSAL: Action = Action::Errno(nix::libc::ENOSYS);

/// A step of a filter, with the fields of the kernel's `struct sock_filter`: `code`, `jt`, `jf`, `k`.
pub type Step = (u16, u8, u8, u32);

/// Compiles a profile. The filter allows the calls that the profile allows, and refuses all others, also calls of other
/// architectures that the profile allows. `None` if the profile is not an allow-list, or has conditions that are not
/// supported.
pub fn compiled(profile: &LinuxSeccomp) -> Option<Vec<Step>> {
    if profile.default_action() != LinuxSeccompAction::ScmpActErrno {
        return None;
    }
    let mut unconditional = BTreeSet::new();
    let mut conditional: BTreeMap<u32, Vec<Vec<Check>>> = BTreeMap::new();
    for entry in profile.syscalls().iter().flatten() {
        if entry.action() != LinuxSeccompAction::ScmpActAllow {
            continue;
        }
        // Skips names of calls that this architecture does not have.
        for call in entry.names().iter().filter_map(|name| Sysno::from_str(name).ok()) {
            let number = u32::try_from(call.id()).ok()?;
            match entry.args() {
                Some(args) if !args.is_empty() => conditional.entry(number).or_default().extend(all_of(args)?),
                _ => drop(unconditional.insert(number)),
            }
        }
    }
    let mut rules: BTreeMap<u32, Rule> =
        conditional.into_iter().map(|(call, lists)| (call, Rule::Where(lists, REFUSAL))).collect();
    rules.extend(unconditional.into_iter().map(|call| (call, Rule::Always(Action::Allow))));
    let filter = compile(&rules, REFUSAL);
    Some(filter.iter().map(|step| (step.code, step.jt, step.jf, step.k)).collect())
}

/// Converts conditions that must all hold into lists of checks of which at least one must hold. `None` if an operator
/// is not supported; podman's profiles do not use these.
fn all_of(args: &[LinuxSeccompArg]) -> Option<Vec<Vec<Check>>> {
    args.iter().try_fold(vec![Vec::new()], |lists, arg| {
        let one = condition(arg)?;
        let both = |list: &Vec<Check>| one.iter().map(|more| [list.as_slice(), more].concat()).collect::<Vec<_>>();
        Some(lists.iter().flat_map(both).collect())
    })
}

fn condition(arg: &LinuxSeccompArg) -> Option<Vec<Vec<Check>>> {
    let argument = u8::try_from(arg.index()).ok().filter(|index| *index < 6)?;
    let half = |upper: bool, mask: u64, value: u64, negated| {
        let part = |of: u64| if upper { (of >> 32) as u32 } else { of as u32 };
        Check { argument, upper, mask: part(mask), values: vec![part(value)], negated }
    };
    match arg.op() {
        LinuxSeccompOperator::ScmpCmpEq => {
            Some(vec![vec![half(false, u64::MAX, arg.value(), false), half(true, u64::MAX, arg.value(), false)]])
        }
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let (mask, value) = (arg.value(), arg.value_two()?);
            Some(vec![vec![half(false, mask, value, false), half(true, mask, value, false)]])
        }
        LinuxSeccompOperator::ScmpCmpNe => {
            Some(vec![vec![half(false, u64::MAX, arg.value(), true)], vec![half(true, u64::MAX, arg.value(), true)]])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use seccompiler::sock_filter;

    use super::*;
    use crate::sandbox::seccomp::compile::tests::verdict;

    fn profile(text: &str) -> LinuxSeccomp {
        serde_json::from_str(text).unwrap()
    }

    fn action(steps: &[Step], call: Sysno, arguments: [u64; 6]) -> Action {
        let filter = steps.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect();
        verdict(&filter, call.id().cast_unsigned(), arguments)
    }

    #[test]
    fn allow_list_profile_is_compiled() {
        let one = profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
             {"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}, {"index": 2, "value": 9, "op": "SCMP_CMP_NE"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}]}"#,
        );
        let steps = compiled(&one).unwrap();
        assert_eq!(action(&steps, Sysno::write, [0; 6]), Action::Allow);
        assert_eq!(action(&steps, Sysno::mount, [0; 6]), REFUSAL);
        assert_eq!(action(&steps, Sysno::clone, [17, 0, 0, 0, 0, 0]), Action::Allow);
        assert_eq!(action(&steps, Sysno::clone, [17 | 0x1000_0000, 0, 0, 0, 0, 0]), REFUSAL);
        for (family, protocol, expected) in
            [(16, 0, Action::Allow), (16, 1 << 40 | 9, Action::Allow), (16, 9, REFUSAL), (2, 0, REFUSAL)]
        {
            assert_eq!(action(&steps, Sysno::socket, [family, 0, protocol, 0, 0, 0]), expected, "{family} {protocol}");
        }
    }

    #[test]
    fn unconditional_rule_overrides_conditional_rule() {
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
    fn unsupported_profiles_are_not_compiled() {
        assert_eq!(compiled(&profile(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#)), None);
        let less = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_LT"}]}]}"#;
        assert_eq!(compiled(&profile(less)), None);
    }
}
