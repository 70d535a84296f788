//! A fake podman: a script that may fail, wait or hang before it executes the real podman.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::harness::output;

/// A directory with a script named `podman`, and with files that act as flags for the script.
pub struct FakePodman {
    dir: TempDir,
}

impl FakePodman {
    /// Runs `script` with sh in its own directory before each call. If the script neither exits nor hangs, the real
    /// podman is called.
    pub fn new(script: &str) -> FakePodman {
        FakePodman::write(|dir| format!("(cd {} || exit\n{script}\n) || exit", dir.display()))
    }

    /// Like [`FakePodman::new`], but answers this verb with a fixed line instead of calling the real podman.
    pub fn with_answer(verb: &str, line: &str, script: &str) -> FakePodman {
        FakePodman::write(|dir| {
            format!(
                "[ \"$1\" != {verb} ] || {{ echo '{line}'; exit; }}\n(cd {} || exit\n{script}\n) || exit",
                dir.display()
            )
        })
    }

    /// Replaces arguments on their way to the real podman; an empty replacement drops the argument.
    pub fn replacing(changes: &[(&str, &str)]) -> FakePodman {
        let cases: String = changes.iter().map(|(from, to)| format!("{from}) arg={to} ;;\n")).collect();
        FakePodman::write(|_| {
            format!("for arg do\nshift\ncase $arg in\n{cases}esac\n[ -z \"$arg\" ] || set -- \"$@\" \"$arg\"\ndone")
        })
    }

    /// Writes a script that executes the real podman at its end.
    fn write(script: impl Fn(&Path) -> String) -> FakePodman {
        let dir = TempDir::with_prefix("coderunner-test-podman-").unwrap();
        let text = format!("#!/bin/sh\n{}\nexec {} \"$@\"\n", script(dir.path()), real().display());
        let fake = FakePodman { dir };
        // Another process writes the file: if this one did, a child that another thread forks meanwhile could inherit
        // the descriptor, and a file that is open for writing cannot be executed (ETXTBSY).
        let written = output(Command::new("dd").arg(format!("of={}", fake.program().display())), text.as_bytes());
        assert!(written.status.success());
        fs::set_permissions(fake.program(), fs::Permissions::from_mode(0o755)).unwrap();
        fake
    }

    /// The directory of the script, to be put on PATH.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The script itself.
    pub fn program(&self) -> PathBuf {
        self.dir.path().join("podman")
    }

    /// A line of configuration that makes a server use it.
    pub fn config(&self) -> String {
        format!("podman = {:?}\n", self.program())
    }

    /// Creates a file that the script looks for.
    pub fn set_flag(&self, name: &str) {
        fs::write(self.dir.path().join(name), "").unwrap();
    }

    /// Removes the file.
    pub fn clear_flag(&self, name: &str) {
        fs::remove_file(self.dir.path().join(name)).unwrap();
    }
}

fn real() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut programs = std::env::split_paths(&path).map(|dir| dir.join("podman"));
    programs.find(|program| program.exists()).expect("no podman on PATH")
}
