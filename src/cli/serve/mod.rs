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
use crate::cli::workshop::Workshop;
use crate::config::{Overrides, Settings};
use crate::host::signals::{self, Phases};
use crate::host::systemd;
use crate::http;
use crate::metrics::Export;
use crate::run::Tasks;
use crate::scheduler::{Pool, Status};
use app::AppBuilder;
use background::Background;
use host::Limits;
use reload::Reloader;

/// Serves until a signal ends it.
pub(super) async fn serve(file: Option<PathBuf>, overrides: Overrides) -> anyhow::Result<()> {
    // Start: take what there can be only one of, and make sure that the host can limit.
    let settings = Settings::load(file.as_deref(), &overrides)?;
    let phases = Phases::default();
    let (reload, reloads) = mpsc::channel(1);
    let _signals = signals::listen(phases.clone(), Some(reload)).context("cannot listen for signals")?;
    let passed = systemd::passed_listener().context("cannot use the socket that systemd passed")?;
    let workshop = Workshop::open(&settings)?;
    let listener = match passed {
        Some(listener) => listener,
        None => {
            TcpListener::bind(settings.listen).await.with_context(|| format!("cannot listen on {}", settings.listen))?
        }
    };
    let address = listener.local_addr().context("cannot tell the address")?;
    if settings.require_limits {
        match host::require_limits(&workshop, &phases.stop).await? {
            Limits::NotRefused => {}
            Limits::Unlimited(refusal) => {
                workshop.close().await;
                return Err(refusal.into());
            }
            Limits::Interrupted => {
                systemd::stopping();
                doctor::close(workshop).await;
                tracing::info!("stopped");
                return Ok(());
            }
        }
    }

    // Build what answers requests, and what runs beside it.
    let languages = settings.enabled()?;
    let pool = Arc::new(Pool::new(Arc::clone(&workshop.engine), slots(&settings), settings.queue, &languages));
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
    let (wanted, wants) = watch::channel((languages.clone(), settings.update));
    let stop_background = phases.stop.child_token();
    let background = Background::start(stop_background, &workshop, &settings, languages, &pool, wants, &metrics)?;
    let reloader = Reloader { file, overrides, builder, app, wanted };
    background.spawn(|stop| reloader.run(reloads, settings.clone(), stop));
    let (reported, running) = (Arc::clone(&pool), tasks.clone());
    let _report = systemd::report(move || status(address, &reported, &running));
    systemd::ready();
    tracing::info!(%address, languages = settings.languages.join(" "), "listening");

    // Serve until the first signal.
    let closing = http::server::serve(listener, current_app, phases.stop.clone()).await;

    // Shut down: let the requests end, then the connections, the sandboxes that wait, the rest.
    systemd::stopping();
    tokio::select! {
        () = tasks.shut_down(settings.shutdown.drain) => {}
        () = phases.cut.cancelled() => tasks.shut_down(Duration::ZERO).await,
    }
    closing.await;
    pool.drain();
    background.end().await;
    workshop.close().await;
    tracing::info!("stopped");
    anyhow::ensure!(!signals::by_panic(), "ended by a panic, of which the log tells");
    Ok(())
}

/// What `systemctl status` shows: a word on each language.
fn status(address: SocketAddr, pool: &Pool, tasks: &Tasks) -> String {
    let lanes = pool.statuses();
    let lane = |(name, status): &(String, Status)| match (&status.problem, status.enforced) {
        (Some(problem), _) => format!("{name}: {problem}"),
        (None, None) => format!("{name}: no sandbox yet"),
        (None, Some(_)) => format!("{name}: {} ready", status.ready),
    };
    let lanes: Vec<String> = lanes.iter().map(lane).collect();
    format!("{address}; {} running; {}", tasks.running(), lanes.join("; "))
}

/// How many containers there may be at once.
fn slots(settings: &Settings) -> u32 {
    u32::try_from(settings.containers).unwrap_or(u32::MAX)
}
