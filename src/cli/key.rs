//! `coderunner key`: makes a key for a client.

use anyhow::Context;

use crate::host::{log, print};
use crate::http::auth::key::new_key;
use crate::model::language;

/// Prints a new key for an owner, and for the operator the line of the configuration that knows it.
pub(super) fn key(owner: &str) -> anyhow::Result<()> {
    if !language::is_name(owner) {
        anyhow::bail!("{owner:?} is no owner: 1 to 32 of a-z, 0-9, -, + and _, a letter first");
    }
    let (key, hash) = new_key().context("cannot read /dev/urandom")?;
    print::stdout(format!("{key}\n"))?;
    log::say(&format!(
        "The key is above; it is shown this once. For the configuration:\n[access.keys]\n{owner} = \"{hash}\""
    ));
    Ok(())
}
