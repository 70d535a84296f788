//! Counts the bytes of an incomplete WebSocket message, which are in memory, against the budget for received data.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::http::budget::{Allowance, Exhausted, GrowingLease};

/// Bytes of a message that need no lease: most messages are shorter, and the buffers of a connection take as much.
const FREE: usize = 16 * 1024;

/// Counts what a connection receives once it is a WebSocket. All clones share the count.
#[derive(Debug, Clone, Default)]
pub struct Inbox(Arc<Mutex<Option<Message>>>);

/// A message that is arriving.
#[derive(Debug)]
struct Message {
    allowance: Allowance,
    received: usize,
    memory: GrowingLease,
    exhausted: bool,
}

impl Message {
    fn new(allowance: Allowance) -> Message {
        Message { allowance, received: 0, memory: GrowingLease::new(FREE), exhausted: false }
    }
}

impl Inbox {
    /// Starts to count.
    pub fn open(&self, allowance: Allowance) {
        *self.message() = Some(Message::new(allowance));
    }

    /// Counts received bytes. After an error, which means that the budget is exhausted, no more may be read.
    pub fn received(&self, bytes: usize) -> io::Result<()> {
        let mut message = self.message();
        let Some(message) = message.as_mut() else { return Ok(()) };
        message.received += bytes;
        let covered = message.memory.cover(message.received, &message.allowance);
        message.exhausted = covered.is_err();
        covered.map_err(io::Error::other)
    }

    /// Marks the message as complete: further bytes belong to the next one.
    pub fn complete(&self) {
        if let Some(message) = self.message().as_mut() {
            *message = Message::new(message.allowance.clone());
        }
    }

    /// `Some` if reading stopped because the budget was exhausted.
    pub fn exhausted(&self) -> Option<Exhausted> {
        self.message().as_ref().filter(|message| message.exhausted).map(|_| Exhausted)
    }

    fn message(&self) -> MutexGuard<'_, Option<Message>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::budget::Budget;
    use crate::model::client::Client;

    #[test]
    fn incoming_messages_are_charged_until_complete() {
        let allowance = Arc::new(Budget::new(1 << 20)).for_client(&Client::Unidentified);
        let (one, other) = (Inbox::default(), Inbox::default());
        one.received(10 << 20).unwrap();
        one.open(allowance.clone());
        other.open(allowance);
        // A client may use half of the budget.
        one.received(512 * 1024).unwrap();
        other.received(FREE).unwrap();
        assert!(other.received(1).is_err());
        assert_eq!((one.exhausted(), other.exhausted()), (None, Some(Exhausted)));
        one.complete();
        other.complete();
        other.received(512 * 1024).unwrap();
        assert_eq!(other.exhausted(), None);
    }
}
