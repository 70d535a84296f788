//! `coderunner serve`: starts the server, serves until a signal, and shuts down in order.

mod app;
mod background;
mod host;
mod reload;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use crate::cli::doctor;
use crate::cli::session::EngineSession;
use crate::config::{Overrides, Settings};
use crate::host::signals::{self, Shutdown};
use crate::host::systemd;
use crate::http;
use crate::metrics::Export;
use crate::run::Tasks;
use crate::scheduler::{LanguageStatus, Pool};
use app::AppBuilder;
use background::Background;
use host::LimitCheck;
use reload::Reloader;

/// Serves until a signal or a panic ends it.
pub(super) async fn serve(file: Option<PathBuf>, overrides: Overrides) -> anyhow::Result<()> {
    // Start: take the exclusive resources (sockets, instance name), and check that the host can enforce limits.
    let settings = Settings::load(file.as_deref(), &overrides)?;
    let shutdown = Shutdown::default();
    let (reload, reloads) = mpsc::channel(1);
    let _signals = signals::listen(shutdown.clone(), Some(reload)).context("cannot listen for signals")?;
    let passed = systemd::passed_listener().context("cannot use the socket that systemd passed")?;
    let session = EngineSession::open(&settings)?;
    let listener = match passed {
        Some(listener) => listener,
        None => {
            TcpListener::bind(settings.listen).await.with_context(|| format!("cannot listen on {}", settings.listen))?
        }
    };
    let address = listener.local_addr().context("cannot read the address of the listener")?;
    if settings.require_limits {
        match host::require_limits(&session, &shutdown.stop).await? {
            LimitCheck::MayStart => {}
            LimitCheck::NotEnforced(refusal) => {
                session.close().await;
                return Err(refusal.into());
            }
            LimitCheck::Interrupted => {
                systemd::stopping();
                doctor::close(session).await;
                tracing::info!("stopped");
                return Ok(());
            }
        }
    }

    // Build the application, and start the background tasks.
    let languages = settings.enabled()?;
    let pool = Arc::new(Pool::new(Arc::clone(&session.engine), slots(&settings), settings.queue, &languages));
    let tasks = Tasks::default();
    let metrics = Export::install()?;
    let builder = AppBuilder {
        address,
        pool: Arc::clone(&pool),
        tasks: tasks.clone(),
        metrics: metrics.clone(),
        sockets: Arc::default(),
    };
    let (app, current_app) = watch::channel(builder.build(&settings, &languages)?);
    let (updater_config, updater_config_rx) = watch::channel((languages.clone(), settings.update));
    let stop_background = shutdown.stop.child_token();
    let background =
        Background::start(stop_background, &session, &settings, languages, &pool, updater_config_rx, &metrics)?;
    let reloader = Reloader { file, overrides, builder, app, updater_config };
    background.spawn(|stop| reloader.run(reloads, settings.clone(), stop));
    let (status_pool, status_tasks) = (Arc::clone(&pool), tasks.clone());
    let report = systemd::report(move || status(address, &status_pool, &status_tasks));
    systemd::ready();
    tracing::info!(%address, languages = settings.languages.join(" "), "listening");

    // Serve until the first signal.
    let connections_closed = http::server::serve(listener, current_app, shutdown.stop.clone()).await;

    // Shut down. The background tasks stop with the first signal. Then end, in order: requests, connections, idle
    // sandboxes, what is left of these tasks, the session.
    drop(report);
    systemd::stopping();
    tokio::select! {
        () = tasks.shut_down(settings.shutdown.drain) => {}
        () = shutdown.skip_drain.cancelled() => tasks.shut_down(Duration::ZERO).await,
    }
    connections_closed.await;
    pool.drain();
    background.end().await;
    session.close().await;
    tracing::info!("stopped");
    anyhow::ensure!(!signals::stopped_by_panic(), "ended by a panic; see the log");
    Ok(())
}

/// The status line of `systemctl status`: the address, the running jobs, and the state of each language.
fn status(address: SocketAddr, pool: &Pool, tasks: &Tasks) -> String {
    let lanes = pool.statuses();
    let describe = |(name, status): &(String, LanguageStatus)| match (&status.problem, status.enforced) {
        (Some(problem), _) => format!("{name}: {problem}"),
        (None, None) => format!("{name}: no sandbox yet"),
        (None, Some(_)) => format!("{name}: {} ready", status.ready),
    };
    let lanes: Vec<String> = lanes.iter().map(describe).collect();
    format!("{address}; {} running; {}", tasks.running(), lanes.join("; "))
}

/// The most containers at once.
fn slots(settings: &Settings) -> u32 {
    u32::try_from(settings.containers).unwrap_or(u32::MAX)
}
