//! The templates that are kept for further sandboxes, one for each language and image.

use std::sync::Arc;

use tokio::sync::OnceCell;

use crate::model::language::Language;
use crate::sandbox::direct::agent_client::Agent;
use crate::sandbox::direct::template::Template;

/// The templates that are kept.
#[derive(Default)]
pub(super) struct TemplateCache {
    kept: Vec<Arc<Entry>>,
    /// Languages whose templates are kept; all, until [`TemplateCache::keep_only`] is called.
    wanted: Option<Vec<Arc<Language>>>,
}

/// The template of a language and an image, once it is made. The first task that needs it makes it, and only tasks that need
/// the same one wait for it.
pub(super) struct Entry {
    agent: Arc<Agent>,
    language: Arc<Language>,
    image: String,
    pub(super) template: OnceCell<Arc<Template>>,
}

impl TemplateCache {
    /// The entry of a language and an image, made where there is none.
    pub(super) fn entry(&mut self, agent: &Arc<Agent>, language: &Arc<Language>, image: &str) -> Arc<Entry> {
        let is_it = |entry: &&Arc<Entry>| {
            entry.image == image && entry.language == *language && Arc::ptr_eq(&entry.agent, agent)
        };
        if let Some(entry) = self.kept.iter().find(is_it) {
            return Arc::clone(entry);
        }
        // Templates of a language with older settings are not asked for again, and those of an agent that has ended cannot be
        // used any more.
        let is_past = |past: &Language| past.name == language.name && *past != **language;
        self.kept.retain(|entry| !is_past(&entry.language) && !entry.agent.is_gone());
        let entry = Arc::new(Entry {
            agent: Arc::clone(agent),
            language: Arc::clone(language),
            image: image.to_owned(),
            template: OnceCell::new(),
        });
        // A task that began before a language was given up may still ask for it: its sandbox is then the only one of the
        // template.
        if self.wanted.as_ref().is_none_or(|wanted| wanted.contains(language)) {
            self.kept.push(Arc::clone(&entry));
        }
        entry
    }

    /// Gives up a template that may no longer work.
    pub(super) fn discard(&mut self, template: &Arc<Template>) {
        self.kept.retain(|entry| !entry.template.get().is_some_and(|kept| Arc::ptr_eq(kept, template)));
    }

    /// Takes out the entries of an image, or of all images where none is named.
    pub(super) fn take_image(&mut self, image: Option<&str>) -> Vec<Arc<Entry>> {
        let is_meant = |entry: &mut Arc<Entry>| image.is_none_or(|image| entry.image == image);
        self.kept.extract_if(.., is_meant).collect()
    }

    /// From now on keeps templates of these languages only; takes out the others.
    pub(super) fn keep_only(&mut self, languages: &[Arc<Language>]) -> Vec<Arc<Entry>> {
        let is_other = |entry: &mut Arc<Entry>| !languages.contains(&entry.language);
        self.wanted = Some(languages.to_vec());
        self.kept.extract_if(.., is_other).collect()
    }
}
