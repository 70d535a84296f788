//! The templates that are kept for further sandboxes, one per language and image.

use std::sync::Arc;

use tokio::sync::OnceCell;

use crate::model::language::Language;
use crate::sandbox::direct::agent_client::Agent;
use crate::sandbox::direct::template::Template;

/// The templates that are kept for further sandboxes.
#[derive(Default)]
pub(super) struct TemplateCache {
    entries: Vec<Arc<Entry>>,
    /// Languages whose templates are kept: all of them until [`TemplateCache::keep_only`] is called.
    languages: Option<Vec<Arc<Language>>>,
}

/// The template of a language and an image. The first task that needs it creates it, and only tasks that need the same
/// template wait for that.
pub(super) struct Entry {
    agent: Arc<Agent>,
    language: Arc<Language>,
    image: String,
    pub(super) template: OnceCell<Arc<Template>>,
}

impl TemplateCache {
    /// The entry of a language and an image. Creates it if there is none.
    pub(super) fn entry(&mut self, agent: &Arc<Agent>, language: &Arc<Language>, image: &str) -> Arc<Entry> {
        let matches = |entry: &&Arc<Entry>| {
            entry.image == image && entry.language == *language && Arc::ptr_eq(&entry.agent, agent)
        };
        if let Some(entry) = self.entries.iter().find(matches) {
            return Arc::clone(entry);
        }
        // Drop templates of the same language with older settings, which are never requested again, and those of an
        // agent that has ended, which cannot be used any more.
        let is_outdated = |old: &Language| old.name == language.name && *old != **language;
        self.entries.retain(|entry| !is_outdated(&entry.language) && !entry.agent.is_gone());
        let entry = Arc::new(Entry {
            agent: Arc::clone(agent),
            language: Arc::clone(language),
            image: image.to_owned(),
            template: OnceCell::new(),
        });
        // A task that started before its language was removed may still need a template: it is not kept, and has this
        // one sandbox.
        if self.languages.as_ref().is_none_or(|languages| languages.contains(language)) {
            self.entries.push(Arc::clone(&entry));
        }
        entry
    }

    /// Drops a template that may no longer work.
    pub(super) fn discard(&mut self, template: &Arc<Template>) {
        self.entries.retain(|entry| !entry.template.get().is_some_and(|kept| Arc::ptr_eq(kept, template)));
    }

    /// Removes and returns the entries of an image, or of all images if `image` is `None`.
    pub(super) fn take_image(&mut self, image: Option<&str>) -> Vec<Arc<Entry>> {
        let matches = |entry: &mut Arc<Entry>| image.is_none_or(|image| entry.image == image);
        self.entries.extract_if(.., matches).collect()
    }

    /// Keeps templates of these languages only, from now on. Removes and returns the other entries.
    pub(super) fn keep_only(&mut self, languages: &[Arc<Language>]) -> Vec<Arc<Entry>> {
        let is_other = |entry: &mut Arc<Entry>| !languages.contains(&entry.language);
        self.languages = Some(languages.to_vec());
        self.entries.extract_if(.., is_other).collect()
    }
}
