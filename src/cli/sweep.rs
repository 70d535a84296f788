//! `coderunner sweep`: removes the containers and job directories that a killed server has left behind.

use crate::cli::session::EngineSession;
use crate::config::Settings;
use crate::sandbox::engine::EngineKind;

/// Removes what a killed server of this instance has left behind; refuses while the instance runs.
pub(super) async fn sweep(mut settings: Settings) -> anyhow::Result<()> {
    // A sweep makes no sandbox, so it needs no delegated cgroup, which the direct engine would take.
    settings.engine = EngineKind::Podman;
    EngineSession::open(&settings)?.close().await;
    Ok(())
}
