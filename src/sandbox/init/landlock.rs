//! A second wall around programs, where the kernel has Landlock: they change files in their own directories and write to
//! their devices, and nowhere else, whatever a mount allows; /proc and /sys among what is left. They signal nobody
//! outside of their stage, connect to no abstract socket outside of it, and to no port.
//!
//! Reading and executing are left to mounts and modes, which is where an image says who may.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};

use crate::model::rootfs::{DEV, DEVICES};

pub use landlock::RulesetCreated as Rules;

/// The newest version that this was written for (Linux 6.12); a kernel with an older one keeps what it knows of it.
const KNOWN: ABI = ABI::V6;

/// The rules, before there is a program. Where the kernel has no Landlock they hold nothing.
///
/// # Errors
/// If the kernel refuses them for another reason.
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
        // What is not there cannot be written to either.
        if let Ok(opened) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(opened, access))?;
        }
    }
    Ok(rules)
}
