//! Takes an image into use: pulls it, checks it and gives it its private name.

use std::sync::Arc;

use crate::images::error::ImageError;
use crate::images::names;
use crate::images::report::Updated;
use crate::images::updater::ImageUpdater;
use crate::model::language::Language;
use crate::scheduler::Image;

impl ImageUpdater {
    /// Takes an image into use when none is: the copy on this host, or else a pulled one.
    pub(super) async fn fetch(&self, name: &str, languages: &[Arc<Language>]) -> Result<(), ImageError> {
        self.pulled().remove(name);
        let id = match self.podman.image_id(name).await? {
            Some(id) => id,
            None => {
                self.announce_all(languages, &Image::Missing("its image is being pulled".into()));
                let id = self.pull(name).await?;
                // The engine may still keep a template of a deleted image with the same id.
                self.engine.release(Some(&id)).await;
                id
            }
        };
        self.announce_all(languages, &Image::Missing("its image is being checked".into()));
        self.check(&id, languages).await?;
        self.podman.tag(&id, &names::current(&self.instance, name)).await?;
        tracing::info!(image = name, id, "image in use");
        self.announce_all(languages, &Image::Ready(id));
        Ok(())
    }

    /// Pulls the newest version of an image and takes it into use if it differs from `current` and passes its check.
    pub(super) async fn replace(
        &self,
        name: &str,
        languages: &[Arc<Language>],
        current: Option<&str>,
    ) -> Result<Updated, ImageError> {
        self.pulled().remove(name);
        let public = self.podman.image_id(name).await?;
        let new = match names::is_local(name) {
            true => public.clone().ok_or_else(|| ImageError::NoLocal(name.into()))?,
            false => match self.pull(name).await {
                // The pull failed and no image is in use: the copy on this host is better than none.
                Err(error) if current.is_none() => public.clone().ok_or(error)?,
                pulled => pulled?,
            },
        };
        if let Some(unused) = public.filter(|id| *id != new && Some(id.as_str()) != current) {
            // The copy on this host was never used, for instance because the server was killed during its check.
            self.podman.tag(&unused, &names::old(&self.instance, &unused)).await?;
        }
        if Some(new.as_str()) == current {
            return Ok(Updated::Unchanged);
        }
        if let Err(error) = self.check(&new, languages).await {
            if let (Some(current), false) = (current, names::is_local(name)) {
                // Mark the broken image for deletion, and give the public name back to the image in use.
                self.podman.tag(&new, &names::old(&self.instance, &new)).await?;
                self.podman.tag(current, name).await?;
            }
            return Err(error);
        }
        if let Some(old) = current {
            self.podman.tag(old, &names::old(&self.instance, old)).await?;
        }
        self.podman.tag(&new, &names::current(&self.instance, name)).await?;
        self.announce_all(languages, &Image::Ready(new.clone()));
        Ok(Updated::Replaced { old: current.map(str::to_owned), new })
    }

    /// Checks an image. If it fails, the engine releases it.
    async fn check(&self, id: &str, languages: &[Arc<Language>]) -> Result<(), ImageError> {
        let checked = self.run_health_programs(id, languages).await;
        if checked.is_err() {
            self.engine.release(Some(id)).await;
        }
        checked
    }

    /// Runs the health program of each language in a sandbox of the image, up to the first failure.
    async fn run_health_programs(&self, id: &str, languages: &[Arc<Language>]) -> Result<(), ImageError> {
        for language in languages {
            if let Some(failure) = self.checks.check(&*self.engine, language, id).await? {
                return Err(ImageError::Unhealthy { language: language.name.clone(), failure });
            }
        }
        Ok(())
    }

    /// Pulls an image and returns its id.
    async fn pull(&self, name: &str) -> Result<String, ImageError> {
        if names::is_local(name) {
            return Err(ImageError::NoLocal(name.into()));
        }
        tracing::info!(image = name, "pulling");
        let progress = |line: &str| tracing::info!(image = name, "{}", line.trim());
        let id = self.podman.pull(name, self.settings.pull_timeout, progress).await.map_err(ImageError::Pull)?;
        self.pulled().insert(name.to_owned());
        Ok(id)
    }
}
