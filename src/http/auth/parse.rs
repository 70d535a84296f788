//! Parsing of settings that are written as text.

/// A value that cannot be parsed, with what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {allowed}")]
pub struct NotValid {
    pub(super) value: String,
    pub(super) allowed: &'static str,
}

/// Implements the conversions that serde needs, in terms of `FromStr` and `Display`.
macro_rules! as_text {
    ($kind:ident) => {
        impl TryFrom<String> for $kind {
            type Error = NotValid;
            fn try_from(text: String) -> Result<$kind, NotValid> {
                text.parse()
            }
        }
        impl From<$kind> for String {
            fn from(value: $kind) -> String {
                value.to_string()
            }
        }
    };
}

pub(super) use as_text;
