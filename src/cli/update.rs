//! `coderunner update`: updates the images now. Also makes the updater for the server.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Context;

use crate::cli::account;
use crate::cli::session::EngineSession;
use crate::config::Settings;
use crate::host::{instance, print};
use crate::images::{ImageUpdater, LastUpdate, control};
use crate::model::language::Language;
use crate::sandbox::health::Checks;
use crate::scheduler::Image;

/// Updates the images now: through the running server, or in this process if there is none. Returns whether all updates
/// succeeded.
pub(super) async fn update(settings: &Settings) -> anyhow::Result<bool> {
    account::refuse_root()?;
    let socket = instance::control_path(&settings.instance)?;
    if let Some(ok) = control::update(&socket).await? {
        return Ok(ok);
    }
    let session = EngineSession::open(settings)?;
    let reports = updater(&session, settings, settings.enabled()?, |_, _| (), |_| false)?.update().await;
    session.close().await;
    let (text, ok) = control::summary(&reports);
    print::stdout(text)?;
    Ok(ok)
}

/// Makes the updater. It calls `announce` with each new state of an image, and `ails` to ask whether a language has a
/// problem.
pub(super) fn updater(
    session: &EngineSession,
    settings: &Settings,
    languages: Vec<Arc<Language>>,
    announce: impl Fn(&str, Image) + Send + Sync + 'static,
    ails: impl Fn(&str) -> bool + Send + Sync + 'static,
) -> anyhow::Result<ImageUpdater> {
    Ok(ImageUpdater {
        podman: session.podman.clone(),
        engine: Arc::clone(&session.engine),
        instance: session.instance.name.clone(),
        languages,
        settings: settings.update,
        last_update: LastUpdate::new(state_dir()?.join(format!("{}.updated", session.instance.name))),
        checks: Checks::default(),
        announce: Box::new(announce),
        has_problem: Box::new(ails),
        pulled: Mutex::default(),
    })
}

/// The directory in which the time of the last update survives restarts.
fn state_dir() -> anyhow::Result<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state"));
    Ok(state.or_else(home).context("neither HOME nor XDG_STATE_HOME is set")?.join("coderunner"))
}
