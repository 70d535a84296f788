//! The updater: the task that decides when images are searched, retried and updated.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::host::process::ProcessError;
use crate::images::deletion::DELETE_ATTEMPTS;
use crate::images::error::ImageError;
use crate::images::failures::{FailureKind, Failures};
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

/// First and longest pause before the updater checks whether the image of a language without sandboxes was deleted. The
/// pause grows: if the image exists, something else is wrong.
const RECHECK_FIRST: Duration = Duration::from_secs(5);
const RECHECK_LONGEST: Duration = Duration::from_secs(30);

/// A request to update all images now; the updater sends the reports on it.
pub type UpdateRequest = oneshot::Sender<Vec<Report>>;

/// The enabled languages and the update settings, which a reload changes.
pub type UpdaterConfig = (Vec<Arc<Language>>, UpdateSettings);

/// Called with the name and the image of a language.
pub type Announce = Box<dyn Fn(&str, Image) + Send + Sync>;

/// Keeps the images of the languages up to date.
pub struct ImageUpdater {
    /// Runs podman.
    pub podman: Podman,
    /// Makes the sandboxes of health programs.
    pub engine: Arc<dyn Engine>,
    /// Name of the instance, part of the private image names.
    pub instance: String,
    /// The enabled languages.
    pub languages: Vec<Arc<Language>>,
    /// Update interval and pull timeout.
    pub settings: UpdateSettings,
    /// The time of the last update.
    pub last_update: LastUpdate,
    /// Runs health programs.
    pub checks: health::Checks,
    /// Called whenever the image of a language changes.
    pub announce: Announce,
    /// Whether no sandboxes of a language can be made.
    pub has_problem: Box<dyn Fn(&str) -> bool + Send + Sync>,
    /// Names that were pulled in their last attempt.
    pub pulled: Mutex<BTreeSet<String>>,
}

/// The name of an image and the languages that use it.
type ImageGroup = (String, Vec<Arc<Language>>);

impl ImageUpdater {
    /// Keeps the images of the configured languages up to date until `stop`.
    pub async fn run(
        mut self,
        mut requests: mpsc::Receiver<UpdateRequest>,
        mut config: watch::Receiver<UpdaterConfig>,
        stop: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = self.serve(&mut requests) => return,
                // Cancels work in progress, since a pull that is no longer needed may take long. `serve` starts from
                // the state on this host, so it completes interrupted work.
                Ok(()) = config.changed() => (self.languages, self.settings) = config.borrow_and_update().clone(),
                () = stop.cancelled() => return,
            }
        }
    }

    /// Finds or pulls all images, then updates them at each interval and on request.
    async fn serve(&self, requests: &mut mpsc::Receiver<UpdateRequest>) {
        let mut failures = Failures::default();
        let mut recheck_backoff = Backoff::new(RECHECK_FIRST, RECHECK_LONGEST);
        self.find_or_pull(self.by_image(), &mut failures).await;
        loop {
            let retry = failures.next();
            tokio::select! {
                request = requests.recv() => {
                    let Some(reply) = request else { return };
                    let reports = self.update_all(&mut failures).await;
                    // Reply before waiting for jobs on replaced images. The receiver may have left.
                    let _ = reply.send(reports);
                    self.delete_old(DELETE_ATTEMPTS).await;
                }
                () = tokio::time::sleep(self.last_update.until_next(self.settings.interval)) => {
                    self.update_all(&mut failures).await;
                    self.delete_old(DELETE_ATTEMPTS).await;
                }
                () = tokio::time::sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() => {
                    self.retry_due(&mut failures).await;
                }
                suspects = self.suspects(&failures, &mut recheck_backoff) => {
                    self.find_or_pull(suspects, &mut failures).await;
                }
            }
        }
    }

    /// Waits until some languages have no sandboxes and returns their images, which may have been deleted. Leaves out
    /// images that are known to be missing, since they are retried anyway.
    async fn suspects(&self, failures: &Failures, backoff: &mut Backoff) -> Vec<ImageGroup> {
        loop {
            tokio::time::sleep(backoff.pause()).await;
            let has_problem = |(name, languages): &ImageGroup| {
                !failures.is_missing(name) && languages.iter().any(|language| (self.has_problem)(&language.name))
            };
            let suspects: Vec<ImageGroup> = self.by_image().into_iter().filter(has_problem).collect();
            if !suspects.is_empty() {
                backoff.failed();
                return suspects;
            }
            backoff.reset();
        }
    }

    /// Retries the failed images that are due.
    async fn retry_due(&self, failures: &mut Failures) {
        let now = Instant::now();
        let due = self.by_image().into_iter().filter_map(|group| Some((failures.due(&group.0, now)?, group)));
        let (newer, any): (Vec<_>, Vec<_>) = due.partition(|(pull, _)| *pull);
        let images = |those: Vec<(bool, ImageGroup)>| those.into_iter().map(|(_, group)| group).collect::<Vec<_>>();
        self.find_or_pull(images(any), failures).await;
        if !newer.is_empty() {
            self.update_images(images(newer), failures).await;
            self.delete_old(DELETE_ATTEMPTS).await;
        }
    }

    /// Updates all images, then deletes replaced and broken ones.
    pub async fn update(&self) -> Vec<Report> {
        let reports = self.update_all(&mut Failures::default()).await;
        self.delete_old(DELETE_ATTEMPTS).await;
        reports
    }

    /// Updates all images and records the time.
    async fn update_all(&self, failures: &mut Failures) -> Vec<Report> {
        let reports = self.update_images(self.by_image(), failures).await;
        self.last_update.note();
        reports
    }

    /// Pulls the newest versions of these images and takes those into use that pass their health programs.
    async fn update_images(&self, images: Vec<ImageGroup>, failures: &mut Failures) -> Vec<Report> {
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
            metrics::image_update(report.1.label());
            match &report.1 {
                Updated::Failed(error) => {
                    tracing::warn!("image {}", report::line(&report));
                    let kind = FailureKind { newer: true, kept, ..self.failure_kind(&report.0, error) };
                    failures.note(&report.0, kind, Instant::now());
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

    /// Announces the images that are on this host, then pulls the missing ones.
    async fn find_or_pull(&self, images: Vec<ImageGroup>, failures: &mut Failures) {
        let mut missing = Vec::new();
        for (name, languages) in images {
            match self.current(&name).await {
                Ok(Some(id)) => {
                    self.announce_all(&languages, &Image::Ready(id));
                    failures.note_in_use(&name);
                }
                Ok(None) => missing.push((name, languages)),
                Err(error) => {
                    tracing::error!(image = name, %error, "cannot look for an image");
                    self.announce_all(&languages, &Image::Unknown(ImageError::from(error).trying_again()));
                    failures.note(&name, FailureKind::default(), Instant::now());
                }
            }
        }
        // Concurrently, so that a slow pull does not delay the other languages.
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
                Err(error) => failures.note(name, self.failure_kind(name, &error), Instant::now()),
            }
        }
    }

    /// How an image failed.
    fn failure_kind(&self, name: &str, error: &ImageError) -> FailureKind {
        let unfit = matches!(error, ImageError::Sandbox(_) | ImageError::Unhealthy { .. });
        FailureKind { unfit, pulled: self.pulled().remove(name), ..FailureKind::default() }
    }

    /// The id of the image in use for a name.
    async fn current(&self, name: &str) -> Result<Option<String>, ProcessError> {
        self.podman.image_id(&names::current(&self.instance, name)).await
    }

    /// Groups the languages by image; the image of the default language comes first.
    fn by_image(&self) -> Vec<ImageGroup> {
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::sandbox::fake;

    /// An updater of bash, c and a second language with the image of bash; `has_problem` says which have no sandboxes.
    fn updater(has_problem: impl Fn(&str) -> bool + Send + Sync + 'static) -> ImageUpdater {
        let language = |name: &str, image: &str| {
            let mut language = crate::config::tests::language("bash");
            (language.name, language.image) = (name.to_owned(), image.to_owned());
            Arc::new(language)
        };
        ImageUpdater {
            podman: Podman::new(Path::new("/nonexistent/podman")),
            engine: fake::engine().0,
            instance: "test".into(),
            languages: vec![language("bash", "shell"), language("c", "compiler"), language("sh", "shell")],
            settings: UpdateSettings { interval: Duration::from_secs(3600), pull_timeout: Duration::from_secs(60) },
            last_update: LastUpdate::new("/nonexistent/stamp".into()),
            checks: health::Checks::default(),
            announce: Box::new(|_, _| ()),
            has_problem: Box::new(has_problem),
            pulled: Mutex::default(),
        }
    }

    fn names(images: &[ImageGroup]) -> Vec<&str> {
        images.iter().map(|(name, _)| &**name).collect()
    }

    #[test]
    fn images_are_grouped_and_that_of_the_default_language_is_first() {
        let images = updater(|_| false).by_image();
        assert_eq!(names(&images), ["shell", "compiler"]);
        let languages: Vec<&str> = images[0].1.iter().map(|language| &*language.name).collect();
        assert_eq!(languages, ["bash", "sh"]);
    }

    #[test]
    fn images_of_languages_without_sandboxes_are_rechecked_after_growing_pauses() {
        fake::on_paused_clock(|| async {
            let updater = updater(|language| language == "sh");
            let mut backoff = Backoff::new(RECHECK_FIRST, RECHECK_LONGEST);
            let mut pauses = Vec::new();
            for _ in 0..5 {
                let started = Instant::now();
                let found = updater.suspects(&Failures::default(), &mut backoff).await;
                assert_eq!(names(&found), ["shell"]);
                pauses.push(started.elapsed().as_secs());
            }
            assert_eq!(pauses, [5, 10, 20, 30, 30]);
        });
    }

    #[test]
    fn pauses_are_short_again_once_all_languages_have_sandboxes() {
        fake::on_paused_clock(|| async {
            let looks = Arc::new(AtomicU32::new(0));
            let counted = Arc::clone(&looks);
            // The problem is gone at the third look, and back at the fourth.
            let updater = updater(move |language| language == "c" && counted.fetch_add(1, Ordering::SeqCst) != 2);
            let mut backoff = Backoff::new(RECHECK_FIRST, RECHECK_LONGEST);
            let failures = Failures::default();
            for _ in 0..2 {
                updater.suspects(&failures, &mut backoff).await;
            }
            let started = Instant::now();
            updater.suspects(&failures, &mut backoff).await;
            assert_eq!(looks.load(Ordering::SeqCst), 4);
            assert_eq!(started.elapsed().as_secs(), 20 + 5);
        });
    }

    #[test]
    fn images_known_to_be_missing_are_left_to_their_retry() {
        fake::on_paused_clock(|| async {
            let updater = updater(|_| true);
            let mut failures = Failures::default();
            failures.note("shell", FailureKind::default(), Instant::now());
            let found = updater.suspects(&failures, &mut Backoff::new(RECHECK_FIRST, RECHECK_LONGEST)).await;
            assert_eq!(names(&found), ["compiler"]);
        });
    }
}
