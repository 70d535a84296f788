//! The background tasks of the server: image updates, sweeps, metrics, the control socket.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cli::serve::host;
use crate::cli::session::EngineSession;
use crate::cli::update::updater;
use crate::config::Settings;
use crate::host::instance::Instance;
use crate::images::{UpdateRequest, UpdaterConfig, control};
use crate::metrics::{self, Counted, Export};
use crate::model::language::Language;
use crate::sandbox::podman::Podman;
use crate::sandbox::sweep;
use crate::scheduler::{Image, Pool};

/// How many requests from the control socket may wait for the updater.
const MAX_ORDERS: usize = 4;

/// How long the server waits at shutdown for the tasks, which were cancelled before the drain.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Tasks that run until the server stops.
pub(super) struct Background {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Background {
    /// Starts the tasks, to run until `stop`.
    pub(super) fn start(
        stop: CancellationToken,
        session: &EngineSession,
        settings: &Settings,
        languages: Vec<Arc<Language>>,
        pool: &Arc<Pool>,
        wants: watch::Receiver<UpdaterConfig>,
        metrics: &Export,
    ) -> anyhow::Result<Background> {
        let (orders, taken) = mpsc::channel::<UpdateRequest>(MAX_ORDERS);
        let (announced, asked) = (Arc::clone(pool), Arc::clone(pool));
        let podman = session.podman.clone();
        let announce = move |language: &str, image| {
            if let Image::Ready(id) = &image
                && announced.image(language).ok().as_ref() != Some(id)
            {
                tokio::spawn(record_age(podman.clone(), language.to_owned(), id.clone()));
            }
            announced.set_image(language, image);
        };
        let ails = move |language: &str| asked.status(language).problem.is_some();
        let updater = updater(session, settings, languages, announce, ails)?;
        let background = Background { tasks: TaskTracker::new(), stop };
        if !settings.require_limits {
            // In the background, so that the server answers clients even if podman hangs.
            let (podman, delegated) = (session.podman.clone(), session.delegated);
            background.spawn(|stop| async move {
                tokio::select! {
                    _ = host::check_podman(&podman, delegated, false) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
        background.spawn(|stop| updater.run(taken, wants, stop));
        background.spawn(|stop| {
            sweep::run(
                session.podman.clone(),
                session.instance.name.clone(),
                session.supervised.clone(),
                Arc::new(Counted),
                stop,
            )
        });
        background.spawn(|stop| metrics.clone().keep_up(stop));
        let control_socket = control_socket(&session.instance)?;
        background.spawn(|stop| control::serve(control_socket, orders, stop));
        Ok(background)
    }

    /// Starts a task that runs until its token is cancelled.
    pub(super) fn spawn<T: Future<Output = ()> + Send + 'static>(&self, task: impl FnOnce(CancellationToken) -> T) {
        self.tasks.spawn(task(self.stop.clone()));
    }

    /// Waits until all tasks have ended, at most for [`END_TIMEOUT`].
    pub(super) async fn end(self) {
        self.tasks.close();
        if tokio::time::timeout(END_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!("background tasks did not end in time");
        }
    }
}

/// Records when an image was created, for a metric. Only logs a failure.
async fn record_age(podman: Podman, language: String, image: String) {
    match podman.image_created(&image).await {
        Ok(created) => metrics::image_created(&language, created),
        Err(error) => tracing::debug!(language, %error, "cannot determine the age of an image"),
    }
}

/// Listens on the socket by which other verbs reach this server.
fn control_socket(instance: &Instance) -> anyhow::Result<UnixListener> {
    let path = instance.control();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
    .and_then(|()| {
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    })
    .with_context(|| format!("cannot listen on {}", path.display()))
}
