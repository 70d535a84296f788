//! Finds the groups of an image's user, by the same rules as podman.
//!
//! Tools may be in the home directory of the image's user, which only this user and its group may enter. Programs run
//! as a uid that no image contains: they can use these tools through the group.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::libc;
use nix::unistd::Gid;

/// Most bytes to read of a list of users or groups. The lists of distributions have a few KiB.
const MAX_LIST: u64 = 1024 * 1024;

/// Most groups of a user: old kernels allowed no more, and some programs have no room for more.
const MAX_GROUPS: usize = 32;

/// The groups of `user` in the root directory `root`. `user` is `USER[:GROUP]`, by name or by number, in the image's
/// spelling. The result has the groups that `podman run` sets, without group 0. An unknown user has no groups.
pub fn of_user(user: &str, root: &Path) -> Vec<Gid> {
    let read = |name: &str| read_list(&root.join("etc").join(name)).unwrap_or_default();
    // Saves reading the lists for an image that names no user.
    if user.is_empty() {
        return Vec::new();
    }
    let gid_map = std::fs::read_to_string("/proc/self/gid_map").unwrap_or_default();
    let mut gids = find_gids(user, &read("passwd"), &read("group"));
    gids.retain(|gid| *gid != 0 && is_mapped(*gid, &gid_map));
    gids.truncate(MAX_GROUPS);
    gids.into_iter().map(Gid::from_raw).collect()
}

/// Reads a list of users or groups. It is part of the image and may be anything, even a FIFO or a device.
fn read_list(path: &Path) -> io::Result<String> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(MAX_LIST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The group ids of a user, with its primary group first. As in podman, a number is always an id, and the first
/// matching entry counts.
fn find_gids(user: &str, passwd: &str, group: &str) -> Vec<u32> {
    let (user, named_group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    let id = |field: Option<&&str>| field.and_then(|field| field.parse::<u32>().ok());
    let number = user.parse::<u32>().ok();
    let users = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = users.into_iter().find(|entry| match number {
        Some(uid) => id(entry.get(2)) == Some(uid),
        None => entry.first() == Some(&user),
    });
    let groups = || group.lines().map(|line| line.split(':').collect::<Vec<_>>());
    if let Some(name) = named_group.filter(|name| !name.is_empty()) {
        let by_name = || groups().find(|entry| entry.first() == Some(&name)).and_then(|entry| id(entry.get(2)));
        return name.parse().ok().or_else(by_name).into_iter().collect();
    }
    let Some(entry) = entry else { return Vec::new() };
    // Root can enter any directory without a group, and in some images it is a member of all groups.
    if id(entry.get(2)) == Some(0) {
        return Vec::new();
    }
    let is_member = |group: &Vec<&str>| group.get(3).is_some_and(|list| list.split(',').any(|name| name == entry[0]));
    let supplementary = groups().filter(is_member).filter_map(|group| id(group.get(2)));
    id(entry.get(3)).into_iter().chain(supplementary).collect()
}

/// Whether podman's user namespace maps this id. The kernel refuses to set other ids.
fn is_mapped(gid: u32, map: &str) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        matches!(numbers[..], [first, _, count] if (first..first + count).contains(&gid.into()))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nmaker:x:1000:1001::/home/maker:/bin/sh\nbroken\nother:x:7:eight::\n\
                          maker:x:5:5::/:\n1000:x:6:6::/:\n:::::\n";
    const GROUP: &str = "root:x:0:root,maker\nmaker:x:1001:\ntools:x:60:other,maker\nmakers:x:61:makers\nbroken\n\
                         more:x:62:maker\nbad:x:many:maker\n";

    #[test]
    fn groups_match_those_that_podman_assigns() {
        let of = |user| find_gids(user, PASSWD, GROUP);
        for (user, groups) in [
            ("maker", &[1001, 0, 60, 62][..]),
            ("1000", &[1001, 0, 60, 62]),
            ("maker:", &[1001, 0, 60, 62]),
            // A group named by the image is the only one.
            ("maker:tools", &[60]),
            ("1000:61", &[61]),
            ("4000:5000", &[5000]),
            ("root:tools", &[60]),
            ("nobody:tools", &[60]),
            ("maker:nothing", &[]),
            // In neither of the lists.
            ("4000", &[]),
            ("nobody", &[]),
            ("root", &[]),
            ("0", &[]),
            ("other", &[60]),
            ("-1", &[]),
            ("4294967296:4294967296", &[]),
        ] {
            assert_eq!(of(user), groups, "{user}");
        }
    }

    #[test]
    fn root_group_and_unmapped_groups_are_excluded() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/passwd"), "maker:x:1000:0::/:\nother:x:1001:4294967295::/:\n").unwrap();
        let lines: String = (0..100).map(|number| format!("group{number}:x:{number}:other\n")).collect();
        fs::write(dir.path().join("etc/group"), lines).unwrap();
        let of = |user| of_user(user, dir.path()).into_iter().map(Gid::as_raw).collect::<Vec<_>>();
        assert!(of("maker").is_empty());
        assert!(of("maker:0").is_empty());
        assert!(of("maker:root").is_empty());
        assert_eq!(of("other"), (1..=32).collect::<Vec<_>>());
        assert!(is_mapped(65_536, "0 1000 1\n1 100000 65536\n") && !is_mapped(65_537, "0 1000 1\n1 100000 65536\n"));
    }

    #[test]
    fn unreadable_passwd_and_group_files_count_as_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of_user("maker", dir.path()), []);
        let etc = dir.path().join("etc");
        fs::create_dir(&etc).unwrap();
        mkfifo(&etc.join("passwd"), Mode::from_bits_truncate(0o600)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", etc.join("group")).unwrap();
        assert_eq!(of_user("maker", dir.path()), []);
        assert_eq!(of_user("maker:7", dir.path()), [Gid::from_raw(7)]);
        fs::remove_file(etc.join("passwd")).unwrap();
        let filler = "x".repeat(MAX_LIST as usize);
        fs::write(etc.join("passwd"), filler + "\nmaker:x:1:1::/:\n").unwrap();
        assert_eq!(of_user("maker", dir.path()), []);
    }
}
