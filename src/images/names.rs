//! What images are called on this host: names of our own keep those in use apart from those that are pulled.

/// Names of the images in use, one for each instance and public name.
const CURRENT: &str = "localhost/coderunner-current";
/// Names of images that are to be deleted once their last container is gone.
const OLD: &str = "localhost/coderunner-old";

/// Whether an image is known to this host only, so that there is nothing to pull.
pub fn is_local(name: &str) -> bool {
    name.starts_with("localhost/")
}

/// A short name for a long one, of characters that a tag may have.
pub fn tag_of(name: &str) -> String {
    blake3::hash(name.as_bytes()).to_hex().chars().take(12).collect()
}

/// Our name of the image that an instance uses for a public name.
pub(super) fn current(instance: &str, name: &str) -> String {
    format!("{CURRENT}:{}-{}", tag_of(instance), tag_of(name))
}

/// Our name of an image that an instance has to delete.
pub(super) fn old(instance: &str, id: &str) -> String {
    format!("{}{}", all_old(instance), tag_of(id))
}

/// What the names of all images begin with that an instance has to delete.
pub(super) fn all_old(instance: &str) -> String {
    format!("{OLD}:{}-", tag_of(instance))
}
