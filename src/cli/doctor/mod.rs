//! `coderunner doctor`: whether this host can do what coderunner promises, and how to mend what it cannot. Each
//! limit and wall is tried, in sandboxes of either engine.

mod host;
mod image;
mod kernel;
pub(super) mod probe;
mod report;
mod trial;
mod wall;

use std::time::Duration;

use anyhow::Context;
use tokio::time::timeout;

use crate::cli::workshop::Workshop;
use crate::config::Settings;
use crate::host::print;
use crate::host::signals::{self, Phases};
use crate::images::names;
use crate::sandbox::Enforced;
use crate::sandbox::SandboxError;
use crate::sandbox::engine::EngineKind;
use crate::sandbox::health::Checks;
use crate::sandbox::podman::Info;
use report::{Check, Report, Status};
use trial::Trial;
use wall::{Tried, Wall};

/// The engines, the one first that needs a cgroup of its own: that can only be taken before this process has children.
const ENGINES: [EngineKind; 2] = [EngineKind::Direct, EngineKind::Podman];

/// How long removing the image of a trial may take at the end. Together with closing the workshop it has to be less than
/// the time that systemd gives a service to stop.
const IMAGE_TIME: Duration = Duration::from_secs(10);

/// How to mend what no setting of the host can cause.
const OUR_FAULT: &str =
    "nothing of this host's is known to cause it: please report it, with `coderunner doctor --json`";

/// Checks everything and prints the report, as a table or as JSON. Returns whether all is well.
pub(super) async fn run(settings: &Settings, json: bool) -> anyhow::Result<bool> {
    let phases = Phases::default();
    let _signals = signals::listen(phases.clone(), None).context("cannot listen for signals")?;
    let mut report = Report { ok: true, checks: Vec::new() };
    // Before podman is asked anything: see ENGINES.
    let workshops = ENGINES.map(|engine| (engine, workshop(settings, engine)));
    let interrupted = tokio::select! {
        () = examine(settings, &workshops, &mut report) => false,
        () = phases.stop.cancelled() => true,
    };
    for workshop in workshops.into_iter().filter_map(|(_, workshop)| workshop.ok()) {
        close(workshop).await;
    }
    anyhow::ensure!(!interrupted, "interrupted");
    print::stdout(match json {
        true => serde_json::to_string_pretty(&report).context("cannot write the report")? + "\n",
        false => report.table(),
    })?;
    Ok(report.ok)
}

/// Refuses a host where the kernel does not enforce the limits of sandboxes: makes one and asks its init. If the future is
/// dropped, [`close`] removes what it leaves.
pub(super) async fn require_limits(workshop: &Workshop) -> Result<(), SandboxError> {
    let tried = async { Trial::begin(workshop).await?.enforced().await };
    let enforced = tried.await;
    workshop.engine.release(None).await;
    image::remove(&workshop.podman, &workshop.instance.name).await;
    enforced.map(drop)
}

/// Waits until all containers have gone, and removes the image of a trial.
pub(super) async fn close(workshop: Workshop) {
    let (podman, instance) = (workshop.podman.clone(), workshop.instance.name.clone());
    workshop.close().await;
    if timeout(IMAGE_TIME, image::remove(&podman, &instance)).await.is_err() {
        tracing::warn!("the image that limits are tried with may be left: podman does not answer");
    }
}

/// A workshop for trials: with a name of its own, since a server may run, and without `require_limits`, since that is what
/// is tried.
fn workshop(settings: &Settings, engine: EngineKind) -> anyhow::Result<Workshop> {
    let mut settings = settings.clone();
    settings.instance = format!("{}-doctor-{engine}", settings.instance);
    (settings.engine, settings.require_limits) = (engine, false);
    Workshop::open(&settings)
}

/// Makes all checks.
async fn examine(settings: &Settings, workshops: &[(EngineKind, anyhow::Result<Workshop>)], report: &mut Report) {
    let info = host::check(settings, report).await;
    kernel::checks().into_iter().for_each(|check| report.add(check));
    let Some(info) = info else { return };
    // Without limits there are sandboxes all the same; without anything else there are none.
    if report.checks.iter().any(|check| check.status == Status::Fail && check.name != host::CGROUPS) {
        return;
    }
    let mut in_use = settings.engine;
    for (engine, workshop) in workshops {
        let (checks, enforced) = match workshop {
            Ok(workshop) => engine_checks(workshop, *engine, &info).await,
            Err(error) => {
                let mend = "wait until the other one has ended, or give this one another name by `instance`";
                (vec![Check::new("instance", "a name of its own", crate::cli::told(error)).or(false, mend)], None)
            }
        };
        if in_use == EngineKind::Auto {
            // The first one where it works, unless the other alone can limit.
            let can_limit = |enforced: Enforced| enforced.missing().is_empty();
            let taken = enforced.is_some_and(|enforced| can_limit(enforced) || !info.missing_controllers().is_empty());
            in_use = if taken { EngineKind::Direct } else { EngineKind::Podman };
        }
        for check in checks {
            report.add(if *engine == in_use { check } else { check.noted() }.of(*engine));
        }
    }
    let workshop = workshops.iter().find(|(engine, _)| *engine == in_use);
    if let Some((_, Ok(workshop))) = workshop {
        languages(settings, workshop, report).await;
    }
}

/// Tries everything with one engine. Returns the checks, and which limits its sandboxes have if one could be made.
async fn engine_checks(workshop: &Workshop, engine: EngineKind, info: &Info) -> (Vec<Check>, Option<Enforced>) {
    let works = |seen: String| Check::new("sandbox", "one can be made", seen);
    let begun = async {
        let trial = Trial::begin(workshop).await?;
        let enforced = trial.enforced().await?;
        Ok::<_, SandboxError>((trial, enforced))
    };
    match begun.await {
        Ok((trial, enforced)) => {
            let tried = trial.run(enforced).await.into_iter().map(|tried| of_wall(tried, engine, info));
            (std::iter::once(works("made".into())).chain(tried).collect(), Some(enforced))
        }
        Err(error) => (vec![works(error.to_string()).or(false, "podman info; podman system migrate")], None),
    }
}

/// The check of a wall, with how to mend it.
fn of_wall(Tried { wall, holds, expected, seen }: Tried, engine: EngineKind, info: &Info) -> Check {
    let host_limits = info.missing_controllers().is_empty();
    let mend = match wall {
        Wall::Memory | Wall::Processes | Wall::Cpu if engine == EngineKind::Direct && host_limits => {
            "start it with a cgroup of its own: by the packaged unit, or \
             `systemd-run --user --scope --property=Delegate=yes coderunner …`"
        }
        Wall::Memory | Wall::Processes | Wall::Cpu => host::limits_mend(info),
        Wall::Seccomp => "apt-get install --reinstall golang-github-containers-common, for podman's profile",
        Wall::Landlock => {
            "a kernel from 5.13 on with landlock among its security modules: add lsm=landlock,… to its command line"
        }
        Wall::Disk
        | Wall::Inodes
        | Wall::Network
        | Wall::Capabilities
        | Wall::NoNewPrivileges
        | Wall::ReadOnlyRoot
        | Wall::MaskedPaths
        | Wall::Devices => "apt-get install --only-upgrade podman crun; and look for what containers.conf adds",
        Wall::Time
        | Wall::CpuTime
        | Wall::Output
        | Wall::OpenFiles
        | Wall::Uid
        | Wall::Descriptors
        | Wall::Neighbour
        | Wall::Leftovers => OUR_FAULT,
    };
    let check = Check::new(wall.name(), expected, seen).or(holds, mend);
    // It is a second wall behind others, and older kernels do not have it.
    if wall == Wall::Landlock { check.noted() } else { check }
}

/// Runs the health program of each language that is served.
async fn languages(settings: &Settings, workshop: &Workshop, report: &mut Report) {
    let languages = match settings.enabled() {
        Ok(languages) => languages,
        Err(error) => {
            return report.add(Check::new("languages", "some", error.to_string()).or(false, "mend the configuration"));
        }
    };
    for language in languages {
        let check = |seen: String| Check::new(format!("language {}", language.name), "its health program runs", seen);
        let image = workshop.podman.image_id(&language.image).await;
        report.add(match image {
            Ok(Some(image)) => {
                let checked = Checks::default().check(&*workshop.engine, &language, &image).await;
                match checked.unwrap_or_else(|error| Some(error.to_string())) {
                    None => check("it does".into()),
                    Some(why) => check(why).or(false, format!("podman pull {}, or another image", language.image)),
                }
            }
            Ok(None) if names::is_local(&language.image) => {
                let mend =
                    format!("build it: a name under localhost/ is never pulled: podman build -t {} …", language.image);
                check(format!("no image {}", language.image)).or(false, mend)
            }
            // The server does at its start.
            Ok(None) => check(format!("no image {} yet", language.image))
                .or(false, format!("podman pull {}", language.image))
                .noted(),
            Err(error) => check(error.to_string()).or(false, "podman image ls"),
        });
    }
}
