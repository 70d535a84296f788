//! Events of a run that have not been sent to its client yet. Output is kept in compact form and within the memory
//! budget, so a client may read slowly without slowing the run down.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use crate::http::budget::{Allowance, Exhausted, GrowingLease};
use crate::model::job::Stage;
use crate::model::output::{Output, Position};
use crate::run::Event;

/// Most bytes of output in one message.
const MAX_DATA: usize = 4096;

/// Bytes of output per segment; memory is freed by segment.
const SEGMENT: usize = 64 * 1024;

/// Bytes that may wait for a client without a lease: less than the buffers of a connection.
const FREE: usize = 8 * 1024;

/// Events of a run that wait to be sent to its client.
pub struct Backlog<'a> {
    memory: &'a Allowance,
    pending: Mutex<Pending>,
    changed: Notify,
}

struct Pending {
    segments: VecDeque<Segment>,
    /// How far the first segment has been read.
    position: Position,
    memory: GrowingLease,
    closed: bool,
}

impl Default for Pending {
    fn default() -> Pending {
        Pending {
            segments: VecDeque::new(),
            position: Position::default(),
            memory: GrowingLease::new(FREE),
            closed: false,
        }
    }
}

enum Segment {
    Printed(Stage, Output),
    Event(Event),
}

impl<'a> Backlog<'a> {
    /// An empty backlog, whose memory is leased from `memory`.
    pub fn new(memory: &'a Allowance) -> Backlog<'a> {
        Backlog { memory, pending: Mutex::default(), changed: Notify::new() }
    }

    /// Stores events as they arrive, until the channel closes or the memory budget is exhausted.
    pub async fn collect(&self, mut events: mpsc::UnboundedReceiver<Event>) -> Result<(), Exhausted> {
        while let Some(event) = events.recv().await {
            let mut pending = self.pending();
            pending.add(event);
            let size = pending.size();
            pending.memory.cover(size, self.memory)?;
            drop(pending);
            self.changed.notify_one();
        }
        self.pending().closed = true;
        self.changed.notify_one();
        Ok(())
    }

    /// The next event, if one is stored. Consecutive output of one stream is merged into one event.
    pub fn try_next(&self) -> Option<Event> {
        self.pending().next()
    }

    /// Waits for the next event; `None` after the last one.
    pub async fn next(&self) -> Option<Event> {
        loop {
            let changed = self.changed.notified();
            {
                let mut pending = self.pending();
                if let Some(event) = pending.next() {
                    return Some(event);
                }
                if pending.closed {
                    return None;
                }
            }
            changed.await;
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn add(&mut self, event: Event) {
        match (self.segments.back_mut(), event) {
            (Some(Segment::Printed(last, output)), Event::Output(stage, stream, bytes))
                if *last == stage && output.kept() < SEGMENT =>
            {
                output.push(stream, &bytes, usize::MAX);
            }
            (_, Event::Output(stage, stream, bytes)) => {
                let mut output = Output::default();
                output.push(stream, &bytes, usize::MAX);
                self.segments.push_back(Segment::Printed(stage, output));
            }
            // Only the latest queue position matters.
            (Some(Segment::Event(last @ Event::Queued(_))), event @ Event::Queued(_)) => *last = event,
            (_, event) => self.segments.push_back(Segment::Event(event)),
        }
    }

    fn next(&mut self) -> Option<Event> {
        let event = match self.segments.pop_front()? {
            Segment::Event(event) => event,
            Segment::Printed(stage, output) => {
                let (stream, bytes) = output.read(&mut self.position, None, MAX_DATA);
                let event = Event::Output(stage, stream, Bytes::copy_from_slice(bytes));
                match output.is_read(&self.position) {
                    true => self.position = Position::default(),
                    false => self.segments.push_front(Segment::Printed(stage, output)),
                }
                event
            }
        };
        if self.size() <= FREE {
            self.memory = GrowingLease::new(FREE);
        }
        Some(event)
    }

    fn size(&self) -> usize {
        let size = |segment: &Segment| match segment {
            Segment::Printed(_, output) => output.size(),
            // An outcome is shared with the run and not counted here.
            Segment::Event(_) => 0,
        };
        self.segments.iter().map(size).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::http::budget::Budget;
    use crate::model::client::Client;
    use crate::model::output::Stream;

    fn allowance(bytes: usize) -> Allowance {
        Arc::new(Budget::new(bytes)).for_client(&Client::Unidentified)
    }

    fn printed(stream: Stream, bytes: &'static [u8]) -> Event {
        Event::Output(Stage::Run, stream, Bytes::from_static(bytes))
    }

    async fn collected(
        memory: &Allowance,
        events: impl IntoIterator<Item = Event>,
    ) -> (Backlog<'_>, Result<(), Exhausted>) {
        let backlog = Backlog::new(memory);
        let (sender, receiver) = mpsc::unbounded_channel();
        events.into_iter().for_each(|event| drop(sender.send(event)));
        drop(sender);
        let result = backlog.collect(receiver).await;
        (backlog, result)
    }

    #[tokio::test]
    async fn slow_readers_get_merged_events_in_order() {
        let memory = allowance(1 << 20);
        let events = [
            Event::Queued(2),
            Event::Queued(1),
            Event::Started(Stage::Run),
            printed(Stream::Stdout, b"a"),
            printed(Stream::Stdout, b"b"),
            printed(Stream::Stderr, b"c"),
            printed(Stream::Stdout, b"d"),
        ];
        let (backlog, result) = collected(&memory, events).await;
        assert_eq!(result, Ok(()));
        let mut sent = Vec::new();
        while let Some(event) = backlog.next().await {
            sent.push(match event {
                Event::Queued(position) => format!("queued {position}"),
                Event::Started(_) => "started".into(),
                Event::Output(_, stream, bytes) => format!("{stream:?} {}", String::from_utf8_lossy(&bytes)),
                Event::Ended(_) => "ended".into(),
            });
        }
        assert_eq!(sent, ["queued 1", "started", "Stdout ab", "Stderr c", "Stdout d"]);
    }

    #[tokio::test]
    async fn alternating_streams_use_little_memory() {
        let memory = allowance(64 << 20);
        let changes = (0..200_000).map(|n| printed([Stream::Stdout, Stream::Stderr][n % 2], b"x"));
        let (backlog, result) = collected(&memory, changes).await;
        assert_eq!(result, Ok(()));
        assert!(backlog.pending().size() <= 200_000 * 10, "{}", backlog.pending().size());
        let mut count = 0;
        while backlog.try_next().is_some() {
            count += 1;
        }
        assert_eq!((count, backlog.pending().memory.is_free()), (200_000, true));
    }

    #[tokio::test]
    async fn waiting_events_are_charged_to_the_budget() {
        let memory = allowance(1 << 20);
        let much = vec![b'x'; 64 * 1024];
        let events = |count| (0..count).map(|_| Event::Output(Stage::Run, Stream::Stdout, Bytes::from(much.clone())));
        let (backlog, result) = collected(&memory, events(4)).await;
        assert_eq!(result, Ok(()));
        let (_, refused) = collected(&memory, events(20)).await;
        assert_eq!(refused, Err(Exhausted));
        while backlog.try_next().is_some() {}
        let (_, result) = collected(&memory, events(4)).await;
        assert_eq!(result, Ok(()), "sent events hold no memory");
    }
}
