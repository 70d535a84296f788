//! A real OCI registry on loopback, and small images for it. Versions of an image differ in the files in their root
//! directory, which programs can read.

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

/// The base of most images: a shell and busybox.
pub const SHELL: &str = "localhost/coderunner-bash:latest";
/// The empty base image.
pub const EMPTY: &str = "scratch";

/// Label of all images that are built here; its value is the name of the [`Image`].
const LABEL: &str = "io.coderunner.test";

/// A registry process. Dropping it kills the process.
pub struct Registry {
    dir: TempDir,
    /// Path of the podman configuration that says that this registry uses plain HTTP.
    conf: String,
    address: SocketAddr,
    process: RefCell<Option<Child>>,
}

impl Registry {
    /// Starts an empty registry on a free port.
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

    /// The environment that lets podman use it.
    pub fn env(&self) -> [(&'static str, &str); 1] {
        [("CONTAINERS_REGISTRIES_CONF", &self.conf)]
    }

    /// Stops the registry. Pushed images are kept.
    pub fn stop(&self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts it again at the same address.
    pub fn restart(&self) {
        assert_eq!(self.listen(), self.address);
    }

    /// A new image name in this registry; nothing is pushed yet.
    pub fn image(&self) -> Image {
        Image { name: format!("{}/{}:latest", self.address, unique_name()) }
    }

    /// Builds a version of an image, pushes it, and deletes the local copy. Returns its id.
    pub fn push(&self, image: &Image, base: &str, files: &[(&str, &str)]) -> String {
        let local = format!("localhost/coderunner-{}:latest", unique_name());
        let id = build(&local, &image.name, base, "", files);
        podman(&["push", "--quiet", "--tls-verify=false", "--", &local, &image.name]);
        let removed = rename(&["rmi", "--", &local]);
        assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
        id
    }

    /// How often the manifest of an image was fetched, which is what registries count as pulls.
    pub fn pulls(&self, image: &Image) -> usize {
        let path = image.name.split(['/', ':']).rev().nth(1).unwrap();
        let fetched = format!("\"GET /v2/{path}/manifests/");
        let accesses = fs::read_to_string(self.access_log()).unwrap();
        accesses.lines().filter(|line| line.contains(&fetched)).count()
    }

    /// The access log.
    fn access_log(&self) -> PathBuf {
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
            .stdout(fs::File::options().append(true).create(true).open(self.access_log()).unwrap())
            .stderr(fs::File::create(&log).unwrap());
        // SAFETY: prctl is async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        *self.process.borrow_mut() = Some(command.spawn().unwrap());
        eventually("the registry is listening", || {
            let log = fs::read_to_string(&log).unwrap();
            let ended = self.process.borrow_mut().as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the registry exited: {log}");
            let address = log.split_once("listening on ")?.1;
            let end = address.find(|c: char| !(c.is_ascii_digit() || ".:".contains(c)))?;
            Some(address[..end].parse().unwrap())
        })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The name of an image. Dropping it removes all versions that podman still has.
pub struct Image {
    /// The name as in a configuration.
    pub name: String,
}

impl Image {
    /// A new image name that belongs to no registry.
    pub fn local() -> Image {
        Image { name: format!("localhost/coderunner-{}:latest", unique_name()) }
    }

    /// Builds a version locally. Returns its id.
    pub fn build(&self, files: &[(&str, &str)]) -> String {
        build(&self.name, &self.name, SHELL, "", files)
    }

    /// Builds a version locally, with an additional build step. Returns its id.
    pub fn build_with(&self, step: &str) -> String {
        build(&self.name, &self.name, SHELL, step, &[])
    }

    /// Builds a version locally from another image, with an additional build step.
    pub fn build_from(&self, base: &Image, step: &str) {
        build(&self.name, &self.name, &base.name, step, &[]);
    }

    /// Id of the version that podman has under the name; `None` if there is none.
    pub fn id(&self) -> Option<String> {
        let inspect = ["image", "inspect", "--format", "{{.Id}}", "--", &self.name];
        eventually("podman looks up the image", || {
            let output = output(Command::new("podman").args(inspect), b"");
            if output.status.success() {
                return Some(Some(String::from_utf8(output.stdout).unwrap().trim().to_owned()));
            }
            // podman fails in other ways if another image is created or deleted meanwhile.
            let said = String::from_utf8_lossy(&output.stderr);
            (said.contains("image not known") && !said.contains("reading image")).then_some(None)
        })
    }

    /// Ids of all versions that podman has, including those without a name.
    pub fn stored(&self) -> BTreeSet<String> {
        let filter = format!("label={LABEL}={}", self.name);
        let ids = list(&["images", "--all", "--quiet", "--no-trunc", "--filter", &filter]);
        ids.iter().map(|id| id.trim_start_matches("sha256:").to_owned()).collect()
    }

    /// Waits until podman has exactly these versions.
    pub fn wait_stored(&self, ids: &[&String]) {
        let ids: BTreeSet<String> = ids.iter().map(|id| (*id).clone()).collect();
        eventually(&format!("podman has {ids:?} of {}", self.name), || (self.stored() == ids).then_some(()));
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // This also runs after a failed test, so it must not panic.
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
    // File times have a resolution of a second. Without a unique file, two images could share a layer, and one would
    // break when the other is deleted.
    fs::write(root.join("unique"), unique_name()).unwrap();
    let recipe = format!("FROM {base}\nLABEL {LABEL}={label}\n{step}\nCOPY root /\n");
    fs::write(dir.path().join("Containerfile"), recipe).unwrap();
    let context = dir.path().to_str().unwrap();
    let args = ["build", "--quiet", "--layers=false", "--pull=never", "--network=none", "--tag", name, context];
    let built = eventually("podman builds an image", || {
        let built = output(Command::new("podman").args(args), b"");
        // podman fails with this message if another image is deleted meanwhile.
        (!String::from_utf8_lossy(&built.stderr).contains("layer not known")).then_some(built)
    });
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    String::from_utf8(built.stdout).unwrap().trim().to_owned()
}
