//! Printed text in an answer: decoded and escaped as it is taken, never there as a whole beside the outcome.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::model::job::Stage;
use crate::model::outcome::{Outcome, StageOutcome};
use crate::model::output::{Output, Place, Stream};

/// Bytes that are decoded at a time. As JSON they are six times as much at most.
const PIECE: usize = 4096;

/// Most bytes that a piece takes as JSON: control characters take six each, and what is no UTF-8 three.
pub const MOST_WRITTEN: usize = (PIECE + 4) * 6;

/// Begins what stands for a text in JSON that is written around the texts, before its number: a noncharacter, with which
/// no other value of ours begins.
const MARK: &str = "\u{10ffff}";

/// What a stage printed, as it stands in an answer.
#[derive(Debug, Clone, Default)]
pub enum Text {
    /// Nothing: there was no such stage.
    #[default]
    Nothing,
    /// This.
    Printed(Source),
    /// What was taken out, as the text of this number.
    Mark(usize),
}

/// Where a text comes from.
#[derive(Debug, Clone)]
pub struct Source {
    outcome: Arc<Outcome>,
    stage: Stage,
    /// One stream, or both in order of arrival.
    of: Option<Stream>,
    /// Our words behind it.
    notes: String,
    /// Most bytes that it may take as JSON.
    most: usize,
}

/// Values whose printed texts can be taken out of them.
pub trait Texts: Serialize {
    /// Shows each text, in the order in which they are written.
    fn each(&mut self, see: &mut dyn FnMut(&mut Text));
}

/// JSON in parts: what is written around the texts, and the texts.
#[derive(Debug)]
pub enum Part {
    /// JSON as it is.
    Json(Vec<u8>),
    /// The inside of a string.
    Text(Source),
}

/// The order of an object's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fields {
    /// As the type has them.
    AsDeclared,
    /// By their names, as in a [`serde_json::Value`].
    Sorted,
}

impl Text {
    /// One stream of a stage, or both. Nothing where there is no such stage.
    pub fn new(outcome: &Arc<Outcome>, stage: Stage, of: Option<Stream>) -> Text {
        let source = Source { outcome: Arc::clone(outcome), stage, of, notes: String::new(), most: usize::MAX };
        if source.output().is_some() { Text::Printed(source) } else { Text::Nothing }
    }

    /// Both streams of a stage, with a last line where it was cut short or something was left out.
    pub fn explained(outcome: &Arc<Outcome>, stage: Stage) -> Text {
        let mut text = Text::new(outcome, stage, None);
        if let Text::Printed(source) = &mut text {
            source.notes = outcome.stage(stage).and_then(StageOutcome::notes_after).unwrap_or_default();
        }
        text
    }

    /// Cuts it so that it takes no more than this as JSON; whether something is missing now.
    pub fn cut(&mut self, most: usize) -> bool {
        let Text::Printed(source) = self else { return false };
        // Not even all of it escaped is too much.
        if source.kept().saturating_mul(6) <= most {
            return false;
        }
        source.most = most;
        let mut reader = Reader::of(source);
        while reader.next(source).is_some() {}
        reader.cut
    }

    /// Bytes that were printed and kept of it.
    pub fn kept(&self) -> usize {
        match self {
            Text::Printed(source) => source.kept(),
            Text::Nothing | Text::Mark(_) => 0,
        }
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Text::Printed(source) => serializer.collect_str(source),
            Text::Nothing => serializer.serialize_str(""),
            Text::Mark(number) => serializer.collect_str(&format_args!("{MARK}{number}")),
        }
    }
}

impl Source {
    fn output(&self) -> Option<&Output> {
        self.outcome.stage(self.stage).map(|stage| &stage.output)
    }

    fn kept(&self) -> usize {
        let kept = self.output().map_or(0, |output| self.of.map_or(output.kept(), |of| output.kept_of(of)));
        kept + self.notes.len()
    }

    /// Bytes that it takes as JSON, without quotes. It is read as a whole for that: others have their turns meanwhile.
    pub async fn written(&self) -> usize {
        let (mut reader, mut length) = (Reader::of(self), 0);
        while let Some(piece) = reader.next(self) {
            length += written(&piece);
            tokio::task::consume_budget().await;
        }
        length
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut reader = Reader::of(self);
        while let Some(piece) = reader.next(self) {
            f.write_str(&piece)?;
        }
        Ok(())
    }
}

/// JSON of a value in parts, its texts apart.
pub fn in_parts(value: &mut impl Texts, fields: Fields) -> serde_json::Result<Vec<Part>> {
    let mut texts = Vec::new();
    value.each(&mut |text| {
        let mark = Text::Mark(texts.len());
        match std::mem::replace(text, mark) {
            Text::Printed(source) => texts.push(Some(source)),
            other => *text = other,
        }
    });
    let around = match fields {
        Fields::AsDeclared => serde_json::to_vec(value)?,
        Fields::Sorted => serde_json::to_vec(&serde_json::to_value(value)?)?,
    };
    let begin = [b"\"", MARK.as_bytes()].concat();
    let (mut parts, mut from, mut at) = (Vec::with_capacity(texts.len() * 2 + 1), 0, 0);
    while let Some(found) = around[at..].windows(begin.len()).position(|window| window == begin) {
        let number = at + found + begin.len();
        at = around[number..].iter().position(|byte| *byte == b'"').map_or(around.len(), |end| number + end);
        let named = std::str::from_utf8(&around[number..at]).ok().and_then(|number| number.parse::<usize>().ok());
        if let Some(text) = named.and_then(|number| texts.get_mut(number)?.take()) {
            // The quotes are of what is around.
            parts.extend([Part::Json(around[from..=number - begin.len()].to_vec()), Part::Text(text)]);
            from = at;
        }
    }
    parts.push(Part::Json(around[from..].to_vec()));
    Ok(parts)
}

/// Reads a text piece by piece: as `String::from_utf8_lossy` would have it as a whole, without a character that was
/// cut off at the end.
#[derive(Debug)]
pub struct Reader {
    place: Place,
    /// The beginning of a character whose end is in the next piece.
    begun: Vec<u8>,
    ended: bool,
    /// Bytes that it may still take as JSON.
    left: usize,
    /// Whether it ended because of that.
    cut: bool,
}

impl Reader {
    /// A reader at the beginning of a text.
    pub fn of(source: &Source) -> Reader {
        Reader { place: Place::default(), begun: Vec::new(), ended: false, left: source.most, cut: false }
    }

    /// The next piece; none at the end.
    pub fn next(&mut self, source: &Source) -> Option<String> {
        if self.ended {
            return None;
        }
        let mut text = String::new();
        let mut bytes = std::mem::take(&mut self.begun);
        if let Some(output) = source.output() {
            while bytes.len() < PIECE {
                let (_, read) = output.read(&mut self.place, source.of, PIECE - bytes.len());
                if read.is_empty() {
                    self.ended = true;
                    break;
                }
                bytes.extend_from_slice(read);
            }
        } else {
            self.ended = true;
        }
        let mut rest = bytes.len();
        for chunk in bytes.utf8_chunks() {
            text += chunk.valid();
            let invalid = chunk.invalid();
            rest -= chunk.valid().len() + invalid.len();
            let incomplete = rest == 0 && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            match (incomplete, self.ended) {
                (true, false) => self.begun = invalid.to_vec(),
                (true, true) if source.is_truncated() => {}
                _ if invalid.is_empty() => {}
                _ => text.push(char::REPLACEMENT_CHARACTER),
            }
        }
        if self.ended {
            text += &source.notes;
        }
        if source.most != usize::MAX {
            self.keep_within(&mut text);
        }
        Some(text)
    }

    /// Shortens a piece to what is still allowed.
    fn keep_within(&mut self, text: &mut String) {
        let all = written(text);
        if all <= self.left {
            self.left -= all;
            return;
        }
        (self.ended, self.cut) = (true, true);
        let fits = |(_, character): &(usize, char)| {
            let left = self.left.checked_sub(written(character.encode_utf8(&mut [0; 4])));
            left.map(|left| self.left = left).is_none()
        };
        let end = text.char_indices().find(fits).map_or(text.len(), |(at, _)| at);
        text.truncate(end);
    }
}

impl Source {
    fn is_truncated(&self) -> bool {
        self.output().is_some_and(|output| self.of.map_or(output.truncated(), |of| output.truncated_of(of)))
    }
}

/// Bytes that each byte of a text takes in a string of JSON.
const WIDTHS: [u8; 256] = {
    let mut widths = [1; 256];
    let mut byte = 0;
    while byte < 0x20 {
        widths[byte] = match byte as u8 {
            b'\n' | b'\r' | b'\t' | 0x8 | 0xc => 2,
            _ => 6,
        };
        byte += 1;
    }
    widths[b'"' as usize] = 2;
    widths[b'\\' as usize] = 2;
    widths
};

/// Bytes that a text takes in a string of JSON.
fn written(text: &str) -> usize {
    text.bytes().map(|byte| usize::from(WIDTHS[usize::from(byte)])).sum()
}

/// The inside of a string of JSON.
pub fn escaped<'a>(text: &str, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    scratch.clear();
    // A string cannot fail to be JSON, nor memory to be written to.
    let _ = serde_json::to_writer(&mut *scratch, text);
    scratch.get(1..scratch.len().saturating_sub(1)).unwrap_or_default()
}
