//! Builds everything from the settings and owns the order of shutdown.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::cli::doctor;
use crate::config::{Overrides, Settings};
use crate::host::instance::{self, Instance};
use crate::host::print;
use crate::host::process::ProcessError;
use crate::host::signals::{self, Phases};
use crate::host::systemd;
use crate::http::auth::Gate;
use crate::http::middleware::App;
use crate::http::origin::Origins;
use crate::http::routes::Routes;
use crate::http::{self, Api, Budget, Sockets};
use crate::images::control;
use crate::images::{ImageUpdater, LastUpdate, Order, Wanted};
use crate::metrics::{self, Counted, Export, Measured};
use crate::model::language::Language;
use crate::run::cache::MemoCache;
use crate::run::readiness::Readiness;
use crate::run::{Runner, Tasks};
use crate::sandbox::engine::{Chosen, EngineKind};
use crate::sandbox::health::Checks;
use crate::sandbox::podman::Podman;
use crate::sandbox::supervisor::{EngineSettings, Living};
use crate::sandbox::sweep;
use crate::sandbox::{Engine, SandboxError};
use crate::scheduler::{Image, Pool, Status};

/// How long containers may take to go at the end, before what is left is removed by force.
const SUPERVISORS_TIME: Duration = Duration::from_secs(15);

/// How long that may take. Together it has to be more than what hangs may take until it is killed, and with the drain less
/// than systemd waits for the end of a service.
const SWEEP_TIME: Duration = Duration::from_secs(30);

/// How many orders such as `update` may wait until the updater takes them.
const ORDERS: usize = 4;

/// What root calls us by for the packaged account, while its server runs.
pub const AS_ACCOUNT: &str = "setpriv --reuid coderunner --regid coderunner --init-groups env -C / \
     HOME=/var/lib/coderunner XDG_RUNTIME_DIR=/run/coderunner coderunner";

/// What verbs that make sandboxes share: a name of their own, podman, an engine, and who cleans up.
pub struct Workshop {
    /// The name and its directory.
    pub instance: Instance,
    /// The user's podman.
    pub podman: Podman,
    /// Makes sandboxes.
    pub engine: Arc<dyn Engine>,
    /// Whether its containers can be limited without podman's help.
    delegated: bool,
    supervisors: TaskTracker,
    living: Living,
}

impl Workshop {
    /// Takes the instance's name and clears what an earlier one left behind.
    pub fn open(settings: &Settings) -> anyhow::Result<Workshop> {
        refuse_root()?;
        let instance = Instance::take(&settings.instance)?;
        let jobs = instance.jobs();
        sweep::empty(&jobs).with_context(|| format!("cannot make {}", jobs.display()))?;
        let executable = std::env::current_exe().context("cannot find the path of this executable")?;
        instance::mountable(&executable)?;
        let podman = Podman::new(&settings.podman);
        let (supervisors, living) = (TaskTracker::new(), Living::default());
        let engine_settings = EngineSettings {
            instance: instance.name.clone(),
            jobs,
            executable,
            require_limits: settings.require_limits,
            supervisors: supervisors.clone(),
            living: living.clone(),
            observer: Arc::new(Counted),
        };
        let engine = Chosen::new(settings.engine, podman.clone(), engine_settings);
        let delegated = engine.limits_by_itself();
        let engine = Arc::new(Measured(Arc::new(engine)));
        Ok(Workshop { instance, podman, engine, delegated, supervisors, living })
    }

    /// Waits until all containers have gone, then removes by label whatever has not.
    pub async fn close(self) {
        let going = async {
            self.engine.release(None).await;
            self.supervisors.close();
            self.supervisors.wait().await;
        };
        if tokio::time::timeout(SUPERVISORS_TIME, going).await.is_err() {
            tracing::warn!(containers = self.supervisors.len(), "containers did not exit by themselves");
        }
        let living = Living::default();
        let sweep = sweep::sweep(&self.podman, &self.instance.name, &living);
        let late = |_| Err(ProcessError::TimedOut { command: "the sweep".into(), deadline: SWEEP_TIME });
        match tokio::time::timeout(SWEEP_TIME, sweep).await.unwrap_or_else(late) {
            Ok(0) => {}
            Ok(removed) => tracing::warn!(removed, "containers had to be removed by force"),
            Err(error) => tracing::error!(%error, "containers may be left; the next start removes them"),
        }
    }
}

/// Serves until a signal ends it.
pub async fn serve(file: Option<PathBuf>, overrides: Overrides) -> anyhow::Result<()> {
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
        let trying = async {
            // What podman says of the host need not be what a sandbox gets.
            match report_host(&workshop.podman, workshop.delegated, true).await? {
                true => anyhow::Ok(doctor::require_limits(&workshop).await),
                false => Ok(Ok(())),
            }
        };
        match phases.stop.run_until_cancelled(trying).await.transpose()? {
            None => {
                systemd::stopping();
                doctor::close(workshop).await;
                tracing::info!("stopped");
                return Ok(());
            }
            Some(Err(refusal @ SandboxError::Unlimited(_))) => {
                workshop.close().await;
                return Err(refusal.into());
            }
            Some(Err(error)) => {
                tracing::error!(%error, "cannot check the limits at start; each sandbox is checked when it is made")
            }
            Some(Ok(())) => {}
        }
    }

    let languages = settings.enabled()?;
    let pool = Arc::new(Pool::new(Arc::clone(&workshop.engine), slots(&settings), settings.queue, &languages));
    let tasks = Tasks::default();
    let metrics = Export::install()?;
    let (app, current_app) = watch::channel(app(&settings, address, &languages, &pool, &tasks, &metrics)?);

    let (orders, taken) = mpsc::channel::<Order>(ORDERS);
    let (wanted, wants) = watch::channel((languages.clone(), settings.update));
    let (announced, asked) = (Arc::clone(&pool), Arc::clone(&pool));
    let podman = workshop.podman.clone();
    let announce = move |language: &str, image| {
        if let Image::Ready(id) = &image
            && announced.image(language).ok().as_ref() != Some(id)
        {
            tokio::spawn(note_age(podman.clone(), language.to_owned(), id.clone()));
        }
        announced.set_image(language, image);
    };
    let ails = move |language: &str| asked.status(language).problem.is_some();
    let updater = updater(&workshop, &settings, languages, announce, ails)?;
    let stop_background = phases.stop.child_token();
    let background = TaskTracker::new();
    if !settings.require_limits {
        // Beside all else: clients are told of a podman that hangs.
        let (podman, delegated, stop) = (workshop.podman.clone(), workshop.delegated, stop_background.clone());
        background.spawn(async move {
            tokio::select! {
                _ = report_host(&podman, delegated, false) => {}
                () = stop.cancelled() => {}
            }
        });
    }
    background.spawn(updater.run(taken, wants, stop_background.clone()));
    background.spawn(sweep::run(
        workshop.podman.clone(),
        workshop.instance.name.clone(),
        workshop.living.clone(),
        Arc::new(Counted),
        stop_background.clone(),
    ));
    background.spawn(metrics.clone().keep_up(stop_background.clone()));
    background.spawn(control::serve(control_socket(&workshop.instance)?, orders, stop_background.clone()));
    let reloader =
        Reloader { file, overrides, address, app, pool: Arc::clone(&pool), tasks: tasks.clone(), wanted, metrics };
    background.spawn(reloader.run(reloads, settings.clone(), stop_background));
    let (reported, running) = (Arc::clone(&pool), tasks.clone());
    let _report = systemd::report(move || {
        let lanes = reported.statuses();
        let lane = |(name, status): &(String, Status)| match (&status.problem, status.enforced) {
            (Some(problem), _) => format!("{name}: {problem}"),
            (None, None) => format!("{name}: no sandbox yet"),
            (None, Some(_)) => format!("{name}: {} ready", status.ready),
        };
        let lanes: Vec<String> = lanes.iter().map(lane).collect();
        format!("{address}; {} running; {}", running.running(), lanes.join("; "))
    });
    systemd::ready();
    tracing::info!(%address, languages = settings.languages.join(" "), "listening");

    let closing = http::server::serve(listener, current_app, phases.stop.clone()).await;
    systemd::stopping();
    tokio::select! {
        () = tasks.shut_down(settings.shutdown.drain) => {}
        () = phases.cut.cancelled() => tasks.shut_down(Duration::ZERO).await,
    }
    closing.await;
    pool.drain();
    background.close();
    if tokio::time::timeout(SUPERVISORS_TIME, background.wait()).await.is_err() {
        tracing::warn!("background tasks did not end in time");
    }
    workshop.close().await;
    tracing::info!("stopped");
    anyhow::ensure!(!signals::by_panic(), "ended by a panic, of which the log tells");
    Ok(())
}

/// Applies a new configuration whenever SIGHUP asks for it.
struct Reloader {
    file: Option<PathBuf>,
    overrides: Overrides,
    /// Where it listens, whoever opened that.
    address: SocketAddr,
    app: watch::Sender<Arc<App>>,
    pool: Arc<Pool>,
    tasks: Tasks,
    wanted: watch::Sender<Wanted>,
    metrics: Export,
}

impl Reloader {
    async fn run(
        self,
        mut reloads: mpsc::Receiver<()>,
        mut settings: Settings,
        stop: tokio_util::sync::CancellationToken,
    ) {
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
                    Err(error) => tracing::error!(error = crate::cli::told(&error), "configuration not changed"),
                },
                Err(error) => tracing::error!(error = crate::cli::told(&error), "configuration not changed"),
            }
            systemd::ready();
        }
    }

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
        let app = app(new, self.address, &languages, &self.pool, &self.tasks, &self.metrics)?;
        self.pool.reconfigure(slots(new), new.queue, &languages);
        self.app.send_replace(app);
        self.wanted.send_replace((languages, new.update));
        Ok(())
    }
}

fn app(
    settings: &Settings,
    address: SocketAddr,
    languages: &[Arc<Language>],
    pool: &Arc<Pool>,
    tasks: &Tasks,
    metrics: &Export,
) -> anyhow::Result<Arc<App>> {
    let memo = MemoCache::new(settings.cache).context("cannot make the cache")?;
    let runner = Runner::new(languages.to_vec(), memo, Arc::clone(pool), tasks.clone(), settings.batch.build.as_u64());
    let bytes = |size: bytesize::ByteSize| usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
    let api = Api {
        runner: Arc::new(runner),
        readiness: Readiness::new(settings.ready),
        metrics: metrics.clone(),
        sockets: Arc::new(Sockets::default()),
        answers: Arc::new(Budget::new(bytes(settings.answer_memory))),
        bodies: Arc::new(Budget::new(bytes(settings.answer_memory))),
        body_limit: bytes(settings.body_limit),
        source_limit: bytes(settings.source_limit),
        playground: settings.playground,
    };
    let origins = Origins::new(&settings.allowed_hosts, &settings.cors_origins, address);
    Ok(Arc::new(App { routes: Routes::new(api), gate: Gate::new(&settings.access), origins }))
}

/// Tells how old an image is; that is of no use to anything but a metric.
async fn note_age(podman: Podman, language: String, image: String) {
    match podman.image_created(&image).await {
        Ok(created) => metrics::image_created(&language, created),
        Err(error) => tracing::debug!(language, %error, "cannot tell the age of an image"),
    }
}

fn slots(settings: &Settings) -> u32 {
    u32::try_from(settings.containers).unwrap_or(u32::MAX)
}

fn updater(
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

/// Updates the images now: through the server where one runs, else by itself. Whether all went well.
pub async fn update(settings: &Settings) -> anyhow::Result<bool> {
    refuse_root()?;
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

/// Removes what a server that was killed has left behind; refuses while one of the same name runs.
pub async fn sweep(mut settings: Settings) -> anyhow::Result<()> {
    // It makes nothing: what the other engine would take first is not needed.
    settings.engine = EngineKind::Podman;
    Workshop::open(&settings)?.close().await;
    Ok(())
}

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

/// Where the time of the last update is kept over restarts.
fn state_dir() -> anyhow::Result<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state"));
    Ok(state.or_else(home).context("neither HOME nor XDG_STATE_HOME is set")?.join("coderunner"))
}

/// Containers of root's would be root's: a wall less.
pub fn refuse_root() -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        bail!(
            "coderunner does not run as root: its containers are to belong to an ordinary user. As root run \
             `systemctl start coderunner`, and while that runs `{AS_ACCOUNT} …`"
        );
    }
    Ok(())
}

/// Says in the log what this host is, and refuses one that cannot limit where it must. Whether podman works.
async fn report_host(podman: &Podman, delegated: bool, require_limits: bool) -> anyhow::Result<bool> {
    let info = match podman.info().await {
        Ok(info) => info,
        Err(error) => {
            // It may come back: until then requests are refused with a reason.
            tracing::error!(%error, "podman does not work on this host");
            return Ok(false);
        }
    };
    // Whatever is said here, each sandbox tells what limits it sees.
    let missing = if delegated { Vec::new() } else { info.missing_controllers() };
    tracing::info!(podman = info.version, runtime = info.runtime, storage = info.driver, cgroups = info.cgroup_version);
    if !missing.is_empty() && require_limits {
        bail!(
            "this host cannot limit {} of containers (cgroup {}), and require_limits is set. `coderunner doctor` says \
             how to mend it",
            missing.join(", "),
            info.cgroup_version
        );
    }
    Ok(true)
}
