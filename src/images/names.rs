//! Private names of images on this host, which keep the images in use apart from pulled ones.

/// Name of the images in use; the tag encodes the instance and the public name.
const CURRENT: &str = "localhost/coderunner-current";
/// Name of images to delete once their last container is gone.
const OLD: &str = "localhost/coderunner-old";

/// Whether an image exists on this host only, so that it cannot be pulled.
pub fn is_local(name: &str) -> bool {
    name.starts_with("localhost/")
}

/// A short hash of a name, of characters that are valid in an image tag.
pub fn tag_of(name: &str) -> String {
    blake3::hash(name.as_bytes()).to_hex().chars().take(12).collect()
}

/// The private name of the image that an instance uses for a public name.
pub(super) fn current(instance: &str, name: &str) -> String {
    format!("{CURRENT}:{}-{}", tag_of(instance), tag_of(name))
}

/// The private name of an image that an instance has to delete.
pub(super) fn old(instance: &str, id: &str) -> String {
    format!("{}{}", all_old(instance), tag_of(id))
}

/// The common prefix of the names of all images that an instance has to delete.
pub(super) fn all_old(instance: &str) -> String {
    format!("{OLD}:{}-", tag_of(instance))
}
