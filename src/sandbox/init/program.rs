//! The program of a stage: its arguments, its environment, and the paths at which it is looked up.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::execve;

use crate::model::rootfs::WORK_DIR;
use crate::sandbox::init::Environment;
use crate::sandbox::protocol::StageSpec;

/// The search path if the image sets no PATH: the default of the C library.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The command of a stage, prepared for `execve`.
pub(super) struct Program {
    /// Paths at which the program may be, in the order of PATH.
    paths: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// The command of a stage. Its environment has the variables of the image, HOME, and the variables of the stage.
    pub(super) fn new(spec: &StageSpec, environment: &Environment) -> io::Result<Program> {
        let name = spec.argv.first().ok_or(Errno::ENOENT)?;
        let mut env: BTreeMap<OsString, OsString> = environment.iter().cloned().collect();
        env.insert("HOME".into(), WORK_DIR.into());
        env.extend(spec.env.iter().map(|(name, value)| (name.into(), value.into())));
        let path = env.get(OsStr::new("PATH")).cloned().unwrap_or_else(|| DEFAULT_PATH.into());
        let paths = match name.contains('/') {
            true => vec![PathBuf::from(name)],
            false => std::env::split_paths(&path).map(|dir| dir.join(name)).collect(),
        };
        let text = |bytes: Vec<u8>| CString::new(bytes).map_err(io::Error::from);
        Ok(Program {
            paths: paths.into_iter().map(|path| text(path.into_os_string().into_vec())).collect::<Result<_, _>>()?,
            argv: spec.argv.iter().map(|arg| text(arg.clone().into_bytes())).collect::<Result<_, _>>()?,
            env: env
                .iter()
                .map(|(name, value)| text([name.as_bytes(), b"=", value.as_bytes()].concat()))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Replaces this process by the program, or returns why that failed. Like a shell, it prefers another error to
    /// ENOENT.
    pub(super) fn exec(&self) -> io::Error {
        let mut failure = Errno::ENOENT;
        for path in &self.paths {
            let Err(error) = execve(path, &self.argv, &self.env);
            match error {
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => failure = error,
                _ => return error.into(),
            }
        }
        failure.into()
    }
}
