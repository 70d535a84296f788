//! What happened in a run and has not been told yet: as compact as it was printed, and within the budget, however slowly
//! the client reads.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use crate::http::budget::{Allowance, Exhausted, Growing};
use crate::model::job::Stage;
use crate::model::output::{Output, Place};
use crate::run::Event;

/// Most bytes of output that are told in one message.
const PIECE: usize = 4096;

/// Bytes printed that are kept in one segment, and given back together.
const SEGMENT: usize = 64 * 1024;

/// What may wait for a client without a lease: less than a connection has as buffers.
const FREE: usize = 8 * 1024;

/// Events that wait for the client of a run.
pub struct Backlog<'a> {
    memory: &'a Allowance,
    waiting: Mutex<Waiting>,
    changed: Notify,
}

struct Waiting {
    segments: VecDeque<Segment>,
    /// How far the first segment has been told.
    told: Place,
    memory: Growing,
    over: bool,
}

impl Default for Waiting {
    fn default() -> Waiting {
        Waiting { segments: VecDeque::new(), told: Place::default(), memory: Growing::new(FREE), over: false }
    }
}

enum Segment {
    Printed(Stage, Output),
    Event(Event),
}

impl<'a> Backlog<'a> {
    /// An empty one.
    pub fn new(memory: &'a Allowance) -> Backlog<'a> {
        Backlog { memory, waiting: Mutex::default(), changed: Notify::new() }
    }

    /// Takes all events, at once when each happens, until there are no more or no memory is left for them.
    pub async fn take(&self, mut happening: mpsc::UnboundedReceiver<Event>) -> Result<(), Exhausted> {
        while let Some(event) = happening.recv().await {
            let mut waiting = self.waiting();
            waiting.add(event);
            let size = waiting.size();
            waiting.memory.cover(size, self.memory)?;
            drop(waiting);
            self.changed.notify_one();
        }
        self.waiting().over = true;
        self.changed.notify_one();
        Ok(())
    }

    /// The next event; output that came meanwhile is one.
    pub fn next_now(&self) -> Option<Event> {
        self.waiting().next()
    }

    /// Like [`Backlog::next_now`], waits for it; none after the last.
    pub async fn next(&self) -> Option<Event> {
        loop {
            let changed = self.changed.notified();
            {
                let mut waiting = self.waiting();
                if let Some(event) = waiting.next() {
                    return Some(event);
                }
                if waiting.over {
                    return None;
                }
            }
            changed.await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
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
            // Where it is now is all that matters.
            (Some(Segment::Event(last @ Event::Queued(_))), event @ Event::Queued(_)) => *last = event,
            (_, event) => self.segments.push_back(Segment::Event(event)),
        }
    }

    fn next(&mut self) -> Option<Event> {
        let event = match self.segments.pop_front()? {
            Segment::Event(event) => event,
            Segment::Printed(stage, output) => {
                let (stream, bytes) = output.read(&mut self.told, None, PIECE);
                let event = Event::Output(stage, stream, Bytes::copy_from_slice(bytes));
                match output.is_read(&self.told) {
                    true => self.told = Place::default(),
                    false => self.segments.push_front(Segment::Printed(stage, output)),
                }
                event
            }
        };
        if self.size() <= FREE {
            self.memory = Growing::new(FREE);
        }
        Some(event)
    }

    fn size(&self) -> usize {
        let size = |segment: &Segment| match segment {
            Segment::Printed(_, output) => output.size(),
            // Its outcome is the run's own.
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
        Arc::new(Budget::new(bytes)).of(&Client::Ourselves)
    }

    fn printed(stream: Stream, bytes: &'static [u8]) -> Event {
        Event::Output(Stage::Run, stream, Bytes::from_static(bytes))
    }

    async fn taken(
        memory: &Allowance,
        events: impl IntoIterator<Item = Event>,
    ) -> (Backlog<'_>, Result<(), Exhausted>) {
        let backlog = Backlog::new(memory);
        let (sender, happening) = mpsc::unbounded_channel();
        events.into_iter().for_each(|event| drop(sender.send(event)));
        drop(sender);
        let result = backlog.take(happening).await;
        (backlog, result)
    }

    #[tokio::test]
    async fn what_is_read_late_is_told_in_order_and_in_fewer_messages() {
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
        let (backlog, result) = taken(&memory, events).await;
        assert_eq!(result, Ok(()));
        let mut told = Vec::new();
        while let Some(event) = backlog.next().await {
            told.push(match event {
                Event::Queued(position) => format!("queued {position}"),
                Event::Started(_) => "started".into(),
                Event::Output(_, stream, bytes) => format!("{stream:?} {}", String::from_utf8_lossy(&bytes)),
                Event::Ended(_) => "ended".into(),
            });
        }
        assert_eq!(told, ["queued 1", "started", "Stdout ab", "Stderr c", "Stdout d"]);
    }

    #[tokio::test]
    async fn a_change_of_stream_with_each_byte_costs_little() {
        let memory = allowance(64 << 20);
        let changes = (0..200_000).map(|n| printed([Stream::Stdout, Stream::Stderr][n % 2], b"x"));
        let (backlog, result) = taken(&memory, changes).await;
        assert_eq!(result, Ok(()));
        assert!(backlog.waiting().size() <= 200_000 * 10, "{}", backlog.waiting().size());
        let mut count = 0;
        while backlog.next_now().is_some() {
            count += 1;
        }
        assert_eq!((count, backlog.waiting().memory.is_free()), (200_000, true));
    }

    #[tokio::test]
    async fn what_waits_is_within_the_budget() {
        let memory = allowance(1 << 20);
        let much = vec![b'x'; 64 * 1024];
        let events = |count| (0..count).map(|_| Event::Output(Stage::Run, Stream::Stdout, Bytes::from(much.clone())));
        let (backlog, result) = taken(&memory, events(4)).await;
        assert_eq!(result, Ok(()));
        let (_, refused) = taken(&memory, events(20)).await;
        assert_eq!(refused, Err(Exhausted));
        while backlog.next_now().is_some() {}
        let (_, result) = taken(&memory, events(4)).await;
        assert_eq!(result, Ok(()), "what was told takes nothing");
    }
}
