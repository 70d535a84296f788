//! Who sends requests.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// Who sends requests: what rates and turns are counted by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Client {
    /// The name of a key.
    Key(Arc<str>),
    /// An address, see [`Client::at`].
    Address(IpAddr),
    /// Nobody from outside.
    #[default]
    Ourselves,
}

impl Client {
    /// Who has this address. An IPv6 host has a network of 2^64 of them: that counts as one.
    pub fn at(address: IpAddr) -> Client {
        Client::Address(match address.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
            address => address,
        })
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Client::Key(name) => f.write_str(name),
            Client::Address(address) => address.fmt(f),
            Client::Ourselves => f.write_str("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_ipv6_is_one_client() {
        let at = |address: &str| Client::at(address.parse().unwrap());
        assert_eq!(at("2001:db8:1:2::1"), at("2001:db8:1:2:ffff::9"));
        assert_ne!(at("2001:db8:1:2::1"), at("2001:db8:1:3::1"));
        assert_ne!(at("192.0.2.1"), at("192.0.2.2"));
        assert_eq!(at("::ffff:192.0.2.1"), at("192.0.2.1"), "the same host over a socket of both kinds");
    }
}
