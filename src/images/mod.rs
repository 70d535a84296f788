//! Images: pulls missing ones, updates them regularly, checks them before use, and deletes replaced ones.
//!
//! The image in use has a private name besides its public one. A pull changes only the public name, so it does not
//! affect new sandboxes: only an image that passed its health programs gets the private name. Until then, the old image
//! stays in use, even if the server is killed.
//!
//! ```text
//! control       the control socket: update requests from other processes
//!  └ updater      decides when images are searched, retried and updated
//!     ├ prepare      pulls an image, checks it and takes it into use
//!     ├ deletion     deletes unused images
//!     ├ failures     failed images, and when they are retried
//!     └ last_update  the time of the last update
//! names         private names of images
//! report        the result of an update
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
pub use updater::{ImageUpdater, UpdateRequest, UpdateSettings, UpdaterConfig};
