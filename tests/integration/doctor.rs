//! `coderunner doctor`: which checks it makes, how it reports missing isolation, and that it leaves nothing behind.

use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use crate::fake_podman::FakePodman;
use crate::harness::{self, Files, Options, eventually};
use crate::leftovers;
use crate::shared::Shared;

/// The checks that are made in sandboxes.
const SANDBOX_CHECKS: [&str; 21] = [
    "Landlock",
    "memory",
    "processes",
    "cpu",
    "cpu time",
    "wall time",
    "output",
    "disk",
    "inodes",
    "open files",
    "network",
    "uid",
    "capabilities",
    "no-new-privileges",
    "seccomp",
    "read-only root",
    "masked paths",
    "devices",
    "descriptors",
    "neighbour",
    "leftovers",
];

/// Limits that need cgroup v2.
const CGROUP_LIMITS: [&str; 3] = ["memory", "processes", "cpu"];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    ok: bool,
    checks: Vec<Check>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Check {
    engine: Option<String>,
    name: String,
    status: String,
    expected: String,
    seen: String,
    mend: Option<String>,
}

impl Report {
    /// Parses what `coderunner doctor --json` printed, and checks that it is consistent with the exit code.
    fn parse(output: &Output) -> Report {
        let report: Report =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        assert_eq!(output.status.code(), Some(if report.ok { 0 } else { 1 }), "{output:?}");
        assert_eq!(report.ok, report.checks.iter().all(|check| check.status != "fail"), "{report:#?}");
        for check in &report.checks {
            assert_eq!(
                check.mend.is_none(),
                check.status == "ok",
                "exactly the checks that are not ok have a remedy: {check:?}"
            );
            assert!(!check.expected.is_empty() && !check.seen.is_empty(), "{check:?}");
        }
        report
    }

    /// The only check with this name, of this engine or, with `None`, of the host.
    fn check(&self, engine: Option<&str>, name: &str) -> &Check {
        let mut found = self.checks.iter().filter(|check| check.engine.as_deref() == engine && check.name == name);
        let check = found.next().unwrap_or_else(|| panic!("no check of {name:?}: {self:#?}"));
        assert!(found.next().is_none(), "two checks of {name:?}: {self:#?}");
        check
    }

    /// Names of the checks of this engine that are not ok.
    fn not_ok(&self, engine: &str) -> Vec<&str> {
        let of_engine = self.checks.iter().filter(|check| check.engine.as_deref() == Some(engine));
        of_engine.filter(|check| check.status != "ok").map(|check| check.name.as_str()).collect()
    }
}

/// Runs `coderunner doctor` to its end, and checks that it leaves nothing behind.
fn doctor(options: &Options, flags: &[&str]) -> Output {
    let files = Files::new(options);
    let output = harness::output(files.command("doctor", options).args(flags), b"");
    assert_nothing_left(&files.instance);
    output
}

fn assert_nothing_left(instance: &str) {
    for engine in ["podman", "direct"] {
        leftovers::assert_none(&format!("{instance}-doctor-{engine}"));
        let tag = blake3::hash(format!("{instance}-doctor-{engine}").as_bytes()).to_hex()[..12].to_owned();
        let images = leftovers::list(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
        assert!(!images.contains(&format!("localhost/coderunner-probe:{tag}")), "an image is left behind: {images:?}");
    }
}

on_each_engine! {
    doctor_tries_every_check_and_names_remedies
    doctor_reports_missing_isolation
}

fn doctor_tries_every_check_and_names_remedies(engine: &str) {
    let config = format!("engine = \"{engine}\"");
    let options = Options { languages: &["bash"], containers: 1, config: &config, ..Options::default() };
    // The server, which reads it from inside a sandbox, says which limits are enforced on this host.
    let server = Shared::patient(engine, "bash");
    let unenforced: Vec<&str> = CGROUP_LIMITS.into_iter().filter(|limit| !server.enforces(limit)).collect();
    let report = Report::parse(&doctor(&options, &["--json"]));
    for name in SANDBOX_CHECKS {
        let check = report.check(Some(engine), name);
        assert_eq!(check.status, if unenforced.contains(&name) { "fail" } else { "ok" }, "{check:?}");
    }
    assert_eq!(report.not_ok(engine), unenforced);
    let other = if engine == "podman" { "direct" } else { "podman" };
    for name in SANDBOX_CHECKS {
        let check = report.check(Some(other), name);
        assert_ne!(check.status, "fail", "the other engine is not in use, so its checks cannot fail: {check:?}");
    }
    // The other kernel checks depend on the settings of this host; this one is always reported.
    let check = report.check(None, "module loading");
    assert!(check.status != "fail" && check.seen.starts_with("Linux "), "{check:?}");
    if let Some(mend) = &check.mend {
        assert_eq!(mend, "sudo cp packaging/sysctl.d/no-module-loading.conf /etc/sysctl.d/ && sudo sysctl --system");
    }
    for name in ["user", "runtime directory", "podman", "OCI runtime", "storage", "subordinate ids", "language bash"] {
        assert_eq!(report.check(None, name).status, "ok");
    }
}

fn doctor_reports_missing_isolation(engine: &str) {
    let changes = [
        ("--network=none", "--network=host"),
        ("--read-only", ""),
        ("--security-opt=no-new-privileges", "--security-opt=unmask=ALL"),
        // Saves the checks in sandboxes of the podman engine.
        ("run", "no-such-verb"),
    ];
    let fake = FakePodman::replacing(if engine == "podman" { &changes[..3] } else { &changes });
    let config = format!("engine = \"{engine}\"\n{}", fake.config());
    let options = Options { languages: &["bash"], config: &config, ..Options::default() };
    let report = Report::parse(&doctor(&options, &["--json"]));
    assert!(!report.ok);
    if engine == "direct" {
        let check = report.check(Some(engine), "sandbox");
        assert!(check.status == "fail" && check.seen.contains("a root that can be written to"), "{check:?}");
        return;
    }
    for (name, seen) in [
        ("read-only root", "/ is not read-only"),
        ("masked paths", "can be read"),
        // The interfaces of the host network are visible.
        ("network", "interface"),
    ] {
        let check = report.check(Some(engine), name);
        assert!(check.status == "fail" && check.seen.contains(seen), "{check:?}");
    }
    for name in ["wall time", "output", "disk", "uid", "capabilities", "devices", "descriptors"] {
        assert_eq!(report.check(Some(engine), name).status, "ok", "{name} does not depend on the removed arguments");
    }
}

#[test]
fn doctor_table_has_one_line_per_check_and_a_remedy() {
    let options = Options { languages: &["bash"], ..Options::default() };
    let output = doctor(&options, &["--engine", "podman"]);
    let table = std::str::from_utf8(&output.stdout).unwrap();
    let (_, of_podman) = table.split_once("engine podman\n").unwrap();
    for name in SANDBOX_CHECKS {
        let is_its_line = |line: &&str| line.get(6..).is_some_and(|line| line.starts_with(&format!("{name}  ")));
        assert_eq!(of_podman.lines().filter(is_its_line).count(), 1, "{name:?}:\n{table}");
    }
    let all_ok = output.status.code() == Some(0);
    assert_eq!(table.lines().any(|line| line.starts_with("FAIL")), !all_ok, "{table}");
    let mut lines = table.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("FAIL") || line.starts_with("note") {
            assert!(lines.next().is_some_and(|line| line.trim_start().starts_with("-> ")), "{table}");
        }
    }
}

#[test]
fn doctor_reports_broken_podman_and_tries_no_engine() {
    let options = Options { config: "podman = \"/nonexistent/podman\"", ..Options::default() };
    let report = Report::parse(&doctor(&options, &["--json"]));
    let check = report.check(None, "podman");
    assert!(check.status == "fail" && check.seen.contains("/nonexistent/podman"), "{check:?}");
    assert!(check.mend.as_ref().unwrap().contains("apt-get install podman"), "{check:?}");
    assert!(report.checks.iter().all(|check| check.engine.is_none()), "{report:#?}");
}

#[test]
fn doctor_recommends_the_subids_script_for_missing_ids() {
    let fake = FakePodman::replacing(&[("cat", "true")]);
    let report = Report::parse(&doctor(&Options { config: &fake.config(), ..Options::default() }, &["--json"]));
    let check = report.check(None, "subordinate ids");
    assert!(check.status == "fail" && check.seen == "0 ids", "{check:?}");
    // An executable that is not installed names the script by its path in the repository.
    assert!(check.mend.as_ref().unwrap().contains("packaging/subids USER"), "{check:?}");
}

#[test]
fn doctor_reports_missing_images_with_a_command_to_get_them() {
    // Saves the checks in sandboxes of the engine that is not in use.
    let fake = FakePodman::new("[ \"$1\" != run ] || exit 125");
    let images = "language.bash.image = \"localhost/none\"\nlanguage.c.image = \"registry.invalid/none\"\n";
    let config = fake.config() + images + "engine = \"direct\"";
    let options = Options { languages: &["bash", "c", "python"], config: &config, ..Options::default() };
    let report = Report::parse(&doctor(&options, &["--json"]));
    for (name, status, mend) in [
        ("language bash", "fail", "podman build -t localhost/none"),
        ("language c", "note", "podman pull registry.invalid/none"),
    ] {
        let check = report.check(None, name);
        assert!(check.status == status && check.mend.as_ref().unwrap().contains(mend), "{check:?}");
    }
    let check = report.check(None, "language python");
    assert_eq!(check.status, "ok", "{check:?}");
}

#[test]
fn interrupted_doctor_leaves_nothing() {
    // SIGHUP is what a closed terminal sends.
    for signal in [Signal::SIGINT, Signal::SIGHUP] {
        let options = Options { languages: &["bash"], ..Options::default() };
        let files = Files::new(&options);
        let mut command = files.command("doctor", &options);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let instance = format!("{}-doctor-direct", files.instance);
        eventually("doctor has a container", || (!leftovers::containers(&instance).is_empty()).then_some(()));
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let output = harness::finish(child, b"");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{signal}: no report");
        assert_nothing_left(&files.instance);
    }
}
