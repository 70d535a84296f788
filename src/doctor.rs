//! `coderunner doctor`: whether this host can run what coderunner promises, and how to mend what it cannot.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::app::Workshop;
use crate::config::Settings;
use crate::instance;
use crate::job::{Streams, Verdict};
use crate::language::Language;
use crate::sandbox::podman::{Info, Podman};
use crate::sandbox::protocol::Enforced;
use crate::sandbox::{Live, SandboxSpec, Slot};

/// Subordinate ids that an ordinary image needs.
const SUBIDS: u64 = 65_536;

/// The oldest podman whose options are all known to work: Debian 12's.
const OLDEST_PODMAN: (u32, u32) = (4, 3);

/// One line of the table.
struct Check {
    what: String,
    seen: String,
    /// How to mend it; `None` where it is well.
    mend: Option<String>,
}

impl Check {
    fn new(what: impl Into<String>, ok: bool, seen: impl Into<String>, mend: impl Into<String>) -> Check {
        Check { what: what.into(), seen: seen.into(), mend: (!ok).then(|| mend.into()) }
    }
}

/// Prints the table; whether all is well.
pub async fn run(settings: &Settings) -> bool {
    let mut checks = Vec::new();
    let uid = nix::unistd::geteuid();
    checks.push(Check::new("user", !uid.is_root(), format!("uid {uid}"), "run as an ordinary user, not as root"));
    let runtime = instance::runtime_dir();
    let seen = runtime.as_ref().map_or_else(ToString::to_string, |dir| dir.display().to_string());
    checks.push(Check::new(
        "runtime directory",
        runtime.is_ok(),
        seen,
        "loginctl enable-linger USER, then log in anew",
    ));
    let podman = Podman::new(&settings.podman);
    match podman.info().await {
        Ok(info) => {
            host(&info, &mut checks);
            subids(&podman, &mut checks).await;
            let all_well = checks.iter().all(|check| check.mend.is_none() || check.what == "limits");
            if all_well {
                languages(settings, &mut checks).await;
            }
        }
        Err(error) => checks.push(Check::new("podman", false, error.to_string(), "apt-get install podman crun uidmap")),
    }
    let width = checks.iter().map(|check| check.what.len()).max().unwrap_or_default();
    for check in &checks {
        let mark = if check.mend.is_none() { "ok  " } else { "FAIL" };
        println!("{mark}  {:width$}  {}", check.what, check.seen);
        if let Some(mend) = &check.mend {
            println!("      {:width$}  -> {mend}", "");
        }
    }
    checks.iter().all(|check| check.mend.is_none())
}

fn host(info: &Info, checks: &mut Vec<Check>) {
    let mut numbers = info.version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let wanted = format!("install podman {}.{} or newer", OLDEST_PODMAN.0, OLDEST_PODMAN.1);
    checks.push(Check::new("podman", version >= OLDEST_PODMAN, &info.version, wanted));
    checks.push(Check::new("OCI runtime", info.runtime.contains("crun"), &info.runtime, "apt-get install crun"));
    let native = info.native_overlay.map_or("", |native| if native { ", native" } else { ", not native" });
    checks.push(Check::new(
        "storage",
        info.driver == "overlay",
        format!("{}{native}", info.driver),
        "write driver = \"overlay\" under [storage] in ~/.config/containers/storage.conf, then `podman system reset`",
    ));
    let missing = info.missing_controllers();
    let seen = format!("cgroup {}, controllers {}", info.cgroup_version, info.controllers.join(" "));
    let mend = match info.cgroup_version.as_str() {
        "v2" => format!(
            "delegate {} to the user: Delegate=cpu memory pids for user@.service, or use the packaged unit",
            missing.join(", ")
        ),
        _ => "boot with systemd.unified_cgroup_hierarchy=1: cgroup v1 cannot limit rootless containers".into(),
    };
    checks.push(Check::new("limits", missing.is_empty(), seen, mend));
}

async fn subids(podman: &Podman, checks: &mut Vec<Check>) {
    let (seen, count) = match podman.mapped_ids().await {
        Ok(count) => (format!("{count} ids"), count),
        Err(error) => (error.to_string(), 0),
    };
    let mend = "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, then `podman system migrate`";
    checks.push(Check::new("subordinate ids", count > SUBIDS, seen, mend));
}

async fn languages(settings: &Settings, checks: &mut Vec<Check>) {
    let languages = match settings.enabled() {
        Ok(languages) => languages,
        Err(error) => {
            return checks.push(Check::new("languages", false, error.to_string(), "mend the configuration"));
        }
    };
    let workshop = match Workshop::open(settings) {
        Ok(workshop) => workshop,
        Err(error) => return checks.push(Check::new("instance", false, crate::told(&error), "see there")),
    };
    for language in languages {
        let name = format!("language {}", language.name);
        let check = match hello(&workshop, &language).await {
            Ok(enforced) => {
                let missing = enforced.missing().join(", ");
                let limits =
                    if missing.is_empty() { "all limits kept".into() } else { format!("no limit of {missing}") };
                Check::new(name, true, format!("hello ran, {limits}"), "")
            }
            Err(problem) => Check::new(
                name,
                false,
                problem,
                format!("podman pull {}, or build it where it is local", language.image),
            ),
        };
        checks.push(check);
    }
    workshop.close().await;
}

async fn hello(workshop: &Workshop, language: &Arc<Language>) -> Result<Enforced, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let image = workshop.podman.image_id(&language.image).await.map_err(|e| text(&e))?;
    let image = image.ok_or_else(|| format!("no image {}", language.image))?;
    let spec = SandboxSpec { language: Arc::clone(language), image, slot: Slot::new(0, mpsc::unbounded_channel().0) };
    let sandbox = workshop.engine.start(spec).await.map_err(|e| text(&e))?;
    let enforced = sandbox.enforced;
    let job = language.job(language.health.code.clone().into(), Streams::Merged);
    let outcome = sandbox.run(language, &job, &mut Live::default()).await.map_err(|e| text(&e))?;
    let printed = outcome.run.as_ref().map(|run| run.output.text()).unwrap_or_default();
    match outcome.verdict() == Verdict::Ok && printed == language.health.output {
        true => Ok(enforced),
        false => Err(format!("hello ended with {:?} and printed {printed:?}", outcome.verdict())),
    }
}
