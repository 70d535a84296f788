//! Access control: identifies the client of a request, checks its key and enforces its rate limit.

pub(crate) mod key;
mod network;
mod parse;
mod rate;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, RateLimiter};
use serde::{Deserialize, Serialize};

use crate::http::auth::key::KeyHash;
use crate::http::auth::network::Network;
use crate::http::auth::rate::Rate;
use crate::model::client::Client;

/// Most clients with a rate of their own, about 20 MiB. Further clients without a key share one rate.
const MAX_CLIENTS: usize = if cfg!(test) { 1000 } else { 100_000 };

/// Time between two removals of clients that have not used their rate for so long that it is full again.
const CLEANUP_INTERVAL: Duration = Duration::from_secs(10);

/// `[access]`
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct AccessSettings {
    /// Hashes of keys by name. If there are any, only clients with one of these keys may run code.
    pub keys: BTreeMap<String, KeyHash>,
    /// Rate limit of a client.
    pub rate: Rate,
    /// Number of requests that a client may send at once.
    pub burst: NonZeroU32,
    /// Proxies whose `X-Forwarded-For` is trusted.
    pub trusted_proxies: Vec<Network>,
}

/// Why a request is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The request needs a key and has no valid one.
    NoKey,
    /// The client exceeds its rate; the time until its next request is allowed.
    TooMany(Duration),
}

/// The parts of a request that identify its client.
#[derive(Debug, Default)]
pub struct Credentials<'a> {
    /// Address of the peer; `None` if it has none.
    pub peer: Option<IpAddr>,
    /// All `X-Forwarded-For` headers in order.
    pub forwarded: Vec<&'a str>,
    /// `Authorization`
    pub authorization: Option<&'a str>,
    /// `X-API-Key`
    pub key: Option<&'a str>,
}

/// Authenticates and rate-limits clients.
pub struct Gate {
    keys: Vec<(Arc<str>, KeyHash)>,
    limiter: Option<DefaultKeyedRateLimiter<Client>>,
    last_cleanup: Mutex<Instant>,
    trusted: Vec<Network>,
}

impl Gate {
    /// A gate with unused rates.
    pub fn new(settings: &AccessSettings) -> Gate {
        Gate {
            keys: settings.keys.iter().map(|(name, hash)| (name.as_str().into(), *hash)).collect(),
            limiter: settings.rate.quota(settings.burst).map(RateLimiter::hashmap),
            last_cleanup: Mutex::new(Instant::now()),
            trusted: settings.trusted_proxies.clone(),
        }
    }

    /// Identifies the client of a request: by its key, or else by its address.
    pub fn client(&self, credentials: &Credentials) -> Client {
        let key = credentials.key.or_else(|| credentials.authorization.map(bearer));
        match (key.and_then(|key| self.key_name(key)), credentials.peer) {
            (Some(owner), _) => Client::Key(owner),
            (None, Some(peer)) => Client::at(self.client_address(peer, &credentials.forwarded)),
            (None, None) => Client::Unidentified,
        }
    }

    /// Checks that the client has a key, if keys are required.
    pub fn check_key(&self, client: &Client) -> Result<(), Denied> {
        match self.keys.is_empty() || matches!(client, Client::Key(_)) {
            true => Ok(()),
            false => Err(Denied::NoKey),
        }
    }

    /// Counts a request against the rate of its client.
    pub fn check_rate(&self, client: &Client) -> Result<(), Denied> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        self.clean_up(limiter);
        let known = limiter.len() < MAX_CLIENTS || matches!(client, Client::Key(_));
        let counted = if known { client } else { &Client::Unidentified };
        limiter.check_key(counted).map_err(|until| Denied::TooMany(until.wait_time_from(DefaultClock::default().now())))
    }

    /// Removes clients with unused rates, once per [`CLEANUP_INTERVAL`].
    fn clean_up(&self, limiter: &DefaultKeyedRateLimiter<Client>) {
        let mut last_cleanup = self.last_cleanup.lock().unwrap_or_else(PoisonError::into_inner);
        if last_cleanup.elapsed() >= CLEANUP_INTERVAL {
            *last_cleanup = Instant::now();
            drop(last_cleanup);
            limiter.retain_recent();
        }
    }

    /// The name of a key. Compares all hashes, each in constant time, so that timing reveals nothing about them.
    fn key_name(&self, key: &str) -> Option<Arc<str>> {
        let hash = KeyHash::of(key);
        self.keys.iter().fold(None, |found, (name, known)| if hash == *known { Some(Arc::clone(name)) } else { found })
    }

    /// Whether this is the address of a trusted proxy.
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(address.to_canonical()))
    }

    /// The last address in the chain of proxies that is not a trusted proxy.
    fn client_address(&self, peer: IpAddr, forwarded: &[&str]) -> IpAddr {
        let hops = forwarded.iter().rev().flat_map(|header| header.rsplit(',')).map(str::trim);
        let mut nearest = peer;
        for hop in hops {
            if !self.trusts(nearest) {
                break;
            }
            // Entries before one that is not an address cannot be trusted.
            match hop.parse().or_else(|_| hop.parse::<SocketAddr>().map(|address| address.ip())) {
                Ok(address) => nearest = address,
                Err(_) => break,
            }
        }
        nearest
    }
}

/// The key in an `Authorization` header: after `Bearer`, or alone, as clients of Piston send it.
fn bearer(value: &str) -> &str {
    match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::auth::key::new_key;

    fn settings(text: &str) -> AccessSettings {
        let base = "rate = \"off\"\nburst = 2\ntrusted_proxies = [\"10.0.0.0/8\", \"::1\"]\n";
        toml::from_str(&format!("{base}{text}\n[keys]\n")).unwrap()
    }

    fn from<'a>(peer: &str, forwarded: &[&'a str]) -> Credentials<'a> {
        Credentials { peer: Some(peer.parse().unwrap()), forwarded: forwarded.to_vec(), ..Credentials::default() }
    }

    fn with_keys() -> (Gate, String) {
        let (key, hash) = new_key().unwrap();
        let (_, other) = new_key().unwrap();
        let keys = BTreeMap::from([("alice".to_owned(), hash), ("bob".to_owned(), other)]);
        (Gate::new(&AccessSettings { keys, ..settings("") }), key)
    }

    #[test]
    fn api_key_is_read_from_either_header_and_must_be_known() {
        let (gate, key) = with_keys();
        let alice = Client::Key("alice".into());
        let bearer = format!("Bearer {key}");
        let lower = format!("bearer {key}");
        for authorization in [bearer.as_str(), &lower, &key] {
            let client = gate.client(&Credentials { authorization: Some(authorization), ..from("192.0.2.1", &[]) });
            assert_eq!((gate.check_key(&client), client), (Ok(()), alice.clone()));
        }
        assert_eq!(gate.client(&Credentials { key: Some(&key), ..from("192.0.2.1", &[]) }), alice);
        for wrong in ["", "crk_", &key[..key.len() - 1], &format!("{key}x"), &key.to_uppercase(), "Basic xyz"] {
            let credentials = Credentials { authorization: Some(wrong), key: Some(wrong), ..from("192.0.2.1", &[]) };
            let client = gate.client(&credentials);
            assert_eq!(client, Client::at("192.0.2.1".parse().unwrap()));
            assert_eq!(gate.check_key(&client), Err(Denied::NoKey));
        }
    }

    #[test]
    fn key_hash_is_not_accepted_as_key() {
        let (gate, key) = with_keys();
        let hash = KeyHash::of(&key).to_string();
        let client = gate.client(&Credentials { key: Some(&hash), ..from("192.0.2.1", &[]) });
        assert_eq!(gate.check_key(&client), Err(Denied::NoKey));
        let refusal = key.parse::<KeyHash>().unwrap_err().to_string();
        assert!(!refusal.contains(&key) && refusal.contains("coderunner key"), "{refusal}");
    }

    #[test]
    fn a_forwarded_address_is_believed_only_from_trusted_proxies() {
        let gate = Gate::new(&settings(""));
        let address = |peer: &str, forwarded: &[&str]| match gate.client(&from(peer, forwarded)) {
            Client::Address(address) => address.to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(address("192.0.2.1", &["198.51.100.7"]), "192.0.2.1", "not a trusted proxy");
        assert_eq!(address("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(
            address("10.0.0.1", &["203.0.113.9, 198.51.100.7"]),
            "198.51.100.7",
            "the first entry is the client's own"
        );
        assert_eq!(address("10.0.0.1", &["198.51.100.7, 10.1.2.3"]), "198.51.100.7", "through two trusted proxies");
        assert_eq!(address("10.0.0.1", &["203.0.113.9", "198.51.100.7"]), "198.51.100.7", "the later header");
        assert_eq!(address("10.0.0.1", &["198.51.100.7:4711"]), "198.51.100.7");
        assert_eq!(address("::1", &["[2001:db8::5]:80"]), "2001:db8::");
        assert_eq!(address("::ffff:10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(address("10.0.0.1", &["198.51.100.7, nonsense"]), "10.0.0.1");
        assert_eq!(address("10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn each_client_has_its_own_rate_limit() {
        let gate = Gate::new(&AccessSettings { rate: "1/h".parse().unwrap(), ..settings("") });
        let [one, other] = ["192.0.2.1", "192.0.2.2"].map(|address| Client::at(address.parse().unwrap()));
        assert_eq!((gate.check_rate(&one), gate.check_rate(&one)), (Ok(()), Ok(())), "the burst");
        let Err(Denied::TooMany(wait)) = gate.check_rate(&one) else { panic!("a third") };
        assert!(wait > Duration::from_secs(3000) && wait <= Duration::from_secs(3600), "{wait:?}");
        assert_eq!(gate.check_rate(&other), Ok(()));
    }

    #[test]
    fn the_number_of_remembered_clients_is_bounded() {
        let gate = Gate::new(&AccessSettings { rate: "1/h".parse().unwrap(), ..settings("") });
        let addresses = (0..MAX_CLIENTS as u32 + 100).map(|n| Client::at(IpAddr::from(n.to_be_bytes())));
        let refused = addresses.filter(|client| gate.check_rate(client).is_err()).count();
        assert_eq!(refused, 98, "the others share one burst");
        assert!(gate.limiter.as_ref().unwrap().len() <= MAX_CLIENTS + 1);
        assert_eq!(gate.check_rate(&Client::Key("alice".into())), Ok(()), "clients with a key have their own rate");
    }
}
