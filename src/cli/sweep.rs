//! `coderunner sweep`: removes what a server that was killed has left behind.

use crate::cli::workshop::Workshop;
use crate::config::Settings;
use crate::sandbox::engine::EngineKind;

/// Removes what a server that was killed has left behind; refuses while one of the same name runs.
pub(super) async fn sweep(mut settings: Settings) -> anyhow::Result<()> {
    // No sandbox is made, so the cgroup that the direct engine takes is not needed.
    settings.engine = EngineKind::Podman;
    Workshop::open(&settings)?.close().await;
    Ok(())
}
