//! Reloads the configuration.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::cli::serve::app::AppBuilder;
use crate::cli::serve::slots;
use crate::config::{Overrides, Settings};
use crate::host::systemd;
use crate::http::middleware::App;
use crate::images::UpdaterConfig;

/// Reloads and applies the configuration at each SIGHUP.
pub(super) struct Reloader {
    pub(super) file: Option<PathBuf>,
    pub(super) overrides: Overrides,
    pub(super) builder: AppBuilder,
    pub(super) app: watch::Sender<Arc<App>>,
    pub(super) updater_config: watch::Sender<UpdaterConfig>,
}

impl Reloader {
    /// Applies the configuration at each message of `reloads`, until `stop`. `settings` are those in effect.
    pub(super) async fn run(self, mut reloads: mpsc::Receiver<()>, mut settings: Settings, stop: CancellationToken) {
        loop {
            tokio::select! {
                Some(()) = reloads.recv() => {}
                () = stop.cancelled() => return,
            }
            systemd::reloading();
            match Settings::load(self.file.as_deref(), &self.overrides).map_err(anyhow::Error::from) {
                Ok(new) => match self.apply(&settings, &new) {
                    Ok(()) => {
                        tracing::info!(languages = new.languages.join(" "), "configuration reloaded");
                        settings = new;
                    }
                    Err(error) => tracing::error!(error = crate::cli::error_text(&error), "configuration not changed"),
                },
                Err(error) => tracing::error!(error = crate::cli::error_text(&error), "configuration not changed"),
            }
            systemd::ready();
        }
    }

    /// Replaces the old settings by the new ones, or returns an error and changes nothing.
    fn apply(&self, old: &Settings, new: &Settings) -> anyhow::Result<()> {
        let fixed = |s: &Settings| {
            (s.listen, s.instance.clone(), s.engine, s.podman.clone(), s.require_limits, s.shutdown.drain)
        };
        if fixed(old) != fixed(new) {
            tracing::warn!(
                "listen, instance, engine, podman, require_limits and shutdown.drain change with a restart only"
            );
        }
        let languages = new.enabled()?;
        let app = self.builder.build(new, &languages)?;
        self.builder.pool.reconfigure(slots(new), new.queue, &languages);
        self.app.send_replace(app);
        self.updater_config.send_replace((languages, new.update));
        Ok(())
    }
}
