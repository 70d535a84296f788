//! The client of a request.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// The client of a request: the unit of rate limits and of fair queueing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Client {
    /// A client with an API key, by the name of the key.
    Key(Arc<str>),
    /// A client without a key, by its address; see [`Client::at`].
    Address(IpAddr),
    /// A client without key and address, such as the command line.
    #[default]
    Unidentified,
}

impl Client {
    /// The client at an address. An IPv6 host usually owns a /64 network, so all addresses of a /64 count as one
    /// client.
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
            Client::Unidentified => f.write_str("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_an_ipv6_64_network_are_one_client() {
        let at = |address: &str| Client::at(address.parse().unwrap());
        assert_eq!(at("2001:db8:1:2::1"), at("2001:db8:1:2:ffff::9"));
        assert_ne!(at("2001:db8:1:2::1"), at("2001:db8:1:3::1"));
        assert_ne!(at("192.0.2.1"), at("192.0.2.2"));
        assert_eq!(at("::ffff:192.0.2.1"), at("192.0.2.1"), "an IPv4 client of a dual-stack socket");
    }
}
