//! Who may run code here, and how often: identifies the client of a request, checks its key and counts it against its
//! rate.

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

/// Clients whose rates are known at once; beyond it new ones share one rate. About 20 MiB.
const MAX_CLIENTS: usize = if cfg!(test) { 1000 } else { 100_000 };

/// Time between two searches for clients that have been quiet for so long that their rates need not be remembered.
const FORGET_PAUSE: Duration = Duration::from_secs(10);

/// `[access]`
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct AccessSettings {
    /// Hashes of keys by the names of their owners. If there are any, code is run for these clients only.
    pub keys: BTreeMap<String, KeyHash>,
    /// How many requests a client may send.
    pub rate: Rate,
    /// How many requests a client may send at once.
    pub burst: NonZeroU32,
    /// The proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<Network>,
}

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// It needs a key and has no known one.
    NoKey,
    /// Its client sends too many; how long it is until the next one will be served.
    TooMany(Duration),
}

/// The parts of a request that tell who sent it.
#[derive(Debug, Default)]
pub struct Credentials<'a> {
    /// The peer of its connection; `None` where it has no address.
    pub peer: Option<IpAddr>,
    /// `X-Forwarded-For`, all of them in order.
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
    forgot: Mutex<Instant>,
    trusted: Vec<Network>,
}

impl Gate {
    /// A gate that has counted no request yet.
    pub fn new(settings: &AccessSettings) -> Gate {
        Gate {
            keys: settings.keys.iter().map(|(name, hash)| (name.as_str().into(), *hash)).collect(),
            limiter: settings.rate.quota(settings.burst).map(RateLimiter::hashmap),
            forgot: Mutex::new(Instant::now()),
            trusted: settings.trusted_proxies.clone(),
        }
    }

    /// Identifies who sent a request: the owner of its key, or else an address.
    pub fn client(&self, credentials: &Credentials) -> Client {
        let key = credentials.key.or_else(|| credentials.authorization.map(bearer));
        match (key.and_then(|key| self.owner(key)), credentials.peer) {
            (Some(owner), _) => Client::Key(owner),
            (None, Some(peer)) => Client::at(self.address(peer, &credentials.forwarded)),
            (None, None) => Client::Ourselves,
        }
    }

    /// Checks that this client has a known key, if keys are needed.
    pub fn knows(&self, client: &Client) -> Result<(), Denied> {
        match self.keys.is_empty() || matches!(client, Client::Key(_)) {
            true => Ok(()),
            false => Err(Denied::NoKey),
        }
    }

    /// Counts a request against its client's rate.
    pub fn count(&self, client: &Client) -> Result<(), Denied> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        self.forget(limiter);
        let known = limiter.len() < MAX_CLIENTS || matches!(client, Client::Key(_));
        let counted = if known { client } else { &Client::Ourselves };
        limiter.check_key(counted).map_err(|until| Denied::TooMany(until.wait_time_from(DefaultClock::default().now())))
    }

    /// Forgets, from time to time, the clients whose rates need not be remembered.
    fn forget(&self, limiter: &DefaultKeyedRateLimiter<Client>) {
        let mut forgot = self.forgot.lock().unwrap_or_else(PoisonError::into_inner);
        if forgot.elapsed() >= FORGET_PAUSE {
            *forgot = Instant::now();
            drop(forgot);
            limiter.retain_recent();
        }
    }

    /// The owner of a key. Each hash is compared in constant time, and all are, so that the time tells nothing about them.
    fn owner(&self, key: &str) -> Option<Arc<str>> {
        let hash = KeyHash::of(key);
        self.keys.iter().fold(None, |found, (name, known)| if hash == *known { Some(Arc::clone(name)) } else { found })
    }

    /// Whether this is the address of a proxy of ours.
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(address.to_canonical()))
    }

    /// The nearest address in the chain of proxies that is not one of ours.
    fn address(&self, peer: IpAddr, forwarded: &[&str]) -> IpAddr {
        let hops = forwarded.iter().rev().flat_map(|header| header.rsplit(',')).map(str::trim);
        let mut nearest = peer;
        for hop in hops {
            if !self.trusts(nearest) {
                break;
            }
            // What stands before an entry that is not an address cannot be believed.
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
    fn a_key_is_taken_from_either_header_and_must_be_known() {
        let (gate, key) = with_keys();
        let alice = Client::Key("alice".into());
        let bearer = format!("Bearer {key}");
        let lower = format!("bearer {key}");
        for authorization in [bearer.as_str(), &lower, &key] {
            let client = gate.client(&Credentials { authorization: Some(authorization), ..from("192.0.2.1", &[]) });
            assert_eq!((gate.knows(&client), client), (Ok(()), alice.clone()));
        }
        assert_eq!(gate.client(&Credentials { key: Some(&key), ..from("192.0.2.1", &[]) }), alice);
        for wrong in ["", "crk_", &key[..key.len() - 1], &format!("{key}x"), &key.to_uppercase(), "Basic xyz"] {
            let credentials = Credentials { authorization: Some(wrong), key: Some(wrong), ..from("192.0.2.1", &[]) };
            let client = gate.client(&credentials);
            assert_eq!(client, Client::at("192.0.2.1".parse().unwrap()));
            assert_eq!(gate.knows(&client), Err(Denied::NoKey));
        }
    }

    #[test]
    fn the_hash_of_a_key_is_no_key() {
        let (gate, key) = with_keys();
        let hash = KeyHash::of(&key).to_string();
        let client = gate.client(&Credentials { key: Some(&hash), ..from("192.0.2.1", &[]) });
        assert_eq!(gate.knows(&client), Err(Denied::NoKey));
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
        assert_eq!(address("192.0.2.1", &["198.51.100.7"]), "192.0.2.1", "not one of ours");
        assert_eq!(address("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(address("10.0.0.1", &["203.0.113.9, 198.51.100.7"]), "198.51.100.7", "what the client wrote itself");
        assert_eq!(address("10.0.0.1", &["198.51.100.7, 10.1.2.3"]), "198.51.100.7", "through two of ours");
        assert_eq!(address("10.0.0.1", &["203.0.113.9", "198.51.100.7"]), "198.51.100.7", "the later header");
        assert_eq!(address("10.0.0.1", &["198.51.100.7:4711"]), "198.51.100.7");
        assert_eq!(address("::1", &["[2001:db8::5]:80"]), "2001:db8::");
        assert_eq!(address("::ffff:10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(address("10.0.0.1", &["198.51.100.7, nonsense"]), "10.0.0.1");
        assert_eq!(address("10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn each_client_has_a_rate_of_its_own() {
        let gate = Gate::new(&AccessSettings { rate: "1/h".parse().unwrap(), ..settings("") });
        let [one, other] = ["192.0.2.1", "192.0.2.2"].map(|address| Client::at(address.parse().unwrap()));
        assert_eq!((gate.count(&one), gate.count(&one)), (Ok(()), Ok(())), "the burst");
        let Err(Denied::TooMany(wait)) = gate.count(&one) else { panic!("a third") };
        assert!(wait > Duration::from_secs(3000) && wait <= Duration::from_secs(3600), "{wait:?}");
        assert_eq!(gate.count(&other), Ok(()));
    }

    #[test]
    fn the_number_of_remembered_clients_is_bounded() {
        let gate = Gate::new(&AccessSettings { rate: "1/h".parse().unwrap(), ..settings("") });
        let addresses = (0..MAX_CLIENTS as u32 + 100).map(|n| Client::at(IpAddr::from(n.to_be_bytes())));
        let refused = addresses.filter(|client| gate.count(client).is_err()).count();
        assert_eq!(refused, 98, "those beyond share the burst of one");
        assert!(gate.limiter.as_ref().unwrap().len() <= MAX_CLIENTS + 1);
        assert_eq!(gate.count(&Client::Key("alice".into())), Ok(()), "known by name");
    }
}
