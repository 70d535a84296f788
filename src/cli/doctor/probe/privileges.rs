//! Checks the privileges of a program: its ids, capabilities and no-new-privileges.

use std::fs;
use std::io;

use nix::unistd::{Uid, getgroups, getresgid, getresuid, setuid};

use crate::cli::doctor::wall::{Wall, WallResult};

/// Checks the ids of this process, and tries to become root.
pub(super) fn uid() -> io::Result<WallResult> {
    let (uids, gids) = (getresuid()?, getresgid()?);
    let ids = [uids.real, uids.effective, uids.saved].map(Uid::as_raw);
    let groups = [gids.real, gids.effective, gids.saved].map(|gid| gid.as_raw());
    let others = getgroups()?;
    let own = ids == groups && ids.iter().all(|id| *id == ids[0] && *id != 0) && others.is_empty();
    let stays = setuid(Uid::from_raw(0)).is_err();
    let mut seen = format!("uid {}, gid {}, {} other groups", ids[0], groups[0], others.len());
    if !stays {
        seen += ", became root";
    }
    Ok(WallResult::new(Wall::Uid, own && stays, "a uid and gid of its own, no groups, no way to root", seen))
}

/// Checks that this process has no capabilities.
pub(super) fn capabilities() -> io::Result<WallResult> {
    let mut holes = Vec::new();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let value = status(set)?;
        if value.chars().any(|digit| digit != '0') {
            holes.push(format!("{set} {value}"));
        }
    }
    Ok(WallResult::from_holes(Wall::Capabilities, "none", &holes))
}

/// Checks that programs cannot gain privileges by execve.
pub(super) fn no_new_privileges() -> io::Result<WallResult> {
    let value = status("NoNewPrivs")?;
    let seen = if value == "1" { "set".into() } else { format!("NoNewPrivs {value}") };
    Ok(WallResult::new(Wall::NoNewPrivileges, value == "1", "set", seen))
}

/// A field of `/proc/self/status`.
pub(super) fn status(field: &str) -> io::Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let value = lines.find(|(name, _)| *name == field).map(|(_, value)| value.trim().to_owned());
    Ok(value.unwrap_or_else(|| "missing".into()))
}
