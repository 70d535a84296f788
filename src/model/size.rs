//! Sizes in bytes, in a human-readable form.

use bytesize::ByteSize;
use serde::Serializer;

/// Serializes a size without loss; the `Display` of `ByteSize` rounds.
pub fn exact<S: Serializer>(size: &ByteSize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&size_text(size))
}

/// The size in the largest unit of which it is a whole multiple.
pub fn size_text(size: &ByteSize) -> String {
    let units = [(ByteSize::gib(1), "GiB"), (ByteSize::mib(1), "MiB"), (ByteSize::kib(1), "KiB")];
    let whole = |(unit, _): &(ByteSize, &str)| size.as_u64() > 0 && size.as_u64().is_multiple_of(unit.as_u64());
    units.into_iter().find(whole).map_or_else(
        || format!("{}B", size.as_u64()),
        |(unit, name)| format!("{}{name}", size.as_u64() / unit.as_u64()),
    )
}
