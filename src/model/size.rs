//! Sizes in bytes, as people write them.

use bytesize::ByteSize;
use serde::Serializer;

/// A size as it can be read again: its own text is rounded.
pub fn exact<S: Serializer>(size: &ByteSize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&size_text(size))
}

/// In the largest unit that it is a whole number of.
pub fn size_text(size: &ByteSize) -> String {
    let units = [(ByteSize::gib(1), "GiB"), (ByteSize::mib(1), "MiB"), (ByteSize::kib(1), "KiB")];
    let whole = |(unit, _): &(ByteSize, &str)| size.as_u64() > 0 && size.as_u64().is_multiple_of(unit.as_u64());
    units.into_iter().find(whole).map_or_else(
        || format!("{}B", size.as_u64()),
        |(unit, name)| format!("{}{name}", size.as_u64() / unit.as_u64()),
    )
}
