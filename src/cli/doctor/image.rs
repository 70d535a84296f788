//! The image and the language of a trial. The image has no programs: the probes are part of this executable, which is
//! mounted into each sandbox.

use std::time::Duration;

use bytesize::ByteSize;
use tar::{Builder, Header};
use tempfile::NamedTempFile;

use crate::cli::doctor::probe::VERB;
use crate::cli::session::EngineSession;
use crate::host::instance::Instance;
use crate::images::names::tag_of;
use crate::model::language::{Language, LanguageSettings};
use crate::model::limits::Limits;
use crate::model::rootfs::INIT;
use crate::sandbox::SandboxError;
use crate::sandbox::podman::Podman;

/// Makes the image and returns its content id. The caller has to call [`remove`].
pub(super) async fn make(session: &EngineSession) -> Result<String, SandboxError> {
    let (podman, name) = (&session.podman, image_name(&session.instance.name));
    // If it exists, a killed doctor has left it behind.
    if podman.image_id(&name).await?.is_none() {
        let archive = archive(&session.instance);
        let archive = archive.map_err(|error| not_made(format!("cannot write an archive: {error}")))?;
        podman.import(archive.path(), &name).await?;
    }
    podman.image_id(&name).await?.ok_or_else(|| not_made(format!("no image {name}")))
}

/// Removes the image of an instance's trial, if there is one. The trial's sandboxes must have been removed.
pub(super) async fn remove(podman: &Podman, instance: &str) {
    let name = image_name(instance);
    let removed = match podman.image_id(&name).await {
        Ok(Some(_)) => podman.remove_image(&name).await,
        other => other.map(drop),
    };
    if let Err(error) = removed {
        tracing::warn!(image = name, %error, "cannot remove the image of the limit checks");
    }
}

/// The image name for an instance.
fn image_name(instance: &str) -> String {
    format!("localhost/coderunner-probe:{}", tag_of(instance))
}

/// A tar archive of an empty file that has the name of the instance. If the images of two instances shared a layer,
/// podman would fail on one while the other makes or deletes its image.
fn archive(instance: &Instance) -> std::io::Result<NamedTempFile> {
    let archive = NamedTempFile::new_in(instance.jobs())?;
    let mut header = Header::new_ustar();
    header.set_size(0);
    header.set_mode(0o444);
    let mut files = Builder::new(archive);
    files.append_data(&mut header, &instance.name, std::io::empty())?;
    files.into_inner()
}

/// The language whose programs are probes.
pub(super) fn language() -> Result<Language, SandboxError> {
    let entry = format!(
        "image = \"none\"\nsource = \"probe\"\nrun = [\"{INIT}\", \"{VERB}\"]\nhealth = {{ code = \"\", output = \"\" }}"
    );
    let entry: LanguageSettings = toml::from_str(&entry).map_err(|error| not_made(error.to_string()))?;
    Language::new(VERB, entry, limits()).map_err(|error| not_made(error.to_string()))
}

/// Small limits, which probes reach quickly.
fn limits() -> Limits {
    let time = Duration::from_secs(30);
    Limits {
        memory: ByteSize::mib(64),
        processes: 16,
        cpus: 0.5,
        open_files: 64,
        disk: ByteSize::mib(4),
        inodes: 256,
        output: ByteSize::kib(64),
        output_total: ByteSize::mib(1),
        compile_time: time,
        compile_cpu_time: time,
        run_time: time,
        run_cpu_time: time,
    }
}

fn not_made(reason: String) -> SandboxError {
    SandboxError::NotMade { language: VERB.into(), reason }
}
