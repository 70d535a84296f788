//! A real OCI registry on loopback, and small images for it. Versions of an image differ in the files at their root,
//! which programs can read.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::harness::{eventually, output, unique_name};
use crate::leftovers::{list, podman, rename};

/// What most images are made from: a shell and busybox.
pub const SHELL: &str = "localhost/coderunner-bash:latest";
/// An image with nothing in it.
pub const EMPTY: &str = "scratch";

/// Label of all images made here; its value is the name that they were made for.
const LABEL: &str = "io.coderunner.test";

/// A registry. Dropping it ends it.
pub struct Registry {
    dir: TempDir,
    /// Where podman is told that this registry speaks plain HTTP.
    conf: String,
    address: SocketAddr,
    process: RefCell<Option<Child>>,
}

impl Registry {
    /// Starts an empty one on a free port.
    pub fn start() -> Registry {
        let dir = TempDir::with_prefix("coderunner-test-registry-").unwrap();
        let mut registry = Registry {
            conf: dir.path().join("registries.conf").to_str().unwrap().to_owned(),
            dir,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            process: RefCell::new(None),
        };
        registry.address = registry.listen();
        let insecure = format!("[[registry]]\nlocation = \"{}\"\ninsecure = true\n", registry.address);
        fs::write(&registry.conf, insecure).unwrap();
        registry
    }

    /// Environment with which podman can use it.
    pub fn env(&self) -> [(&'static str, &str); 1] {
        [("CONTAINERS_REGISTRIES_CONF", &self.conf)]
    }

    /// Takes it down. What was pushed stays.
    pub fn go_down(&self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Takes it up again, at the same address.
    pub fn come_up(&self) {
        assert_eq!(self.listen(), self.address);
    }

    /// The name of an image here; nothing is pushed yet.
    pub fn image(&self) -> Image {
        Image { name: format!("{}/{}:latest", self.address, unique_name()) }
    }

    /// Builds a version of an image and pushes it: only the registry has it then. Returns its id.
    pub fn push(&self, image: &Image, base: &str, files: &[(&str, &str)]) -> String {
        let local = format!("localhost/coderunner-{}:latest", unique_name());
        let id = build(&local, &image.name, base, "", files);
        podman(&["push", "--quiet", "--tls-verify=false", "--", &local, &image.name]);
        let removed = rename(&["rmi", "--", &local]);
        assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
        id
    }

    /// How often an image's manifest was fetched: what registries count as pulls.
    pub fn pulls(&self, image: &Image) -> usize {
        let path = image.name.split(['/', ':']).rev().nth(1).unwrap();
        let fetched = format!("\"GET /v2/{path}/manifests/");
        let accesses = fs::read_to_string(self.accesses()).unwrap();
        accesses.lines().filter(|line| line.contains(&fetched)).count()
    }

    /// What it was asked for.
    fn accesses(&self) -> PathBuf {
        self.dir.path().join("accesses")
    }

    fn listen(&self) -> SocketAddr {
        let (config, log) = (self.dir.path().join("config.yml"), self.dir.path().join("log"));
        let text = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: false}}}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '{}', secret: test}}\n",
            self.dir.path().join("storage").display(),
            self.address
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new("docker-registry");
        command
            .arg("serve")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(fs::File::options().append(true).create(true).open(self.accesses()).unwrap())
            .stderr(fs::File::create(&log).unwrap());
        // SAFETY: prctl is async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        *self.process.borrow_mut() = Some(command.spawn().unwrap());
        eventually("the registry listens", || {
            let log = fs::read_to_string(&log).unwrap();
            let ended = self.process.borrow_mut().as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the registry ended: {log}");
            let address = log.split_once("listening on ")?.1;
            let end = address.find(|c: char| !(c.is_ascii_digit() || ".:".contains(c)))?;
            Some(address[..end].parse().unwrap())
        })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.go_down();
    }
}

/// An image's name. Dropping it removes whatever podman still has of it.
pub struct Image {
    /// What a configuration calls it.
    pub name: String,
}

impl Image {
    /// One that no registry has.
    pub fn local() -> Image {
        Image { name: format!("localhost/coderunner-{}:latest", unique_name()) }
    }

    /// Builds a version of it where it is. Returns its id.
    pub fn build(&self, files: &[(&str, &str)]) -> String {
        build(&self.name, &self.name, SHELL, "", files)
    }

    /// Builds a version of it with a further step. Returns its id.
    pub fn build_with(&self, step: &str) -> String {
        build(&self.name, &self.name, SHELL, step, &[])
    }

    /// Builds a version of it with a further step, from another image.
    pub fn build_from(&self, base: &Image, step: &str) {
        build(&self.name, &self.name, &base.name, step, &[]);
    }

    /// Id of the version that podman knows by the name; `None` where it knows none.
    pub fn id(&self) -> Option<String> {
        let inspect = ["image", "inspect", "--format", "{{.Id}}", "--", &self.name];
        eventually("podman knows the name or does not", || {
            let output = output(Command::new("podman").args(inspect), b"");
            if output.status.success() {
                return Some(Some(String::from_utf8(output.stdout).unwrap().trim().to_owned()));
            }
            // It fails otherwise where another image is made or deleted meanwhile.
            let said = String::from_utf8_lossy(&output.stderr);
            (said.contains("image not known") && !said.contains("reading image")).then_some(None)
        })
    }

    /// Ids of all versions that podman has, also of those without a name.
    pub fn stored(&self) -> BTreeSet<String> {
        let filter = format!("label={LABEL}={}", self.name);
        let ids = list(&["images", "--all", "--quiet", "--no-trunc", "--filter", &filter]);
        ids.iter().map(|id| id.trim_start_matches("sha256:").to_owned()).collect()
    }

    /// Waits until podman has these versions and no others.
    pub fn wait_stored(&self, ids: &[&String]) {
        let ids: BTreeSet<String> = ids.iter().map(|id| (*id).clone()).collect();
        eventually(&format!("podman has {ids:?} of {}", self.name), || (self.stored() == ids).then_some(()));
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Also in a test that failed, so nothing here may panic.
        let filter = format!("label={LABEL}={}", self.name);
        let list = ["images", "--all", "--quiet", "--no-trunc", "--filter", &filter];
        let Ok(list) = Command::new("podman").args(list).output() else {
            return;
        };
        for id in String::from_utf8_lossy(&list.stdout).lines() {
            let _ = Command::new("podman").args(["rmi", "--force", "--", id]).output();
        }
    }
}

fn build(name: &str, label: &str, base: &str, step: &str, files: &[(&str, &str)]) -> String {
    let dir = TempDir::with_prefix("coderunner-test-build-").unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    for (file, content) in files {
        fs::write(root.join(file), content).unwrap();
    }
    // Times of files are whole seconds: two images could share a layer, and go wrong when either is deleted.
    fs::write(root.join("unique"), unique_name()).unwrap();
    let recipe = format!("FROM {base}\nLABEL {LABEL}={label}\n{step}\nCOPY root /\n");
    fs::write(dir.path().join("Containerfile"), recipe).unwrap();
    let context = dir.path().to_str().unwrap();
    let args = ["build", "--quiet", "--layers=false", "--pull=never", "--network=none", "--tag", name, context];
    let built = eventually("podman builds an image", || {
        let built = output(Command::new("podman").args(args), b"");
        // It loses its way where another image is deleted meanwhile.
        (!String::from_utf8_lossy(&built.stderr).contains("layer not known")).then_some(built)
    });
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    String::from_utf8(built.stdout).unwrap().trim().to_owned()
}
