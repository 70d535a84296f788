//! API keys. The server stores only their hashes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use crate::http::auth::parse::{NotValid, as_text};

/// Prefix of all keys, by which secret scanners recognise leaked ones.
const KEY_PREFIX: &str = "crk_";

/// The BLAKE3 hash of a key. Comparison takes constant time, as in `blake3::Hash`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash(blake3::Hash);

impl KeyHash {
    /// The hash of this key.
    pub(super) fn of(key: &str) -> KeyHash {
        KeyHash(blake3::hash(key.as_bytes()))
    }
}

impl FromStr for KeyHash {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<KeyHash, NotValid> {
        // The value may be the key itself, written here by mistake: the message must not contain it.
        let error =
            |_| NotValid { value: "…".into(), allowed: "a hash of 64 hex digits: `coderunner key` makes one" };
        blake3::Hash::from_hex(text).map(KeyHash).map_err(error)
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

as_text!(KeyHash);

/// Makes a new key. Returns the key, for its owner only, and its hash, for the configuration.
pub fn new_key() -> io::Result<(String, KeyHash)> {
    let mut random = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let key = KEY_PREFIX.to_owned() + &URL_SAFE_NO_PAD.encode(random);
    let hash = KeyHash::of(&key);
    Ok((key, hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_long_and_unique() {
        let (one, other) = (new_key().unwrap().0, new_key().unwrap().0);
        assert_ne!(one, other);
        assert!(one.starts_with(KEY_PREFIX) && one.len() == KEY_PREFIX.len() + 43, "{one}");
    }
}
