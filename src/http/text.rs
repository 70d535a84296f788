//! Program output in a response: decoded and escaped piece by piece as it is sent, so that no second copy of it is held
//! in memory.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::model::job::Stage;
use crate::model::outcome::{Outcome, StageOutcome};
use crate::model::output::{Output, Position, Stream};

/// Bytes that are decoded at a time. JSON takes at most six times as much.
const PIECE: usize = 4096;

/// Most bytes that a piece takes as JSON: a control character takes six bytes, an invalid byte three.
pub const MAX_PIECE_JSON: usize = (PIECE + 4) * 6;

/// Prefix of the string that stands for a text while the rest of the JSON is serialized; its number follows. It is a
/// noncharacter, with which no other string of a response starts.
const PLACEHOLDER: &str = "\u{10ffff}";

/// The output of a stage as a string of a response.
#[derive(Debug, Clone, Default)]
pub enum Text {
    /// Empty: the stage did not run.
    #[default]
    Nothing,
    /// The output from this source.
    Printed(Source),
    /// Stands for the text of this number, which was taken out.
    Placeholder(usize),
}

/// Where a text comes from.
#[derive(Debug, Clone)]
pub struct Source {
    outcome: Arc<Outcome>,
    stage: Stage,
    /// One stream, or both in order of arrival.
    stream: Option<Stream>,
    /// Notes appended to the output.
    notes: String,
    /// Most bytes that the text may take as JSON.
    max_json: usize,
}

/// Responses whose texts can be taken out and serialized separately.
pub trait Texts: Serialize {
    /// Calls `visit` for each text, in serialization order.
    fn each_text(&mut self, visit: &mut dyn FnMut(&mut Text));
}

/// A part of the JSON of a response: a text, or what is around the texts.
#[derive(Debug)]
pub enum Part {
    /// Serialized JSON.
    Json(Vec<u8>),
    /// A text, to be escaped; the quotes belong to the parts around it.
    Text(Source),
}

/// The order of an object's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fields {
    /// As the type declares them.
    AsDeclared,
    /// By their names, as in a [`serde_json::Value`].
    Sorted,
}

impl Text {
    /// The output of one stream of a stage, or of both. Empty if the stage did not run.
    pub fn new(outcome: &Arc<Outcome>, stage: Stage, stream: Option<Stream>) -> Text {
        let source = Source { outcome: Arc::clone(outcome), stage, stream, notes: String::new(), max_json: usize::MAX };
        if source.output().is_some() { Text::Printed(source) } else { Text::Nothing }
    }

    /// Both streams of a stage, followed by notes if it was cut short or output was left out.
    pub fn explained(outcome: &Arc<Outcome>, stage: Stage) -> Text {
        let mut text = Text::new(outcome, stage, None);
        if let Text::Printed(source) = &mut text {
            source.notes = outcome.stage(stage).and_then(StageOutcome::notes_after).unwrap_or_default();
        }
        text
    }

    /// Cuts the text to `max_json` bytes of JSON. Returns whether anything was left out.
    pub fn cut(&mut self, max_json: usize) -> bool {
        let Text::Printed(source) = self else { return false };
        // It fits even if every byte is escaped.
        if source.kept().saturating_mul(6) <= max_json {
            return false;
        }
        source.max_json = max_json;
        let mut reader = Reader::new(source);
        while reader.next(source).is_some() {}
        reader.cut
    }

    /// Length of the text before decoding, in bytes.
    pub fn kept(&self) -> usize {
        match self {
            Text::Printed(source) => source.kept(),
            Text::Nothing | Text::Placeholder(_) => 0,
        }
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Text::Printed(source) => serializer.collect_str(source),
            Text::Nothing => serializer.serialize_str(""),
            Text::Placeholder(number) => serializer.collect_str(&format_args!("{PLACEHOLDER}{number}")),
        }
    }
}

impl Source {
    fn output(&self) -> Option<&Output> {
        self.outcome.stage(self.stage).map(|stage| &stage.output)
    }

    fn kept(&self) -> usize {
        let kept = self.output().map_or(0, |output| self.stream.map_or(output.kept(), |stream| output.kept_of(stream)));
        kept + self.notes.len()
    }

    /// Length of the text as JSON without quotes. Reads the whole text, and yields to other tasks while doing so.
    pub async fn json_len(&self) -> usize {
        let (mut reader, mut length) = (Reader::new(self), 0);
        while let Some(piece) = reader.next(self) {
            length += json_len(&piece);
            tokio::task::consume_budget().await;
        }
        length
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut reader = Reader::new(self);
        while let Some(piece) = reader.next(self) {
            f.write_str(&piece)?;
        }
        Ok(())
    }
}

/// Serializes a value, with its texts as separate parts.
pub fn split(value: &mut impl Texts, fields: Fields) -> serde_json::Result<Vec<Part>> {
    let mut texts = Vec::new();
    value.each_text(&mut |text| {
        let placeholder = Text::Placeholder(texts.len());
        match std::mem::replace(text, placeholder) {
            Text::Printed(source) => texts.push(Some(source)),
            other => *text = other,
        }
    });
    let template = match fields {
        Fields::AsDeclared => serde_json::to_vec(value)?,
        Fields::Sorted => serde_json::to_vec(&serde_json::to_value(value)?)?,
    };
    let begin = [b"\"", PLACEHOLDER.as_bytes()].concat();
    let (mut parts, mut from, mut at) = (Vec::with_capacity(texts.len() * 2 + 1), 0, 0);
    while let Some(found) = template[at..].windows(begin.len()).position(|window| window == begin) {
        let number = at + found + begin.len();
        at = template[number..].iter().position(|byte| *byte == b'"').map_or(template.len(), |end| number + end);
        let named = std::str::from_utf8(&template[number..at]).ok().and_then(|number| number.parse::<usize>().ok());
        if let Some(text) = named.and_then(|number| texts.get_mut(number)?.take()) {
            // The quotes stay in the JSON parts.
            parts.extend([Part::Json(template[from..=number - begin.len()].to_vec()), Part::Text(text)]);
            from = at;
        }
    }
    parts.push(Part::Json(template[from..].to_vec()));
    Ok(parts)
}

/// Decodes a text piece by piece. The result is that of `String::from_utf8_lossy` for the whole text; if output was
/// left out, an incomplete character at the end is dropped.
#[derive(Debug)]
pub struct Reader {
    position: Position,
    /// The start of a character that continues in the next piece.
    partial: Vec<u8>,
    ended: bool,
    /// Bytes of JSON that the text may still take.
    left: usize,
    /// Whether the text was cut at that limit.
    cut: bool,
}

impl Reader {
    /// A reader at the start of a text.
    pub fn new(source: &Source) -> Reader {
        Reader { position: Position::default(), partial: Vec::new(), ended: false, left: source.max_json, cut: false }
    }

    /// The next piece; `None` at the end.
    pub fn next(&mut self, source: &Source) -> Option<String> {
        if self.ended {
            return None;
        }
        let mut text = String::new();
        let mut bytes = std::mem::take(&mut self.partial);
        if let Some(output) = source.output() {
            while bytes.len() < PIECE {
                let (_, read) = output.read(&mut self.position, source.stream, PIECE - bytes.len());
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
                (true, false) => self.partial = invalid.to_vec(),
                (true, true) if source.is_truncated() => {}
                _ if invalid.is_empty() => {}
                _ => text.push(char::REPLACEMENT_CHARACTER),
            }
        }
        if self.ended {
            text += &source.notes;
        }
        if source.max_json != usize::MAX {
            self.truncate_to_limit(&mut text);
        }
        Some(text)
    }

    /// Shortens a piece to the bytes of JSON that are left.
    fn truncate_to_limit(&mut self, text: &mut String) {
        let all = json_len(text);
        if all <= self.left {
            self.left -= all;
            return;
        }
        (self.ended, self.cut) = (true, true);
        let exceeds = |(_, character): &(usize, char)| {
            let left = self.left.checked_sub(json_len(character.encode_utf8(&mut [0; 4])));
            left.map(|left| self.left = left).is_none()
        };
        let end = text.char_indices().find(exceeds).map_or(text.len(), |(at, _)| at);
        text.truncate(end);
    }
}

impl Source {
    fn is_truncated(&self) -> bool {
        self.output().is_some_and(|output| self.stream.map_or(output.truncated(), |stream| output.truncated_of(stream)))
    }
}

/// Bytes that each byte of UTF-8 takes in a JSON string.
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

/// Bytes that a text takes in a JSON string.
fn json_len(text: &str) -> usize {
    text.bytes().map(|byte| usize::from(WIDTHS[usize::from(byte)])).sum()
}

/// A text as the inside of a JSON string.
pub fn escaped<'a>(text: &str, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    scratch.clear();
    // Serializing a string to memory cannot fail.
    let _ = serde_json::to_writer(&mut *scratch, text);
    scratch.get(1..scratch.len().saturating_sub(1)).unwrap_or_default()
}
