//! Numbered places for containers, and the uids that programs have in them.

use tokio::sync::mpsc;

/// First uid of programs; a sandbox's follows from its instance and its slot, so no two of an instance that live at once
/// share one.
const FIRST_UID: u32 = 10_000;
/// Uids of an instance: more than it can have containers.
const UIDS: u32 = 200;
/// Ranges of uids for instances, below the 65,536 that a user has: a hash of its name gives an instance its range. The
/// instances of a user share podman's user namespace, and two instances in the same range share what the kernel counts per uid.
const RANGES: u32 = 250;

/// Slot of the sandboxes in which images are checked: beyond any number of containers that can be set.
pub const HEALTH_SLOT: u32 = UIDS - 1;

/// One of the numbered places for containers; dropping it gives it back.
#[derive(Debug)]
pub struct Slot {
    pub(crate) number: u32,
    free: mpsc::UnboundedSender<u32>,
}

impl Slot {
    /// A place that is announced on `free` when it is given back.
    pub fn new(number: u32, free: mpsc::UnboundedSender<u32>) -> Slot {
        Slot { number, free }
    }

    /// The uid of programs in this place.
    pub(super) fn uid(&self, instance: &str) -> u32 {
        let hash = blake3::hash(instance.as_bytes());
        let [first, second, ..] = *hash.as_bytes();
        FIRST_UID + u32::from(u16::from_le_bytes([first, second])) % RANGES * UIDS + self.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Fails where nobody listens any more, at the very end.
        let _ = self.free.send(self.number);
    }
}
