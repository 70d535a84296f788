//! Images: pulled where missing, updated weekly, checked before they are used, deleted when they are replaced.
//!
//! The image in use has a name of our own besides its public one. So a pull never changes what sandboxes are
//! made from: only a new image that passed its health program takes that name, and whatever happens in
//! between, also a kill, the old one stays in use.
//!
//! ```text
//! control       orders to update, from other processes
//!  └ updater      when images are looked for, retried and updated
//!     ├ prepare      pulling an image, checking it, and taking it into use
//!     ├ deletion     deleting images that are not used any more
//!     ├ failures     which images failed, and when they are tried again
//!     └ last_update  when the images were last updated
//! names         what images are called on this host
//! report        what an update came to
//! error         why an image cannot be used
//! ```

pub mod control;
mod deletion;
mod error;
mod failures;
mod last_update;
pub mod names;
mod prepare;
mod report;
mod updater;

pub use last_update::LastUpdate;
pub use updater::{ImageUpdater, Order, UpdateSettings, Wanted};
