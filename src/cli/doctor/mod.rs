//! `coderunner doctor`: checks that this host can enforce the limits and isolation that coderunner promises, and says
//! how to fix what fails. It tests each limit and wall in sandboxes of either engine.

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

use crate::cli::session::EngineSession;
use crate::config::Settings;
use crate::host::print;
use crate::host::signals::{self, Shutdown};
use crate::images::names;
use crate::sandbox::Enforced;
use crate::sandbox::SandboxError;
use crate::sandbox::engine::EngineKind;
use crate::sandbox::health::Checks;
use crate::sandbox::podman::Info;
use report::{Check, Report, Status};
use trial::Trial;
use wall::{Wall, WallResult};

/// The engines. The direct engine is first: it takes the delegated cgroup, which works only before this process has
/// children.
const ENGINES: [EngineKind; 2] = [EngineKind::Direct, EngineKind::Podman];

/// How long removing the image of a trial may take at the end. Together with closing the session it has to take less
/// than the unit's `TimeoutStopSec`.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The fix of a failure that no known setting of the host causes.
const OUR_FAULT: &str =
    "no setting of this host is known to cause this: please report it, with the output of `coderunner doctor --json`";

/// Makes all checks and prints the report, as a table or as JSON. Returns whether no check failed.
pub(super) async fn run(settings: &Settings, json: bool) -> anyhow::Result<bool> {
    let shutdown = Shutdown::default();
    let _signals = signals::listen(shutdown.clone(), None).context("cannot listen for signals")?;
    let mut report = Report { ok: true, checks: Vec::new() };
    // Before any podman command: see ENGINES.
    let sessions = ENGINES.map(|engine| (engine, open_session(settings, engine)));
    let interrupted = tokio::select! {
        () = examine(settings, &sessions, &mut report) => false,
        () = shutdown.stop.cancelled() => true,
    };
    for session in sessions.into_iter().filter_map(|(_, session)| session.ok()) {
        close(session).await;
    }
    anyhow::ensure!(!interrupted, "interrupted");
    print::stdout(match json {
        true => serde_json::to_string_pretty(&report).context("cannot write the report")? + "\n",
        false => report.table(),
    })?;
    Ok(report.ok)
}

/// Fails if the kernel does not enforce the limits of sandboxes: makes a sandbox and asks its init. If the future is
/// dropped, [`close`] cleans up.
pub(super) async fn require_limits(session: &EngineSession) -> Result<(), SandboxError> {
    let asking = async { Trial::begin(session).await?.enforced().await };
    let enforced = asking.await;
    session.engine.release(None).await;
    image::remove(&session.podman, &session.instance.name).await;
    enforced.map(drop)
}

/// Closes the session and removes the image of its trial.
pub(super) async fn close(session: EngineSession) {
    let (podman, instance) = (session.podman.clone(), session.instance.name.clone());
    session.close().await;
    if timeout(IMAGE_TIMEOUT, image::remove(&podman, &instance)).await.is_err() {
        tracing::warn!("the image of the limit checks may be left behind: podman does not answer");
    }
}

/// Opens a session for a trial: with an instance name of its own, since a server may run, and without `require_limits`,
/// since the trial tests the limits.
fn open_session(settings: &Settings, engine: EngineKind) -> anyhow::Result<EngineSession> {
    let mut settings = settings.clone();
    settings.instance = format!("{}-doctor-{engine}", settings.instance);
    (settings.engine, settings.require_limits) = (engine, false);
    EngineSession::open(&settings)
}

/// Makes all checks.
async fn examine(settings: &Settings, sessions: &[(EngineKind, anyhow::Result<EngineSession>)], report: &mut Report) {
    let info = host::check(settings, report).await;
    kernel::checks().into_iter().for_each(|check| report.add(check));
    let Some(info) = info else { return };
    // Without cgroups, sandboxes can be made but not limited. Any other failure prevents making sandboxes.
    if report.checks.iter().any(|check| check.status == Status::Fail && check.name != host::CGROUPS) {
        return;
    }
    let mut in_use = settings.engine;
    for (engine, session) in sessions {
        let (checks, enforced) = match session {
            Ok(session) => engine_checks(session, *engine, &info).await,
            Err(error) => {
                let fix = "wait until the other instance has ended, or set another name as `instance`";
                let check = Check::new("instance", "a name of its own", crate::cli::error_text(error));
                (vec![check.fail_unless(false, fix)], None)
            }
        };
        if in_use == EngineKind::Auto {
            // The direct engine if it works, unless only the podman engine can limit.
            let can_limit = |enforced: Enforced| enforced.missing().is_empty();
            let direct = enforced.is_some_and(|enforced| can_limit(enforced) || !info.missing_controllers().is_empty());
            in_use = if direct { EngineKind::Direct } else { EngineKind::Podman };
        }
        for check in checks {
            report.add(if *engine == in_use { check } else { check.downgrade_to_note() }.for_engine(*engine));
        }
    }
    let session = sessions.iter().find(|(engine, _)| *engine == in_use);
    if let Some((_, Ok(session))) = session {
        languages(settings, session, report).await;
    }
}

/// Tests all walls with one engine. Returns the checks, and the limits that the kernel enforces for its sandboxes, if
/// one could be made.
async fn engine_checks(session: &EngineSession, engine: EngineKind, info: &Info) -> (Vec<Check>, Option<Enforced>) {
    let sandbox = |seen: String| Check::new("sandbox", "can be made", seen);
    let begun = async {
        let trial = Trial::begin(session).await?;
        let enforced = trial.enforced().await?;
        Ok::<_, SandboxError>((trial, enforced))
    };
    match begun.await {
        Ok((trial, enforced)) => {
            let walls = trial.run(enforced).await.into_iter().map(|result| wall_check(result, engine, info));
            (std::iter::once(sandbox("made".into())).chain(walls).collect(), Some(enforced))
        }
        Err(error) => (vec![sandbox(error.to_string()).fail_unless(false, "podman info; podman system migrate")], None),
    }
}

/// The check of a wall, with how to fix it.
fn wall_check(WallResult { wall, holds, expected, seen }: WallResult, engine: EngineKind, info: &Info) -> Check {
    let host_limits = info.missing_controllers().is_empty();
    let fix = match wall {
        Wall::Memory | Wall::Processes | Wall::Cpu if engine == EngineKind::Direct && host_limits => {
            "start coderunner in a cgroup of its own: by the packaged unit, or \
             `systemd-run --user --scope --property=Delegate=yes coderunner …`"
        }
        Wall::Memory | Wall::Processes | Wall::Cpu => host::limits_fix(info),
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
        | Wall::Devices => "apt-get install --only-upgrade podman crun; and check what containers.conf adds",
        Wall::Time
        | Wall::CpuTime
        | Wall::Output
        | Wall::OpenFiles
        | Wall::Uid
        | Wall::Descriptors
        | Wall::Neighbour
        | Wall::Leftovers => OUR_FAULT,
    };
    let check = Check::new(wall.name(), expected, seen).fail_unless(holds, fix);
    // Landlock is a second wall behind others, and older kernels do not have it.
    if wall == Wall::Landlock { check.downgrade_to_note() } else { check }
}

/// Runs the health program of each enabled language.
async fn languages(settings: &Settings, session: &EngineSession, report: &mut Report) {
    let languages = match settings.enabled() {
        Ok(languages) => languages,
        Err(error) => {
            return report
                .add(Check::new("languages", "some", error.to_string()).fail_unless(false, "fix the configuration"));
        }
    };
    for language in languages {
        let check = |seen: String| Check::new(format!("language {}", language.name), "its health program runs", seen);
        let image = session.podman.image_id(&language.image).await;
        report.add(match image {
            Ok(Some(image)) => {
                let checked = Checks::default().check(&*session.engine, &language, &image).await;
                match checked.unwrap_or_else(|error| Some(error.to_string())) {
                    None => check("runs".into()),
                    Some(why) => {
                        check(why).fail_unless(false, format!("podman pull {}, or another image", language.image))
                    }
                }
            }
            Ok(None) if names::is_local(&language.image) => {
                let fix = format!(
                    "build it, since names under localhost/ are never pulled: podman build -t {} …",
                    language.image
                );
                check(format!("no image {}", language.image)).fail_unless(false, fix)
            }
            // Only a note: the server pulls it when it starts.
            Ok(None) => check(format!("no image {} yet", language.image))
                .fail_unless(false, format!("podman pull {}", language.image))
                .downgrade_to_note(),
            Err(error) => check(error.to_string()).fail_unless(false, "podman image ls"),
        });
    }
}
