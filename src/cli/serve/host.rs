//! The server's checks of the host at its start.

use anyhow::bail;
use tokio_util::sync::CancellationToken;

use crate::cli::doctor;
use crate::cli::session::EngineSession;
use crate::sandbox::SandboxError;
use crate::sandbox::podman::Podman;

/// Whether the server may start if limits are required.
pub(super) enum LimitCheck {
    /// The kernel enforces the limits, or the check could not be made: each sandbox is checked again when it is made.
    MayStart,
    /// The kernel does not enforce the limits.
    NotEnforced(SandboxError),
    /// A signal stopped the server during the check.
    Interrupted,
}

/// Checks that the kernel enforces the limits of sandboxes, by making one, until `stop`.
pub(super) async fn require_limits(session: &EngineSession, stop: &CancellationToken) -> anyhow::Result<LimitCheck> {
    let check = async {
        // The limits that podman reports for the host may differ from those of a sandbox, so both are checked.
        match check_podman(&session.podman, session.delegated, true).await? {
            true => anyhow::Ok(doctor::require_limits(session).await),
            false => Ok(Ok(())),
        }
    };
    Ok(match stop.run_until_cancelled(check).await.transpose()? {
        None => LimitCheck::Interrupted,
        Some(Err(refusal @ SandboxError::Unlimited(_))) => LimitCheck::NotEnforced(refusal),
        Some(Err(error)) => {
            tracing::error!(%error, "cannot check the limits at start; each sandbox is checked when it is made");
            LimitCheck::MayStart
        }
        Some(Ok(())) => LimitCheck::MayStart,
    })
}

/// Logs podman's version and the host's properties, and returns whether podman works. Fails if the host cannot limit
/// containers although limits are required.
pub(super) async fn check_podman(podman: &Podman, delegated: bool, require_limits: bool) -> anyhow::Result<bool> {
    let info = match podman.info().await {
        Ok(info) => info,
        Err(error) => {
            // Not fatal: podman may work later, and until then requests are refused with the reason.
            tracing::error!(%error, "podman does not work on this host");
            return Ok(false);
        }
    };
    // Independently of this, each sandbox reports the limits that it sees.
    let missing = if delegated { Vec::new() } else { info.missing_controllers() };
    tracing::info!(podman = info.version, runtime = info.runtime, storage = info.driver, cgroups = info.cgroup_version);
    if !missing.is_empty() && require_limits {
        bail!(
            "this host cannot limit {} of containers (cgroup {}), and require_limits is set. `coderunner doctor` says \
             how to fix it",
            missing.join(", "),
            info.cgroup_version
        );
    }
    Ok(true)
}
