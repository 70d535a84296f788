//! Drops the capabilities that init does not need.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
};

use crate::host::at;

/// Drops all capabilities except `kept`, which programs do not inherit.
pub(super) fn keep_only(kept: u64) -> io::Result<()> {
    let kept = CapabilitySet::from_bits_retain(kept);
    clear_ambient_capability_set()?;
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(one) {
            continue;
        }
        match remove_capability_from_bounding_set(one) {
            // The kernel has no capability with this number, nor any higher one.
            Err(rustix::io::Errno::INVAL) => break,
            removed => at("its capabilities", removed)?,
        }
    }
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    at("its capabilities", set_capabilities(None, sets))
}
