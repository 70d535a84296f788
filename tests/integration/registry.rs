//! A real OCI registry on loopback, and small images for it. Versions of an image differ in the files in their root
//! directory, which programs can read.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Pending, Reply, head};
use crate::harness::{eventually, output, unique_name};
use crate::leftovers::{list, podman};

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
    /// What it has of [`SHELL`].
    shell: OnceCell<Content>,
}

/// The configuration of an image and the descriptors of its layers.
#[derive(Clone)]
struct Content {
    config: Value,
    layers: Vec<Value>,
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

impl Registry {
    /// Starts an empty registry on a free port.
    pub fn start() -> Registry {
        let dir = TempDir::with_prefix("coderunner-test-registry-").unwrap();
        let mut registry = Registry {
            conf: dir.path().join("registries.conf").to_str().unwrap().to_owned(),
            dir,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            process: RefCell::new(None),
            shell: OnceCell::new(),
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

    /// Makes a version of an image: a base and a layer with these files. Returns its id. `podman build` and `podman push`
    /// would take many times as long.
    pub fn push(&self, image: &Image, base: &str, files: &[(&str, &str)]) -> String {
        let repository = image.repository();
        let mut content =
            if base == EMPTY { Content::empty() } else { self.shell.get_or_init(|| self.push_shell()).clone() };
        for layer in &content.layers {
            let mount = format!("{repository}/blobs/uploads/?mount={}&from=shell", layer["digest"].as_str().unwrap());
            assert_eq!(self.ask("POST", &mount, &[], b"").status, 201);
        }
        let root = context(files);
        let names = ["unique"].into_iter().chain(files.iter().map(|(name, _)| *name));
        let archive = ["--create", "--file=-", "--owner=0", "--group=0", "--numeric-owner", "--directory"];
        let archive = output(Command::new("tar").args(archive).arg(root.path().join("root")).args(names), b"");
        assert!(archive.status.success(), "{}", String::from_utf8_lossy(&archive.stderr));
        let layer = self.upload(repository, "application/vnd.oci.image.layer.v1.tar", &archive.stdout);
        content.config["rootfs"]["diff_ids"].as_array_mut().unwrap().push(layer["digest"].clone());
        content.config["config"]["Labels"][LABEL] = image.name.as_str().into();
        // One entry for each layer, or none at all.
        content.config.as_object_mut().unwrap().remove("history");
        content.layers.push(layer);
        let config = content.config.to_string();
        let config = self.upload(repository, "application/vnd.oci.image.config.v1+json", config.as_bytes());
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": content.layers});
        let manifest = manifest.to_string();
        let kind = [("Content-Type", MANIFEST)];
        assert_eq!(self.ask("PUT", &format!("{repository}/manifests/latest"), &kind, manifest.as_bytes()).status, 201);
        config["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned()
    }

    /// Pushes the local image [`SHELL`].
    fn push_shell(&self) -> Content {
        let name = format!("{}/shell:latest", self.address);
        podman(&["push", "--quiet", "--format=oci", "--tls-verify=false", "--", SHELL, &name]);
        let manifest = self.ask("GET", "shell/manifests/latest", &[("Accept", MANIFEST)], b"").json();
        let config = format!("shell/blobs/{}", manifest["config"]["digest"].as_str().unwrap());
        let config = self.ask("GET", &config, &[], b"").json();
        Content { config, layers: manifest["layers"].as_array().unwrap().clone() }
    }

    /// Uploads a blob and returns its descriptor.
    fn upload(&self, repository: &str, kind: &str, blob: &[u8]) -> Value {
        let sum = String::from_utf8(output(&mut Command::new("sha256sum"), blob).stdout).unwrap();
        let digest = format!("sha256:{}", sum.split_whitespace().next().unwrap());
        let begun = self.ask("POST", &format!("{repository}/blobs/uploads/"), &[], b"");
        let (_, place) = begun.header("location").unwrap().split_once("/v2/").unwrap();
        let kind_of_body = [("Content-Type", "application/octet-stream")];
        assert_eq!(self.ask("PUT", &format!("{place}&digest={digest}"), &kind_of_body, blob).status, 201);
        json!({"mediaType": kind, "digest": digest, "size": blob.len()})
    }

    /// Sends a request to the registry's API.
    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let head = head(method, &format!("/v2/{path}"), headers, body.len());
        Pending::send(self.address, &[head.as_bytes(), body].concat()).reply()
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

impl Content {
    /// An image without layers.
    fn empty() -> Content {
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let rootfs = json!({"type": "layers", "diff_ids": []});
        let config = json!({"architecture": architecture, "os": "linux", "config": {}, "rootfs": rootfs});
        Content { config, layers: Vec::new() }
    }
}

impl Image {
    /// Its name in its registry.
    fn repository(&self) -> &str {
        let (_, name) = self.name.split_once('/').unwrap();
        name.strip_suffix(":latest").unwrap()
    }

    /// A new image name that belongs to no registry.
    pub fn local() -> Image {
        Image { name: format!("localhost/coderunner-{}:latest", unique_name()) }
    }

    /// Builds a version locally. Returns its id.
    pub fn build(&self, files: &[(&str, &str)]) -> String {
        build(&self.name, SHELL, "", files)
    }

    /// Builds a version locally, with an additional build step. Returns its id.
    pub fn build_with(&self, step: &str) -> String {
        build(&self.name, SHELL, step, &[])
    }

    /// Builds a version locally from another image, with an additional build step.
    pub fn build_from(&self, base: &Image, step: &str) {
        build(&self.name, &base.name, step, &[]);
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

/// A directory in whose directory `root` are these files.
fn context(files: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::with_prefix("coderunner-test-build-").unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    for (file, content) in files {
        fs::write(root.join(file), content).unwrap();
    }
    // File times have a resolution of a second. Without a unique file, two images could share a layer, and one would
    // break when the other is deleted.
    fs::write(root.join("unique"), unique_name()).unwrap();
    dir
}

/// Builds an image locally.
fn build(name: &str, base: &str, step: &str, files: &[(&str, &str)]) -> String {
    let dir = context(files);
    let recipe = format!("FROM {base}\nLABEL {LABEL}={name}\n{step}\nCOPY root /\n");
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
