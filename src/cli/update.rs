//! `coderunner update`: updates the images now. Also the updater itself, which the server runs too.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::Context;

use crate::cli::account;
use crate::cli::workshop::Workshop;
use crate::config::Settings;
use crate::host::{instance, print};
use crate::images::{ImageUpdater, LastUpdate, control};
use crate::model::language::Language;
use crate::sandbox::health::Checks;
use crate::scheduler::Image;

/// Updates the images now: through the server where one runs, else by itself. Returns whether all went well.
pub(super) async fn update(settings: &Settings) -> anyhow::Result<bool> {
    account::refuse_root()?;
    let socket = instance::control_path(&settings.instance)?;
    if let Some(ok) = control::update(&socket).await? {
        return Ok(ok);
    }
    let workshop = Workshop::open(settings)?;
    let reports = updater(&workshop, settings, settings.enabled()?, |_, _| (), |_| false)?.update().await;
    workshop.close().await;
    let (text, ok) = control::summary(&reports);
    print::stdout(text)?;
    Ok(ok)
}

/// Makes the updater. It calls `announce` with the state of an image, and `ails` to ask whether a language has a problem.
pub(super) fn updater(
    workshop: &Workshop,
    settings: &Settings,
    languages: Vec<Arc<Language>>,
    announce: impl Fn(&str, Image) + Send + Sync + 'static,
    ails: impl Fn(&str) -> bool + Send + Sync + 'static,
) -> anyhow::Result<ImageUpdater> {
    Ok(ImageUpdater {
        podman: workshop.podman.clone(),
        engine: Arc::clone(&workshop.engine),
        instance: workshop.instance.name.clone(),
        languages,
        settings: settings.update,
        last_update: LastUpdate::new(state_dir()?.join(format!("{}.updated", workshop.instance.name))),
        checks: Checks::default(),
        announce: Box::new(announce),
        ails: Box::new(ails),
        pulled: Mutex::default(),
    })
}

/// The directory that keeps the time of the last update over restarts.
fn state_dir() -> anyhow::Result<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state"));
    Ok(state.or_else(home).context("neither HOME nor XDG_STATE_HOME is set")?.join("coderunner"))
}
