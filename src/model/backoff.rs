//! Exponential backoff: how long to pause after a failure before the next attempt.

use std::time::Duration;

/// Pauses between failed attempts: each is twice as long as the previous one, up to a maximum.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    pause: Duration,
}

impl Backoff {
    /// A backoff with no failure yet.
    pub fn new(first: Duration, longest: Duration) -> Backoff {
        Backoff { first, longest, pause: first }
    }

    /// The pause after the next failure.
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// Records a failure and returns the pause before the next attempt.
    pub fn failed(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = pause.saturating_mul(2).min(self.longest);
        pause
    }

    /// Records a success: the pauses start over from the first one.
    pub fn reset(&mut self) {
        self.pause = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_until_a_success() {
        let mut backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(9));
        let pauses: Vec<u64> = (0..6).map(|_| backoff.failed().as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 9, 9, 9]);
        backoff.reset();
        assert_eq!(backoff.pause(), Duration::from_secs(2));
    }
}
