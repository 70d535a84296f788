//! What a WebSocket has sent of a message that is not complete: in memory, and within the budget for what is received.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::http::budget::{Allowance, Exhausted, Growing};

/// Bytes that a message may take without a lease: most that is typed is shorter, and a connection's buffers are as large.
const FREE: usize = 16 * 1024;

/// Counts what a connection receives, once it is a WebSocket. All clones count the same.
#[derive(Debug, Clone, Default)]
pub struct Inbox(Arc<Mutex<Option<Message>>>);

/// A message that is arriving.
#[derive(Debug)]
struct Message {
    allowance: Allowance,
    received: usize,
    memory: Growing,
    exhausted: bool,
}

impl Message {
    fn new(allowance: Allowance) -> Message {
        Message { allowance, received: 0, memory: Growing::new(FREE), exhausted: false }
    }
}

impl Inbox {
    /// Begins to count.
    pub fn open(&self, allowance: Allowance) {
        *self.message() = Some(Message::new(allowance));
    }

    /// Counts bytes that have come. An error where there is no memory for them: no more may be read then.
    pub fn received(&self, bytes: usize) -> io::Result<()> {
        let mut message = self.message();
        let Some(message) = message.as_mut() else { return Ok(()) };
        message.received += bytes;
        let covered = message.memory.cover(message.received, &message.allowance);
        message.exhausted = covered.is_err();
        covered.map_err(io::Error::other)
    }

    /// The message is complete: what comes from here on belongs to the next one.
    pub fn complete(&self) {
        if let Some(message) = self.message().as_mut() {
            *message = Message::new(message.allowance.clone());
        }
    }

    /// Why no more was read, where memory was the reason.
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
    fn a_message_is_leased_while_it_arrives() {
        let allowance = Arc::new(Budget::new(1 << 20)).of(&Client::Ourselves);
        let (one, other) = (Inbox::default(), Inbox::default());
        one.received(10 << 20).unwrap();
        one.open(allowance.clone());
        other.open(allowance);
        // A client has half of it.
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
