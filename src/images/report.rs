//! What an update of images came to, for people and metrics.

use crate::images::error::ImageError;

/// What the update of an image came to.
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
    /// It failed; the image that was in use stays in use.
    Failed(ImageError),
}

impl Updated {
    /// The same in a word, for metrics.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Updated::Unchanged => "unchanged",
            Updated::Replaced { .. } => "replaced",
            Updated::Failed(_) => "failed",
        }
    }
}

/// The name of an image, and what its update came to.
pub type Report = (String, Updated);

/// A report as a line for people.
pub(super) fn line((name, updated): &Report) -> String {
    let short = |id: &str| id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
    match updated {
        Updated::Unchanged => format!("{name}: the newest is in use"),
        Updated::Replaced { old: None, new } => format!("{name}: {} is in use", short(new)),
        Updated::Replaced { old: Some(old), new } => format!("{name}: {} replaces {}", short(new), short(old)),
        Updated::Failed(error) => format!("{name}: failed, nothing changed: {error}"),
    }
}

/// Whether no image failed.
pub(super) fn all_well(reports: &[Report]) -> bool {
    reports.iter().all(|(_, updated)| !matches!(updated, Updated::Failed(_)))
}
