//! What the server checks of its host when it starts.

use anyhow::bail;
use tokio_util::sync::CancellationToken;

use crate::cli::doctor;
use crate::cli::workshop::Workshop;
use crate::sandbox::SandboxError;
use crate::sandbox::podman::Podman;

/// Whether the server may go on where limits are required.
pub(super) enum Limits {
    /// The kernel enforces them, or nothing can be said yet: each sandbox is checked when it is made.
    NotRefused,
    /// The kernel does not enforce them.
    Unlimited(SandboxError),
    /// A signal came before this was known.
    Interrupted,
}

/// Checks that the kernel enforces the limits of sandboxes, by making one, until `stop`.
pub(super) async fn require_limits(workshop: &Workshop, stop: &CancellationToken) -> anyhow::Result<Limits> {
    let trying = async {
        // What podman says of the host need not be what a sandbox gets.
        match report(&workshop.podman, workshop.delegated, true).await? {
            true => anyhow::Ok(doctor::require_limits(workshop).await),
            false => Ok(Ok(())),
        }
    };
    Ok(match stop.run_until_cancelled(trying).await.transpose()? {
        None => Limits::Interrupted,
        Some(Err(refusal @ SandboxError::Unlimited(_))) => Limits::Unlimited(refusal),
        Some(Err(error)) => {
            tracing::error!(%error, "cannot check the limits at start; each sandbox is checked when it is made");
            Limits::NotRefused
        }
        Some(Ok(())) => Limits::NotRefused,
    })
}

/// Logs what podman says of this host. Refuses a host that cannot limit containers where limits are required; returns
/// whether podman works.
pub(super) async fn report(podman: &Podman, delegated: bool, require_limits: bool) -> anyhow::Result<bool> {
    let info = match podman.info().await {
        Ok(info) => info,
        Err(error) => {
            // It may work again later: until then requests are refused with the reason.
            tracing::error!(%error, "podman does not work on this host");
            return Ok(false);
        }
    };
    // Beside this, each sandbox tells which limits it sees.
    let missing = if delegated { Vec::new() } else { info.missing_controllers() };
    tracing::info!(podman = info.version, runtime = info.runtime, storage = info.driver, cgroups = info.cgroup_version);
    if !missing.is_empty() && require_limits {
        bail!(
            "this host cannot limit {} of containers (cgroup {}), and require_limits is set. `coderunner doctor` says \
             how to mend it",
            missing.join(", "),
            info.cgroup_version
        );
    }
    Ok(true)
}
