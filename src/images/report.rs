//! The result of an image update, for users and metrics.

use crate::images::error::ImageError;

/// The result of updating one image.
#[derive(Debug)]
pub enum Updated {
    /// The image in use is the newest.
    Unchanged,
    /// A new image is in use.
    Replaced {
        /// Id of the replaced image, if any.
        old: Option<String>,
        /// Id of the new image.
        new: String,
    },
    /// The update failed; the image that was in use stays in use.
    Failed(ImageError),
}

impl Updated {
    /// The result as a label of the metrics.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Updated::Unchanged => "unchanged",
            Updated::Replaced { .. } => "replaced",
            Updated::Failed(_) => "failed",
        }
    }
}

/// The name of an image and the result of its update.
pub type Report = (String, Updated);

/// A report as a line of text.
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
pub(super) fn all_succeeded(reports: &[Report]) -> bool {
    reports.iter().all(|(_, updated)| !matches!(updated, Updated::Failed(_)))
}
