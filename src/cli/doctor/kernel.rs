//! Checks of kernel settings that let a program use CPU time or memory that no limit of its sandbox counts. Only an
//! operator can change them.

use std::fs;
use std::path::Path;

use crate::cli::doctor::host;
use crate::cli::doctor::report::Check;

/// The first Linux that does not look for a kernel module when it executes a file of an unknown format (commit
/// fa1bdca98d74).
const NO_MODULES_FOR_EXEC: (u32, u32) = (6, 14);

/// Checks all settings, except those that this user may not read.
pub(super) fn checks() -> Vec<Check> {
    let drop_in = host::shipped("no-module-loading.conf", "packaging/sysctl.d/no-module-loading.conf");
    checks_with(&|name| fs::read_to_string(Path::new("/proc/sys").join(name)).ok(), &drop_in)
}

/// The checks of the settings that `read` returns. `drop_in` is the sysctl file that turns module loading off.
fn checks_with(read: &dyn Fn(&str) -> Option<String>, drop_in: &Path) -> Vec<Check> {
    let setting = |name: &str| read(name).map(|text| text.trim().to_owned());
    let number = |name: &str| setting(name)?.parse::<u64>().ok();
    let release = setting("kernel/osrelease").unwrap_or_else(|| "of an unknown release".into());
    let mut checks = vec![module_loading(setting("kernel/modprobe").as_deref(), &release, drop_in)];
    let mut note = |name: &str, expected: &str, seen: String, ok: bool, fix: &str| {
        checks.push(Check::new(name, expected, seen).fail_unless(ok, fix).downgrade_to_note());
    };

    let pages = [number("vm/nr_hugepages"), number("vm/nr_overcommit_hugepages")];
    if let [Some(reserved), Some(more)] = pages {
        let seen = format!("{reserved} reserved, {more} more on demand");
        let fix = "cgroups do not count them as memory; if nothing else here needs them: \
                    sudo sysctl -w vm.nr_hugepages=0 vm.nr_overcommit_hugepages=0";
        note("huge pages", "none", seen, reserved + more == 0, fix);
    }
    if let Some(disabled) = number("kernel/unprivileged_bpf_disabled") {
        let limit =
            number("net/core/bpf_jit_limit").map_or_else(String::new, |limit| format!(", {limit} bytes in all"));
        let who = if disabled == 0 { "anybody" } else { "root" };
        let fix = "sudo sysctl -w kernel.unprivileged_bpf_disabled=1";
        note("bpf", "for root alone", format!("for {who}{limit}"), disabled != 0, fix);
    }
    if let Some(panics) = number("vm/panic_on_oom") {
        let seen = if panics == 0 { "killed".into() } else { format!("vm.panic_on_oom is {panics}") };
        let fix = "sudo sysctl -w vm.panic_on_oom=0";
        // With 2, reaching the limit of a cgroup panics too: any program could crash the machine.
        let check = Check::new("out of memory", "programs are killed", seen).fail_unless(panics == 0, fix);
        checks.push(if panics < 2 { check.downgrade_to_note() } else { check });
    }
    if let Some(lines) = number("debug/exception-trace") {
        let seen = if lines == 0 { "are not" } else { "are, in the kernel's log" };
        checks.push(
            Check::new("crashes", "are not logged", seen)
                .fail_unless(lines == 0, "to keep crashes out of that log: sudo sysctl -w debug.exception-trace=0")
                .downgrade_to_note(),
        );
    }
    checks
}

/// Whether programs can make the kernel start modprobe, which runs as root and outside of our cgroups.
/// `kernel.modules_disabled` does not prevent that: the kernel starts modprobe, which then fails.
fn module_loading(modprobe: Option<&str>, release: &str, drop_in: &Path) -> Check {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (ok, why) = match modprobe {
        None => (true, "it has no modules".to_owned()),
        Some("") => (true, "it loads none by itself".to_owned()),
        Some(_) if version >= NO_MODULES_FOR_EXEC => (true, "it starts none for what is executed".to_owned()),
        Some(path) => (false, format!("it starts {path} for what is executed")),
    };
    let fix = format!("sudo cp {} /etc/sysctl.d/ && sudo sysctl --system", drop_in.display());
    Check::new("module loading", "none by programs", format!("Linux {release}: {why}"))
        .fail_unless(ok, fix)
        .downgrade_to_note()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cli::doctor::report::Status;

    fn checked(settings: &[(&str, &str)]) -> BTreeMap<String, Check> {
        let settings: BTreeMap<&str, &str> = settings.iter().copied().collect();
        let checks =
            checks_with(&|name| settings.get(name).map(|value| format!("{value}\n")), Path::new("/lib/drop-in"));
        checks.into_iter().map(|check| (check.name.clone(), check)).collect()
    }

    #[test]
    fn module_loading_is_reported_on_kernels_before_6_14() {
        for (release, modprobe, status) in [
            ("6.1.0-44-amd64", Some("/sbin/modprobe"), Status::Note),
            ("6.12.90+deb13-amd64", Some("/sbin/modprobe"), Status::Note),
            ("6.13", Some("/sbin/modprobe"), Status::Note),
            ("6.14.0", Some("/sbin/modprobe"), Status::Ok),
            ("7.3.4", Some("/sbin/modprobe"), Status::Ok),
            ("of our own", Some("/sbin/modprobe"), Status::Note),
            ("6.1.0-44-amd64", Some(""), Status::Ok),
            ("6.1.0-44-amd64", None, Status::Ok),
        ] {
            let mut settings = vec![("kernel/osrelease", release)];
            settings.extend(modprobe.map(|path| ("kernel/modprobe", path)));
            let check = &checked(&settings)["module loading"];
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.seen.contains(release), "{check:?}");
            let fix = (status != Status::Ok).then_some("sudo cp /lib/drop-in /etc/sysctl.d/ && sudo sysctl --system");
            assert_eq!(check.fix.as_deref(), fix);
        }
    }

    #[test]
    fn unreadable_settings_are_skipped_and_findings_have_a_remedy() {
        assert_eq!(checked(&[]).into_keys().collect::<Vec<_>>(), ["module loading"]);
        let fixed = [
            ("vm/nr_hugepages", "0"),
            ("vm/nr_overcommit_hugepages", "0"),
            ("kernel/unprivileged_bpf_disabled", "2"),
            ("vm/panic_on_oom", "0"),
            ("debug/exception-trace", "0"),
        ];
        let names = ["bpf", "crashes", "huge pages", "module loading", "out of memory"];
        assert_eq!(checked(&fixed).keys().collect::<Vec<_>>(), names);
        assert!(checked(&fixed).values().all(|check| check.status == Status::Ok));
        for (setting, value, name, status) in [
            ("vm/nr_hugepages", "32", "huge pages", Status::Note),
            ("vm/nr_overcommit_hugepages", "1", "huge pages", Status::Note),
            ("kernel/unprivileged_bpf_disabled", "0", "bpf", Status::Note),
            ("vm/panic_on_oom", "1", "out of memory", Status::Note),
            ("vm/panic_on_oom", "2", "out of memory", Status::Fail),
            ("debug/exception-trace", "1", "crashes", Status::Note),
        ] {
            let all: Vec<_> = fixed.into_iter().filter(|(one, _)| *one != setting).chain([(setting, value)]).collect();
            let checks = checked(&all);
            assert_eq!(checks[name].status, status, "{:?}", checks[name]);
            let key = setting.replace('/', ".");
            assert!(checks[name].fix.as_ref().unwrap().contains(&key), "{:?}", checks[name]);
            assert!(checks.values().all(|check| check.name == name || check.status == Status::Ok), "{checks:?}");
        }
    }
}
