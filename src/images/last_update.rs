//! The time of the last image update, which survives restarts.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// The time of the last update.
pub struct LastUpdate {
    /// The file whose modification time is that of the last update.
    stamp: PathBuf,
    /// The last update of this process: writing the file may fail.
    noted: Mutex<Option<SystemTime>>,
}

impl LastUpdate {
    /// Keeps the time in this file.
    pub fn new(stamp: PathBuf) -> LastUpdate {
        LastUpdate { stamp, noted: Mutex::default() }
    }

    /// Time until the next update, at least 1 s. If there was no update yet, records one now.
    pub(super) fn until_next(&self, interval: Duration) -> Duration {
        let now = SystemTime::now();
        let stamped = std::fs::metadata(&self.stamp).and_then(|meta| meta.modified()).ok();
        // Ignore times in the future, as after the clock was set back.
        let last = [stamped, *self.noted()].into_iter().flatten().filter(|time| *time <= now).max();
        let updated = last.unwrap_or_else(|| {
            self.note();
            now
        });
        let age = now.duration_since(updated).unwrap_or_default();
        interval.saturating_sub(age).max(Duration::from_secs(1))
    }

    /// Records an update that ends now.
    pub(super) fn note(&self) {
        *self.noted() = Some(SystemTime::now());
        let note = || {
            self.stamp.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            std::fs::write(&self.stamp, b"")
        };
        if let Err(error) = note() {
            tracing::warn!(file = %self.stamp.display(), %error, "cannot save the time of the update");
        }
    }

    fn noted(&self) -> MutexGuard<'_, Option<SystemTime>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(3600);

    #[test]
    fn update_is_due_after_an_interval_even_if_the_file_is_unwritable() {
        let dir = tempfile::tempdir().unwrap();
        let in_the_way = dir.path().join("file");
        std::fs::write(&in_the_way, b"").unwrap();
        for stamp in [dir.path().join("state/stamp"), in_the_way.join("stamp")] {
            let last = LastUpdate::new(stamp);
            assert!(last.until_next(INTERVAL) > INTERVAL / 2);
            assert!(last.until_next(INTERVAL) > INTERVAL / 2);
            assert_eq!(last.until_next(Duration::ZERO), Duration::from_secs(1));
        }
    }

    #[test]
    fn time_of_the_last_update_survives_a_restart_unless_in_the_future() {
        let dir = tempfile::tempdir().unwrap();
        let stamp = dir.path().join("stamp");
        for (time, due) in [(SystemTime::now() - 2 * INTERVAL, true), (SystemTime::now() + 2 * INTERVAL, false)] {
            std::fs::File::create(&stamp).unwrap().set_modified(time).unwrap();
            let until = LastUpdate::new(stamp.clone()).until_next(INTERVAL);
            assert_eq!(until == Duration::from_secs(1), due, "{until:?}");
        }
    }
}
