//! The output of a stage: the first bytes of its two streams, in order of arrival.

use serde::Serialize;

/// One of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A span of consecutive bytes of one stream: the stream and the length, packed into 32 bits since there can be as many
/// spans as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span(u32);

impl Span {
    /// The bit that is set for stderr; the other bits are the length.
    const STDERR: u32 = 1 << 31;

    /// A span of `length` bytes, or of fewer if that exceeds the 2 GiB that a span can hold.
    fn new(stream: Stream, length: usize) -> Span {
        let length = u32::try_from(length).unwrap_or(u32::MAX).min(Span::STDERR - 1);
        Span(if stream == Stream::Stderr { length | Span::STDERR } else { length })
    }

    fn stream(self) -> Stream {
        if self.0 & Span::STDERR != 0 { Stream::Stderr } else { Stream::Stdout }
    }

    fn length(self) -> usize {
        (self.0 & !Span::STDERR) as usize
    }
}

/// The position of a reader in an [`Output`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Position {
    span: usize,
    within: usize,
    byte: usize,
}

/// The output of a stage: the first bytes of each stream in order of arrival, and the totals of both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    bytes: Vec<u8>,
    /// The streams that `bytes` belong to, in order. A program that alternates between the streams with each byte makes
    /// as many spans as bytes.
    spans: Vec<Span>,
    kept: [usize; 2],
    total: [u64; 2],
    /// Whether the stage printed more than `output_total` allows.
    pub overflowed: bool,
}

impl Output {
    /// Counts bytes read from a stream and keeps those that fit within `cap` bytes of that stream. Returns the kept
    /// bytes.
    pub fn push<'a>(&mut self, stream: Stream, bytes: &'a [u8], cap: usize) -> &'a [u8] {
        let at = stream as usize;
        self.total[at] += bytes.len() as u64;
        let fits = &bytes[..bytes.len().min(cap.saturating_sub(self.kept[at]))];
        self.kept[at] += fits.len();
        self.bytes.extend_from_slice(fits);
        let mut new = fits.len();
        if let Some(last) = self.spans.last_mut().filter(|last| last.stream() == stream) {
            let length = last.length() + new;
            *last = Span::new(stream, length);
            new = length - last.length();
        }
        while new > 0 {
            let span = Span::new(stream, new);
            new -= span.length();
            self.spans.push(span);
        }
        fits
    }

    /// Reads the next bytes from `position` on, at most `max`, from the stream `only` or from either. Returns no bytes
    /// at the end.
    pub fn read(&self, position: &mut Position, only: Option<Stream>, max: usize) -> (Stream, &[u8]) {
        while let Some(span) = self.spans.get(position.span) {
            let left = span.length() - position.within;
            if left == 0 {
                *position = Position { span: position.span + 1, within: 0, byte: position.byte };
                continue;
            }
            let wanted = only.is_none_or(|only| only == span.stream());
            let taken = if wanted { left.min(max) } else { left };
            let bytes = self.bytes.get(position.byte..position.byte + taken).unwrap_or_default();
            position.within += taken;
            position.byte += taken;
            if wanted {
                return (span.stream(), bytes);
            }
        }
        (Stream::Stdout, &[])
    }

    /// Whether a reader has reached the end.
    pub fn is_read(&self, position: &Position) -> bool {
        position.byte >= self.bytes.len()
    }

    /// The kept bytes by stream, in order of arrival.
    pub fn chunks(&self) -> impl Iterator<Item = (Stream, &[u8])> {
        let mut position = Position::default();
        std::iter::from_fn(move || {
            Some(self.read(&mut position, None, usize::MAX)).filter(|(_, bytes)| !bytes.is_empty())
        })
    }

    /// Bytes of heap memory that this output takes.
    pub fn size(&self) -> usize {
        self.bytes.capacity() + self.spans.capacity() * size_of::<Span>()
    }

    /// Bytes kept of a stream.
    pub fn kept_of(&self, stream: Stream) -> usize {
        self.kept[stream as usize]
    }

    /// Bytes printed on a stream.
    pub fn total(&self, stream: Stream) -> u64 {
        self.total[stream as usize]
    }

    /// Bytes printed on both streams.
    pub fn total_both(&self) -> u64 {
        self.total.iter().sum()
    }

    /// Bytes kept of both streams.
    pub fn kept(&self) -> usize {
        self.kept.iter().sum()
    }

    /// Whether some output was not kept.
    pub fn truncated(&self) -> bool {
        self.total_both() > self.kept() as u64
    }

    /// Whether some output of a stream was not kept.
    pub fn truncated_of(&self, stream: Stream) -> bool {
        self.total(stream) > self.kept[stream as usize] as u64
    }

    /// Whether the text of both streams is empty or ends with a line feed.
    pub(super) fn ends_line(&self) -> bool {
        let end = if self.truncated() { whole_characters(&self.bytes) } else { self.bytes.len() };
        self.bytes[..end].last().is_none_or(|byte| *byte == b'\n')
    }

    /// Both streams as text in order of arrival. Bytes that are not UTF-8 become U+FFFD.
    pub fn text(&self) -> String {
        self.decoded(|_| true, self.truncated())
    }

    /// One stream as text.
    pub fn text_of(&self, stream: Stream) -> String {
        self.decoded(|of| of == stream, self.truncated_of(stream))
    }

    fn decoded(&self, wanted: impl Fn(Stream) -> bool, truncated: bool) -> String {
        // A character may be split over two chunks, so join them before decoding.
        let chunks = self.chunks().filter(|(stream, _)| wanted(*stream));
        let mut bytes: Vec<u8> = chunks.flat_map(|(_, chunk)| chunk).copied().collect();
        if truncated {
            bytes.truncate(whole_characters(&bytes));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Length of `bytes` without an incomplete UTF-8 character at the end.
pub fn whole_characters(bytes: &[u8]) -> usize {
    let start = bytes.len().saturating_sub(3);
    let last = (start..bytes.len()).rev().find(|&at| bytes[at] & 0b1100_0000 != 0b1000_0000);
    match last.map(|at| (at, &bytes[at..])) {
        Some((at, tail)) => match std::str::from_utf8(tail) {
            Err(error) if error.error_len().is_none() => at,
            _ => bytes.len(),
        },
        None => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn output_keeps_write_order_and_counts_every_byte() {
        let mut output = Output::default();
        output.push(Stream::Stdout, b"a", 2);
        output.push(Stream::Stderr, b"b", 2);
        output.push(Stream::Stdout, b"cd", 2);
        assert_eq!(output.text(), "abc");
        assert_eq!((output.kept(), output.total_both(), output.truncated()), (3, 4, true));
    }

    #[test]
    fn size_includes_a_run_for_each_change_of_stream() {
        let mut output = Output::default();
        for n in 0..1000 {
            output.push([Stream::Stdout, Stream::Stderr][n % 2], b"x", 1000);
        }
        assert_eq!(output.chunks().count(), 1000);
        assert!(output.size() >= 1000 * (1 + size_of::<Span>()), "{}", output.size());
    }

    proptest! {
        #[test]
        fn truncation_never_splits_a_character(text in ".{0,40}", cap in 0usize..60, pieces in 1usize..7) {
            let mut output = Output::default();
            for piece in text.as_bytes().chunks(pieces) {
                output.push(Stream::Stdout, piece, cap);
            }
            let kept = output.text();
            prop_assert!(text.starts_with(&kept), "{kept:?} is no beginning of {text:?}");
            prop_assert!(kept.len() <= cap && kept.len() + 4 > cap.min(text.len()));
        }

        #[test]
        fn any_bytes_become_valid_json_text(bytes in proptest::collection::vec(any::<u8>(), 0..200), cap in 0usize..200) {
            let mut output = Output::default();
            output.push(Stream::Stdout, &bytes, cap);
            let json = serde_json::to_string(&output.text()).unwrap();
            prop_assert!(serde_json::from_str::<String>(&json).is_ok());
        }
    }
}
