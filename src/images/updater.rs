//! The updater: the task that decides when images are looked for, retried and updated.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::host::process::ProcessError;
use crate::images::deletion::DELETE_TRIES;
use crate::images::error::ImageError;
use crate::images::failures::{Failed, Failures};
use crate::images::last_update::LastUpdate;
use crate::images::names;
use crate::images::report::{self, Report, Updated};
use crate::metrics;
use crate::model::backoff::Backoff;
use crate::model::language::Language;
use crate::sandbox::podman::Podman;
use crate::sandbox::{Engine, health};
use crate::scheduler::Image;

/// `[update]`
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateSettings {
    /// Time between two updates.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// How long one pull may take.
    #[serde(with = "humantime_serde")]
    pub pull_timeout: Duration,
}

/// First and longest time for which sandboxes may fail before their image is looked for: somebody may have deleted it.
/// It grows, for if the image is there something else is wrong.
const AILING_FIRST: Duration = Duration::from_secs(5);
const AILING_LONGEST: Duration = Duration::from_secs(30);

/// An order to look for newer images now; the reports go back.
pub type Order = oneshot::Sender<Vec<Report>>;

/// What is served, and how often and how long images are looked for.
pub type Wanted = (Vec<Arc<Language>>, UpdateSettings);

/// Receives the image of a language.
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
    /// When they were last updated.
    pub last_update: LastUpdate,
    /// Where health programs run.
    pub checks: health::Checks,
    /// Receives the image of a language whenever it changes.
    pub announce: Announce,
    /// Whether sandboxes of a language cannot be made.
    pub ails: Box<dyn Fn(&str) -> bool + Send + Sync>,
    /// Names that were pulled when they were last tried.
    pub pulled: Mutex<BTreeSet<String>>,
}

/// The name of an image, and the languages that are made from it.
type Named = (String, Vec<Arc<Language>>);

impl ImageUpdater {
    /// Keeps the images of the wanted languages up to date until `stop`.
    pub async fn run(
        mut self,
        mut orders: mpsc::Receiver<Order>,
        mut wanted: watch::Receiver<Wanted>,
        stop: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = self.keep(&mut orders) => return,
                // At once, for a pull that is no longer wanted may take long. What is half done is completed when this
                // begins again.
                Ok(()) = wanted.changed() => (self.languages, self.settings) = wanted.borrow_and_update().clone(),
                () = stop.cancelled() => return,
            }
        }
    }

    /// Finds or pulls all images, then looks for newer ones whenever it is time or somebody asks.
    async fn keep(&self, orders: &mut mpsc::Receiver<Order>) {
        let mut failures = Failures::default();
        let mut ailing_backoff = Backoff::new(AILING_FIRST, AILING_LONGEST);
        self.find(self.by_image(), &mut failures).await;
        loop {
            let retry = failures.next();
            tokio::select! {
                order = orders.recv() => {
                    let Some(reply) = order else { return };
                    let reports = self.look_for_all(&mut failures).await;
                    // Before the wait for jobs on replaced images. The other side may have left.
                    let _ = reply.send(reports);
                    self.delete_old(DELETE_TRIES).await;
                }
                () = tokio::time::sleep(self.last_update.until_next(self.settings.interval)) => {
                    self.look_for_all(&mut failures).await;
                    self.delete_old(DELETE_TRIES).await;
                }
                () = tokio::time::sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() => {
                    self.try_again(&mut failures).await;
                }
                ailing = self.ailing(&failures, &mut ailing_backoff) => self.find(ailing, &mut failures).await,
            }
        }
    }

    /// Waits until images may have been deleted: those whose languages have no sandboxes. An image that is known to be
    /// missing is retried anyway.
    async fn ailing(&self, failures: &Failures, backoff: &mut Backoff) -> Vec<Named> {
        loop {
            tokio::time::sleep(backoff.pause()).await;
            let ails = |(name, languages): &Named| {
                !failures.is_missing(name) && languages.iter().any(|language| (self.ails)(&language.name))
            };
            let ailing: Vec<Named> = self.by_image().into_iter().filter(ails).collect();
            if !ailing.is_empty() {
                backoff.failed();
                return ailing;
            }
            backoff.reset();
        }
    }

    /// Tries the failed images again that are due.
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

    /// Looks for a newer image of each name, and notes that.
    async fn look_for_all(&self, failures: &mut Failures) -> Vec<Report> {
        let reports = self.look(self.by_image(), failures).await;
        self.last_update.note();
        reports
    }

    /// Looks for newer ones of these images, and uses those that pass their health programs.
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
                    tracing::warn!("image {}", report::line(&report));
                    let how = Failed { newer: true, kept, ..self.how(&report.0, error) };
                    failures.note(&report.0, how, Instant::now());
                }
                _ => {
                    tracing::info!("image {}", report::line(&report));
                    failures.forget(&report.0);
                }
            }
            reports.push(report);
        }
        reports
    }

    /// Announces those of these images that are on this host, then pulls the missing ones.
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
                    self.announce_all(&languages, &Image::Unknown(ImageError::from(error).trying_again()));
                    failures.note(&name, Failed::default(), Instant::now());
                }
            }
        }
        // All at once: a slow pull does not delay the other languages.
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
        Failed { unfit, pulled: self.pulled().remove(name), ..Failed::default() }
    }

    /// The image that is in use for a name.
    async fn current(&self, name: &str) -> Result<Option<String>, ProcessError> {
        self.podman.image_id(&names::current(&self.instance, name)).await
    }

    /// The languages by their image, the image of the default language first.
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

    /// Announces the image of these languages.
    pub(super) fn announce_all(&self, languages: &[Arc<Language>], image: &Image) {
        languages.iter().for_each(|language| (self.announce)(&language.name, image.clone()));
    }

    fn announce_failure(&self, languages: &[Arc<Language>], error: &ImageError) {
        self.announce_all(languages, &Image::Missing(error.trying_again()));
    }

    pub(super) fn pulled(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.pulled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
