//! Slots, the numbered places for containers, and the uid that programs run as in each slot.

use tokio::sync::mpsc;

/// First uid of programs. The uid of a sandbox follows from its instance and its slot, so two sandboxes of an instance
/// that exist at the same time never share a uid.
const FIRST_UID: u32 = 10_000;
/// Number of uids of an instance: more than it can have containers.
const UIDS: u32 = 200;
/// Number of uid ranges for instances, which end below the 65,536 uids that a user has. A hash of the instance's name
/// selects its range. All instances of a user share podman's user namespace: two instances in the same range share the
/// counters that the kernel keeps per uid.
const RANGES: u32 = 250;

/// Slot of the sandboxes in which images are checked: beyond any number of containers that can be configured.
pub const HEALTH_SLOT: u32 = UIDS - 1;

/// A numbered place for one container. Dropping it releases the place.
#[derive(Debug)]
pub struct Slot {
    pub(crate) number: u32,
    free: mpsc::UnboundedSender<u32>,
}

impl Slot {
    /// A slot whose number is sent to `free` when it is released.
    pub fn new(number: u32, free: mpsc::UnboundedSender<u32>) -> Slot {
        Slot { number, free }
    }

    /// The uid of programs in this slot.
    pub(super) fn uid(&self, instance: &str) -> u32 {
        let hash = blake3::hash(instance.as_bytes());
        let [first, second, ..] = *hash.as_bytes();
        FIRST_UID + u32::from(u16::from_le_bytes([first, second])) % RANGES * UIDS + self.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Fails if the receiver is gone, which happens only at shutdown.
        let _ = self.free.send(self.number);
    }
}
