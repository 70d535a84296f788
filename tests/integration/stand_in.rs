//! Stand-ins for podman: a script that may fail, wait or hang before it becomes the real one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::harness::output;

/// A directory with a `podman` in it, and with files that the script looks for.
pub struct StandIn {
    dir: TempDir,
}

impl StandIn {
    /// `script` is for sh and runs in the stand-in's directory. Where it neither exits nor hangs, the real podman
    /// takes over.
    pub fn new(script: &str) -> StandIn {
        StandIn::write(|dir| format!("(cd {} || exit\n{script}\n) || exit", dir.display()))
    }

    /// Like [`StandIn::new`], but this verb is answered with a line and nothing else.
    pub fn answering(verb: &str, line: &str, script: &str) -> StandIn {
        StandIn::write(|dir| {
            format!(
                "[ \"$1\" != {verb} ] || {{ echo '{line}'; exit; }}\n(cd {} || exit\n{script}\n) || exit",
                dir.display()
            )
        })
    }

    /// Replaces arguments by others on their way to the real podman, or leaves them out where the other is empty.
    pub fn replacing(changes: &[(&str, &str)]) -> StandIn {
        let cases: String = changes.iter().map(|(from, to)| format!("{from}) arg={to} ;;\n")).collect();
        StandIn::write(|_| {
            format!("for arg do\nshift\ncase $arg in\n{cases}esac\n[ -z \"$arg\" ] || set -- \"$@\" \"$arg\"\ndone")
        })
    }

    /// Writes a script that ends as the real podman.
    fn write(script: impl Fn(&Path) -> String) -> StandIn {
        let dir = TempDir::with_prefix("coderunner-test-podman-").unwrap();
        let text = format!("#!/bin/sh\n{}\nexec {} \"$@\"\n", script(dir.path()), real().display());
        let stand_in = StandIn { dir };
        // By another process: a thread that starts one of its own meanwhile would keep the file open for writing,
        // and what is being written cannot be executed.
        let written = output(Command::new("dd").arg(format!("of={}", stand_in.program().display())), text.as_bytes());
        assert!(written.status.success());
        fs::set_permissions(stand_in.program(), fs::Permissions::from_mode(0o755)).unwrap();
        stand_in
    }

    /// Where it is, for PATH.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The script itself.
    pub fn program(&self) -> PathBuf {
        self.dir.path().join("podman")
    }

    /// As a line of a configuration.
    pub fn config(&self) -> String {
        format!("podman = {:?}\n", self.program())
    }

    /// Puts a file there that the script looks for.
    pub fn put(&self, name: &str) {
        fs::write(self.dir.path().join(name), "").unwrap();
    }

    /// Takes it away.
    pub fn take(&self, name: &str) {
        fs::remove_file(self.dir.path().join(name)).unwrap();
    }
}

fn real() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut programs = std::env::split_paths(&path).map(|dir| dir.join("podman"));
    programs.find(|program| program.exists()).expect("no podman on PATH")
}
