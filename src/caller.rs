//! On whose behalf something is done: known to all that a request does itself, like the span of its log lines.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use tracing::Instrument;

use crate::shutdown;

tokio::task_local! {
    static CALLER: Caller;
}

/// A request, and who sent it.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The request's id.
    pub request: Arc<str>,
    /// Who sent it.
    pub client: Client,
}

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

impl Caller {
    /// The one on whose behalf the code that asks is run, if it is a request's.
    pub fn current() -> Option<Caller> {
        CALLER.try_with(Clone::clone).ok()
    }

    /// For a task that is spawned: does what it does on behalf of whoever spawns it, and its log lines are of that span. A
    /// panic in it ends nothing else.
    pub fn pass_on<F: Future>(future: F) -> impl Future<Output = F::Output> {
        let caller = Caller::current();
        // Its state is large, and would be copied from one wrapper into the next on the stack.
        let future = Box::pin(future);
        let passed_on = async move {
            match caller {
                Some(caller) => caller.scope(future).await,
                None => future.await,
            }
        };
        shutdown::apart(passed_on).in_current_span()
    }

    /// Does something on this caller's behalf. Tasks that it spawns are not: they have to be told.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        CALLER.scope(self, future).await
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
