//! The account that coderunner runs as: an ordinary user, never root.

use anyhow::bail;

/// The command by which root runs coderunner as the packaged account, while its server runs.
pub(super) const AS_ACCOUNT: &str = "setpriv --reuid coderunner --regid coderunner --init-groups env -C / \
     HOME=/var/lib/coderunner XDG_RUNTIME_DIR=/run/coderunner coderunner";

/// Refuses to run as root: its containers would belong to root, with one isolation wall less.
pub(super) fn refuse_root() -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        bail!(
            "coderunner does not run as root: its containers must belong to an ordinary user. As root run \
             `systemctl start coderunner`, and while that runs `{AS_ACCOUNT} …`"
        );
    }
    Ok(())
}
