//! `coderunner key`: makes an API key for a client.

use anyhow::Context;

use crate::host::{log, print};
use crate::http::auth::key::new_key;
use crate::model::language;

/// Prints a new key for an owner to stdout, and to stderr the lines of the configuration that accept it.
pub(super) fn key(owner: &str) -> anyhow::Result<()> {
    if !language::is_name(owner) {
        anyhow::bail!("{owner:?} is not a valid owner: use 1 to 32 of a-z, 0-9, -, + and _, a letter first");
    }
    let (key, hash) = new_key().context("cannot read /dev/urandom")?;
    print::stdout(format!("{key}\n"))?;
    log::print(&format!(
        "The key is above and will not be shown again. For the configuration:\n[access.keys]\n{owner} = \"{hash}\""
    ));
    Ok(())
}
