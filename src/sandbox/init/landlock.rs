//! Landlock rules, a second line of defence around programs on kernels that have Landlock.
//!
//! Programs can change files only in their writable directories, and write only to their devices, whatever a mount
//! allows. Writing anywhere else is denied, including /proc and /sys. Programs cannot signal processes or connect to
//! abstract sockets outside of their stage, and cannot use any TCP port.
//!
//! The rules do not cover reading and executing: mounts and file modes, which come from the image, decide on these.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};

use crate::model::rootfs::{DEV, DEVICES};

pub use landlock::RulesetCreated as Rules;

/// The newest ABI version that these rules use (Linux 6.12). A kernel with an older version enforces the part that it
/// knows.
const KNOWN: ABI = ABI::V6;

/// Creates the rules. On a kernel without Landlock they have no effect.
///
/// # Errors
/// If the kernel has Landlock and refuses the rules.
pub fn rules(writable: &[&str]) -> Result<Rules, RulesetError> {
    let change = AccessFs::from_write(KNOWN);
    let device = AccessFs::WriteFile | AccessFs::IoctlDev;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(change)?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    let directories = writable.iter().map(|path| (PathBuf::from(path), change));
    let devices = DEVICES.iter().map(|name| (Path::new(DEV).join(name), device));
    for (path, access) in directories.chain(devices) {
        // A path that does not exist needs no rule.
        if let Ok(opened) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(opened, access))?;
        }
    }
    Ok(rules)
}
