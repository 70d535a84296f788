//! Images: pulled where missing, looked for weekly, checked before they are used, the old one deleted.
//!
//! The image in use has a name of our own besides its public one. So a pull never changes what sandboxes are
//! made from: only a new image that passed its health program takes that name, and whatever happens in
//! between, also a kill, the old one stays in use.

pub mod control;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::host::process::ProcessError;
use crate::metrics;
use crate::model::language::Language;
use crate::sandbox::podman::Podman;
use crate::sandbox::{Engine, SandboxError, health};
use crate::scheduler::backoff::{Failed, Failures};
use crate::scheduler::pool::Image;
use serde::{Deserialize, Serialize};

/// `[update]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateSettings {
    /// Time between two looks for newer images.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// How long one pull may take.
    #[serde(with = "humantime_serde")]
    pub pull_timeout: Duration,
}

/// Our names of the images in use, one per instance and public name.
const CURRENT: &str = "localhost/coderunner-current";
/// Our names of images that are to be deleted once their last container is gone.
const OLD: &str = "localhost/coderunner-old";

/// How long sandboxes may fail before it is looked whether their image is there still: somebody may have deleted it. Twice
/// as long before each further look, up to a bound: most likely something else is wrong.
const AILING_FIRST: Duration = Duration::from_secs(5);
const AILING_LONGEST: Duration = Duration::from_secs(30);

/// How many times deleting a replaced image is tried while jobs still run on it, and the first pause, doubled each time:
/// half a minute together.
const DELETE_TRIES: u32 = 6;
const DELETE_PAUSE: Duration = Duration::from_secs(1);

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// podman failed.
    #[error(transparent)]
    Podman(#[from] ProcessError),
    /// No such image at the registry, registry down, disk full.
    #[error("it cannot be pulled: {0}")]
    Pull(ProcessError),
    /// It is named as local, and is not there.
    #[error("there is no image {0}; a name under localhost/ is never pulled: build it")]
    NoLocal(String),
    /// No sandbox came up from it, or it failed under the program.
    #[error("its health program could not be run: {0}")]
    Sandbox(#[from] SandboxError),
    /// The health program did not print what it must.
    #[error("the health program of {language} fails: {failure}")]
    Unhealthy {
        /// Whose program.
        language: String,
        /// How.
        failure: String,
    },
}

impl ImageError {
    /// In words for clients; the log has the details.
    fn reason(&self) -> &'static str {
        match self {
            ImageError::Podman(_) => "podman fails",
            ImageError::Pull(_) => "its image cannot be pulled",
            ImageError::NoLocal(_) => "its image is not installed",
            ImageError::Sandbox(_) | ImageError::Unhealthy { .. } => "its image failed its health check",
        }
    }
}

/// What a look for a newer image came to.
#[derive(Debug)]
pub enum Updated {
    /// The one in use is the newest.
    Unchanged,
    /// A new one is in use.
    Replaced {
        /// Id of the one before; `None` where there was none.
        old: Option<String>,
        /// Id of the new one.
        new: String,
    },
    /// It failed; what was in use stays so.
    Failed(ImageError),
}

impl Updated {
    fn word(&self) -> &'static str {
        match self {
            Updated::Unchanged => "unchanged",
            Updated::Replaced { .. } => "replaced",
            Updated::Failed(_) => "failed",
        }
    }
}

/// Name of an image and what its update came to.
pub type Report = (String, Updated);

/// A report as a line for people.
pub fn line((name, updated): &Report) -> String {
    let short = |id: &str| id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
    match updated {
        Updated::Unchanged => format!("{name}: the newest is in use"),
        Updated::Replaced { old: None, new } => format!("{name}: {} is in use", short(new)),
        Updated::Replaced { old: Some(old), new } => format!("{name}: {} replaces {}", short(new), short(old)),
        Updated::Failed(error) => format!("{name}: failed, nothing changed: {error}"),
    }
}

fn trying_again(error: &ImageError) -> String {
    format!("{}; trying again", error.reason())
}

/// Whether no image failed.
pub fn all_well(reports: &[Report]) -> bool {
    reports.iter().all(|(_, updated)| !matches!(updated, Updated::Failed(_)))
}

/// Asks for a look for newer images now; the reports go back.
pub type Order = oneshot::Sender<Vec<Report>>;

/// What is served, and how often and how long images are looked for.
pub type Wanted = (Vec<Arc<Language>>, UpdateSettings);

/// Is told the image of a language.
pub type Announce = Box<dyn Fn(&str, Image) + Send + Sync>;

/// Keeps the images of the languages up to date.
pub struct ImageUpdater {
    /// The user's podman.
    pub podman: Podman,
    /// Makes the sandboxes of health programs.
    pub engine: Arc<dyn Engine>,
    /// Whose images these are.
    pub instance: String,
    /// What is served.
    pub languages: Vec<Arc<Language>>,
    /// How often, how long.
    pub settings: UpdateSettings,
    /// A file whose time is that of the last update.
    pub stamp: PathBuf,
    /// Where health programs run.
    pub checks: health::Checks,
    /// Is told the image of a language whenever it changes.
    pub announce: Announce,
    /// Whether sandboxes of a language cannot be made.
    pub ails: Box<dyn Fn(&str) -> bool + Send + Sync>,
    /// What it remembers meanwhile.
    pub memory: Mutex<Memory>,
}

/// What an updater remembers.
#[derive(Debug, Default)]
pub struct Memory {
    /// Names that were pulled when they were last tried.
    pulled: BTreeSet<String>,
    /// When all were last looked for: the stamp may be one that cannot be written.
    looked: Option<SystemTime>,
}

/// An image's name, and the languages that are made from it.
type Named = (String, Vec<Arc<Language>>);

impl ImageUpdater {
    /// Keeps the images up to date, whatever is wanted at the time.
    pub async fn run(
        mut self,
        mut orders: mpsc::Receiver<Order>,
        mut wanted: watch::Receiver<Wanted>,
        stop: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = self.keep(&mut orders) => return,
                // At once: a pull for what was wanted before may take long. What is half done is done by the next look.
                Ok(()) = wanted.changed() => (self.languages, self.settings) = wanted.borrow_and_update().clone(),
                () = stop.cancelled() => return,
            }
        }
    }

    /// Finds or pulls all images, then looks for newer ones whenever it is time or somebody asks.
    async fn keep(&self, orders: &mut mpsc::Receiver<Order>) {
        let mut failures = Failures::default();
        let mut ailing_pause = AILING_FIRST;
        self.find(self.by_image(), &mut failures).await;
        loop {
            let retry = failures.next();
            tokio::select! {
                order = orders.recv() => {
                    let Some(reply) = order else { return };
                    let reports = self.look_for_all(&mut failures).await;
                    // Before the wait for jobs on replaced images. Who asked may have left.
                    let _ = reply.send(reports);
                    self.delete_old(DELETE_TRIES).await;
                }
                () = tokio::time::sleep(self.until_due()) => {
                    self.look_for_all(&mut failures).await;
                    self.delete_old(DELETE_TRIES).await;
                }
                () = tokio::time::sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() => {
                    self.try_again(&mut failures).await;
                }
                ailing = self.ailing(&failures, &mut ailing_pause) => self.find(ailing, &mut failures).await,
            }
        }
    }

    /// Waits until images whose languages have no sandboxes may have gone. One that is missing is looked for anyway.
    async fn ailing(&self, failures: &Failures, pause: &mut Duration) -> Vec<Named> {
        loop {
            tokio::time::sleep(*pause).await;
            let ails = |(name, languages): &Named| {
                !failures.is_missing(name) && languages.iter().any(|language| (self.ails)(&language.name))
            };
            let ailing: Vec<Named> = self.by_image().into_iter().filter(ails).collect();
            if !ailing.is_empty() {
                *pause = (*pause * 2).min(AILING_LONGEST);
                return ailing;
            }
            *pause = AILING_FIRST;
        }
    }

    /// Tries again what failed and is due.
    async fn try_again(&self, failures: &mut Failures) {
        let now = Instant::now();
        let due = self.by_image().into_iter().filter_map(|named| Some((failures.due(&named.0, now)?, named)));
        let (newer, any): (Vec<_>, Vec<_>) = due.partition(|(pull, _)| *pull);
        let images = |those: Vec<(bool, Named)>| those.into_iter().map(|(_, named)| named).collect::<Vec<_>>();
        self.find(images(any), failures).await;
        if !newer.is_empty() {
            self.look(images(newer), failures).await;
            self.delete_old(DELETE_TRIES).await;
        }
    }

    /// Looks for a newer image of each name, uses those that pass their health programs, deletes the others.
    pub async fn update(&self) -> Vec<Report> {
        let reports = self.look_for_all(&mut Failures::default()).await;
        self.delete_old(DELETE_TRIES).await;
        reports
    }

    async fn look_for_all(&self, failures: &mut Failures) -> Vec<Report> {
        let reports = self.look(self.by_image(), failures).await;
        self.note_update();
        reports
    }

    async fn look(&self, images: Vec<Named>, failures: &mut Failures) -> Vec<Report> {
        self.delete_old(1).await;
        let mut reports = Vec::new();
        for (name, languages) in images {
            let current = self.current(&name).await;
            let kept = !matches!(current, Ok(None));
            let updated = match current {
                Ok(current) => {
                    if let Some(id) = &current {
                        self.announce_all(&languages, &Image::Ready(id.clone()));
                    }
                    let replaced = self.replace(&name, &languages, current.as_deref()).await;
                    if let (Err(error), None) = (&replaced, &current) {
                        self.announce_failure(&languages, error);
                    }
                    replaced.unwrap_or_else(Updated::Failed)
                }
                Err(error) => Updated::Failed(error.into()),
            };
            let report = (name, updated);
            metrics::image_update(report.1.word());
            match &report.1 {
                Updated::Failed(error) => {
                    tracing::warn!("image {}", line(&report));
                    let how = Failed { newer: true, kept, ..self.how(&report.0, error) };
                    failures.note(&report.0, how, Instant::now());
                }
                _ => {
                    tracing::info!("image {}", line(&report));
                    failures.forget(&report.0);
                }
            }
            reports.push(report);
        }
        reports
    }

    /// Announces those of these images that are here, then pulls the missing ones.
    async fn find(&self, images: Vec<Named>, failures: &mut Failures) {
        let mut missing = Vec::new();
        for (name, languages) in images {
            match self.current(&name).await {
                Ok(Some(id)) => {
                    self.announce_all(&languages, &Image::Ready(id));
                    failures.found(&name);
                }
                Ok(None) => missing.push((name, languages)),
                Err(error) => {
                    tracing::error!(image = name, %error, "cannot look for an image");
                    self.announce_all(&languages, &Image::Unknown(trying_again(&error.into())));
                    failures.note(&name, Failed::default(), Instant::now());
                }
            }
        }
        // A slow pull keeps no other language waiting.
        let fetched = join_all(missing.iter().map(|(name, languages)| async move {
            let fetched = self.fetch(name, languages).await;
            if let Err(error) = &fetched {
                tracing::error!(image = name, %error, "cannot use an image");
                self.announce_failure(languages, error);
            }
            (name, fetched)
        }))
        .await;
        for (name, fetched) in fetched {
            match fetched {
                Ok(()) => failures.forget(name),
                Err(error) => failures.note(name, self.how(name, &error), Instant::now()),
            }
        }
    }

    /// How an image failed.
    fn how(&self, name: &str, error: &ImageError) -> Failed {
        let unfit = matches!(error, ImageError::Sandbox(_) | ImageError::Unhealthy { .. });
        Failed { unfit, pulled: self.memory().pulled.remove(name), ..Failed::default() }
    }

    /// The first image of a name: the one that is here, or a pulled one.
    async fn fetch(&self, name: &str, languages: &[Arc<Language>]) -> Result<(), ImageError> {
        self.memory().pulled.remove(name);
        let id = match self.podman.image_id(name).await? {
            Some(id) => id,
            None => {
                self.announce_all(languages, &Image::Missing("its image is being pulled".into()));
                let id = self.pull(name).await?;
                // What is kept of one that was deleted has the files of that.
                self.engine.release(Some(&id)).await;
                id
            }
        };
        self.announce_all(languages, &Image::Missing("its image is being checked".into()));
        self.check(&id, languages).await?;
        self.podman.tag(&id, &self.current_name(name)).await?;
        tracing::info!(image = name, id, "image in use");
        self.announce_all(languages, &Image::Ready(id));
        Ok(())
    }

    async fn replace(
        &self,
        name: &str,
        languages: &[Arc<Language>],
        current: Option<&str>,
    ) -> Result<Updated, ImageError> {
        self.memory().pulled.remove(name);
        let public = self.podman.image_id(name).await?;
        let new = match is_local(name) {
            true => public.clone().ok_or_else(|| ImageError::NoLocal(name.into()))?,
            false => match self.pull(name).await {
                // No registry, and nothing in use: what is here is better than nothing.
                Err(error) if current.is_none() => public.clone().ok_or(error)?,
                pulled => pulled?,
            },
        };
        if let Some(unused) = public.filter(|id| *id != new && Some(id.as_str()) != current) {
            // One that was never used, as after a kill during its check.
            self.podman.tag(&unused, &self.old_name(&unused)).await?;
        }
        if Some(new.as_str()) == current {
            return Ok(Updated::Unchanged);
        }
        if let Err(error) = self.check(&new, languages).await {
            if let (Some(current), false) = (current, is_local(name)) {
                // The broken one away, and the public name back to what is in use.
                self.podman.tag(&new, &self.old_name(&new)).await?;
                self.podman.tag(current, name).await?;
            }
            return Err(error);
        }
        if let Some(old) = current {
            self.podman.tag(old, &self.old_name(old)).await?;
        }
        self.podman.tag(&new, &self.current_name(name)).await?;
        self.announce_all(languages, &Image::Ready(new.clone()));
        Ok(Updated::Replaced { old: current.map(str::to_owned), new })
    }

    /// Checks an image; one that fails is not used any more.
    async fn check(&self, id: &str, languages: &[Arc<Language>]) -> Result<(), ImageError> {
        let checked = self.try_out(id, languages).await;
        if checked.is_err() {
            self.engine.release(Some(id)).await;
        }
        checked
    }

    /// Runs the health program of each language in a sandbox of the image.
    async fn try_out(&self, id: &str, languages: &[Arc<Language>]) -> Result<(), ImageError> {
        for language in languages {
            if let Some(failure) = self.checks.check(&*self.engine, language, id).await? {
                return Err(ImageError::Unhealthy { language: language.name.clone(), failure });
            }
        }
        Ok(())
    }

    async fn pull(&self, name: &str) -> Result<String, ImageError> {
        if is_local(name) {
            return Err(ImageError::NoLocal(name.into()));
        }
        tracing::info!(image = name, "pulling");
        let progress = |line: &str| tracing::info!(image = name, "{}", line.trim());
        let id = self.podman.pull(name, self.settings.pull_timeout, progress).await.map_err(ImageError::Pull)?;
        self.memory().pulled.insert(name.to_owned());
        Ok(id)
    }

    /// Deletes replaced and broken images whose containers have gone; waits a while for those that have not.
    async fn delete_old(&self, most: u32) {
        let ours = format!("{OLD}:{}-", self.instance_tag());
        for tries in 1..=most {
            let left = match self.podman.names(&ours).await {
                Ok(left) if left.is_empty() => return,
                Ok(left) => left,
                Err(error) => {
                    tracing::warn!(%error, "cannot list images that are to be deleted");
                    Vec::new()
                }
            };
            for name in left {
                let deleted = self.delete(&name).await;
                if let (Err(error), true) = (deleted, tries == most) {
                    tracing::info!(image = name, %error, "cannot delete an unused image; retrying at the next update");
                }
            }
            if tries < most {
                tokio::time::sleep(DELETE_PAUSE * 2_u32.pow(tries - 1)).await;
            }
        }
    }

    async fn delete(&self, old_name: &str) -> Result<(), ProcessError> {
        let Some(id) = self.podman.image_id(old_name).await? else {
            return Ok(());
        };
        // Each time: a sandbox whose making had begun when it was replaced may have kept something again.
        self.engine.release(Some(&id)).await;
        let names = self.podman.names_of(&id).await?;
        if names.iter().any(|name| name != old_name) {
            // In use under another name: another instance's, or in use again.
            return self.podman.untag(&id, old_name).await;
        }
        self.podman.remove_image(&id).await
    }

    /// The image that is in use for a name.
    async fn current(&self, name: &str) -> Result<Option<String>, ProcessError> {
        self.podman.image_id(&self.current_name(name)).await
    }

    fn current_name(&self, name: &str) -> String {
        format!("{CURRENT}:{}-{}", self.instance_tag(), tag_of(name))
    }

    fn old_name(&self, id: &str) -> String {
        format!("{OLD}:{}-{}", self.instance_tag(), tag_of(id))
    }

    fn instance_tag(&self) -> String {
        tag_of(&self.instance)
    }

    /// The languages by their image, the default language's image first.
    fn by_image(&self) -> Vec<Named> {
        let mut order: Vec<String> = Vec::new();
        let mut groups: BTreeMap<String, Vec<Arc<Language>>> = BTreeMap::new();
        for language in &self.languages {
            if !groups.contains_key(&language.image) {
                order.push(language.image.clone());
            }
            groups.entry(language.image.clone()).or_default().push(Arc::clone(language));
        }
        order.into_iter().filter_map(|name| groups.remove_entry(&name)).collect()
    }

    fn announce_all(&self, languages: &[Arc<Language>], image: &Image) {
        languages.iter().for_each(|language| (self.announce)(&language.name, image.clone()));
    }

    fn announce_failure(&self, languages: &[Arc<Language>], error: &ImageError) {
        self.announce_all(languages, &Image::Missing(trying_again(error)));
    }

    fn until_due(&self) -> Duration {
        let now = SystemTime::now();
        let noted = std::fs::metadata(&self.stamp).and_then(|meta| meta.modified()).ok();
        // Where the clock was set back, from now on.
        let last = [noted, self.memory().looked].into_iter().flatten().filter(|time| *time <= now).max();
        let updated = last.unwrap_or_else(|| {
            self.note_update();
            now
        });
        let age = now.duration_since(updated).unwrap_or_default();
        self.settings.interval.saturating_sub(age).max(Duration::from_secs(1))
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_update(&self) {
        self.memory().looked = Some(SystemTime::now());
        let note = || {
            self.stamp.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            std::fs::write(&self.stamp, b"")
        };
        if let Err(error) = note() {
            tracing::warn!(file = %self.stamp.display(), %error, "cannot save the time of the update");
        }
    }
}

/// Names that only this host knows: nothing to pull.
pub fn is_local(name: &str) -> bool {
    name.starts_with("localhost/")
}

/// A short name for a long one, of characters that a tag may have.
pub fn tag_of(name: &str) -> String {
    blake3::hash(name.as_bytes()).to_hex().chars().take(12).collect()
}
