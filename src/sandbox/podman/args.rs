//! Arguments of the podman commands that create containers.

use std::ffi::OsString;
use std::path::Path;

use crate::model::language::Language;
use crate::model::rootfs::{DEVICES, INIT, JOB_DIR, WRITABLE, WritableDir};
use crate::sandbox::supervisor::EngineSettings;
use crate::sandbox::{LABEL, LABEL_INSTANCE, LABEL_LANGUAGE, orphans};

/// The arguments of `podman run` for a sandbox. They contain nothing of a request: code, arguments and input go through
/// the job directory and the channel.
pub(super) fn run_args(
    name: &str,
    settings: &EngineSettings,
    language: &Language,
    image: &str,
    job_dir: &Path,
    dev: &Path,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = ["run", "--rm", "--sdnotify=ignore", "--sig-proxy=false", "--preserve-fds=1"]
        .into_iter()
        .map(OsString::from)
        .collect();
    let source = orphans::volume_source(&settings.instance, name);
    for dir in WRITABLE {
        let limits = &language.limits;
        args.push(format!("--mount={}", volume(dir, &source, limits.directory_size(), limits.inodes)).into());
    }
    args.push(format!("--volume={}:{JOB_DIR}:ro", job_dir.display()).into());
    // With a volume at /dev the OCI runtime mounts no devices there. Its own device mounts would let programs change
    // the times of the host's device files.
    args.push(format!("--volume={}:/dev:ro,nosuid,noexec", dev.display()).into());
    args.extend(DEVICES.map(|device| format!("--volume=/dev/{device}:/dev/{device}:ro,nosuid,noexec").into()));
    args.extend(container_args(name, settings, language, image));
    args
}

/// The arguments that both engines share, from the isolation options to the image at the end.
pub(in crate::sandbox) fn container_args(
    name: &str,
    settings: &EngineSettings,
    language: &Language,
    image: &str,
) -> Vec<OsString> {
    let limits = &language.limits;
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |arg: String| args.push(arg.into());
    for fixed in [
        // podman must neither pull the image, nor log output, nor run health checks.
        "--pull=never",
        "--log-driver=none",
        "--no-healthcheck",
        "--network=none",
        "--ipc=none",
        "--pid=private",
        "--uts=private",
        "--cgroupns=private",
        "--user=0:0",
        "--cap-drop=all",
        "--cap-add=SETUID",
        "--cap-add=SETGID",
        "--cap-add=KILL",
        "--security-opt=no-new-privileges",
        "--read-only",
        "--read-only-tmpfs=false",
        "--image-volume=ignore",
        "--http-proxy=false",
        "--no-hosts",
        "--systemd=false",
        "--hostname=sandbox",
        // The limit that init sets for programs, which it cannot raise.
        "--ulimit=core=1:1",
        // No pseudo-terminals: all containers share one limit of the host. The single one here cannot be opened.
        "--mount=type=devpts,destination=/dev/pts,max=1",
        // Without this, shared memory segments would outlive the processes that are killed between two stages.
        "--sysctl=kernel.shm_rmid_forced=1",
    ] {
        add(fixed.into());
    }
    add(format!("--name={name}"));
    add(format!("--label={LABEL}=1"));
    add(format!("--label={LABEL_INSTANCE}={}", settings.instance));
    add(format!("--label={LABEL_LANGUAGE}={}", language.name));
    let memory = limits.memory.as_u64();
    add(format!("--memory={memory}b"));
    add(format!("--memory-swap={memory}b"));
    // One more for init.
    add(format!("--pids-limit={}", limits.processes + 1));
    add(format!("--cpus={}", limits.cpus));
    // Init starts programs in /work, which a template does not have yet.
    add("--workdir=/".into());
    add(format!("--volume={}:{INIT}:ro", settings.executable.display()));
    add(format!("--entrypoint=[\"{INIT}\",\"init\"]"));
    add("--".into());
    add(image.into());
    args
}

/// A `--mount` value for a tmpfs with a limit of inodes. It is a volume, because podman's tmpfs mounts refuse
/// `nr_inodes`.
fn volume(dir: WritableDir, source: &str, size: u64, inodes: u64) -> String {
    let (path, options) = (dir.path, dir.mount_options(size, inodes).join(","));
    format!(
        "type=volume,destination={path},volume-opt=type=tmpfs,volume-opt=device={source},\"volume-opt=o={options}\""
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sandbox::supervisor::Supervised;
    use proptest::prelude::*;
    use tokio_util::task::TaskTracker;

    fn settings() -> EngineSettings {
        EngineSettings {
            instance: "test".into(),
            jobs: "/run/jobs".into(),
            executable: "/usr/bin/coderunner".into(),
            require_limits: false,
            supervisors: TaskTracker::new(),
            supervised: Supervised::default(),
            observer: Arc::new(crate::sandbox::fake::NoopObserver),
        }
    }

    fn args(language: &Language) -> Vec<String> {
        run_args("name", &settings(), language, "sha256:id", Path::new("/run/jobs/job-1"), Path::new("/run/dev"))
            .into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect()
    }

    #[test]
    fn all_isolation_options_are_passed() {
        let args = args(&crate::config::tests::language("c"));
        for option in [
            "--network=none",
            "--read-only",
            "--read-only-tmpfs=false",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
            "--http-proxy=false",
            "--pids-limit=65",
            "--memory=536870912b",
            "--memory-swap=536870912b",
            "--label=io.coderunner=1",
            "--label=io.coderunner.instance=test",
            "--label=io.coderunner.language=c",
        ] {
            assert!(args.iter().any(|arg| arg == option), "{option} is not in {args:?}");
        }
        assert_eq!(args[args.len() - 2..], ["--", "sha256:id"]);
    }

    /// A text as a TOML string.
    fn quoted(text: &str) -> String {
        toml::Value::String(text.into()).to_string()
    }

    fn configured(key: &str, image: &str, source: &str, word: &str) -> Option<Language> {
        let text = format!(
            "[language.{}]\nimage = {}\nsource = {}\nrun = [{}]\nhealth = {{ code = \"\", output = \"\" }}",
            quoted(key),
            quoted(image),
            quoted(source),
            quoted(word),
        );
        crate::config::tests::load(&text).ok()?.language(key).ok()
    }

    proptest! {
        /// [`run_args`] gets nothing of a request. Of the configuration, only the limits and the language's name, in
        /// the value of a label, change an argument.
        #[test]
        fn configured_strings_never_become_options(
            name in "x[a-z0-9+_-]{0,20}", source in "[^/\0]{1,40}", word in "[^\0]{0,40}",
        ) {
            prop_assume!(source != "." && source != "..");
            let language = configured(&name, "image", &source, &word).expect("valid");
            let label = format!("--label=io.coderunner.language={name}");
            let others: Vec<String> = args(&language).into_iter().filter(|arg| *arg != label).collect();
            let mut plain = args(&crate::config::tests::language("bash"));
            plain.retain(|arg| arg != "--label=io.coderunner.language=bash");
            prop_assert_eq!(others, plain);
        }

        #[test]
        fn names_that_look_like_options_are_rejected(text in "--?[a-z=]{0,20}") {
            prop_assert!(configured(&text, "image", "source", "word").is_none());
            prop_assert!(configured("name", &text, "source", "word").is_none());
        }
    }
}
