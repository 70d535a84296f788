//! Who may run code here, and how often: keys, rates, and whose word is taken for a client's address.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::client::Client;

/// Clients whose rates are known at once; beyond it new ones share one rate. About 20 MiB.
const MAX_CLIENTS: usize = if cfg!(test) { 1000 } else { 100_000 };

/// Time between two looks for clients whose rate is as if they had never come.
const FORGET_PAUSE: Duration = Duration::from_secs(10);

/// Marks our keys, so that scanners for leaked secrets find them.
const KEY_PREFIX: &str = "crk_";

/// `[access]`
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct AccessSettings {
    /// Hashes of keys by the names of their owners; code is run for these alone, if there are any.
    pub keys: BTreeMap<String, KeyHash>,
    /// How many requests a client may send.
    pub rate: Rate,
    /// How many of them at once.
    pub burst: NonZeroU32,
    /// Whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<Network>,
}

/// The BLAKE3 hash of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash(blake3::Hash);

/// A number of requests per second, minute or hour, or no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rate(Option<(NonZeroU32, Period)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Period {
    Second,
    Minute,
    Hour,
}

/// An address or a network of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network(IpNet);

/// A value that is none of its kind, with what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {allowed}")]
pub struct NotValid {
    value: String,
    allowed: &'static str,
}

impl KeyHash {
    fn of(key: &str) -> KeyHash {
        KeyHash(blake3::hash(key.as_bytes()))
    }
}

impl FromStr for KeyHash {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<KeyHash, NotValid> {
        // The value may be the key itself, put in by mistake: it is not repeated.
        let error =
            |_| NotValid { value: "…".into(), allowed: "a hash of 64 hex digits: `coderunner key` makes one" };
        blake3::Hash::from_hex(text).map(KeyHash).map_err(error)
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Rate {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Rate, NotValid> {
        if text == "off" {
            return Ok(Rate(None));
        }
        let parsed = text.split_once('/').and_then(|(count, period)| {
            let period = match period {
                "s" => Period::Second,
                "m" => Period::Minute,
                "h" => Period::Hour,
                _ => return None,
            };
            Some((count.parse().ok()?, period))
        });
        let error = || NotValid { value: text.into(), allowed: "\"off\", or requests per s, m or h like \"30/m\"" };
        parsed.map(|rate| Rate(Some(rate))).ok_or_else(error)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("off"),
            Some((count, Period::Second)) => write!(f, "{count}/s"),
            Some((count, Period::Minute)) => write!(f, "{count}/m"),
            Some((count, Period::Hour)) => write!(f, "{count}/h"),
        }
    }
}

impl Rate {
    fn quota(self, burst: NonZeroU32) -> Option<Quota> {
        let (count, period) = self.0?;
        let quota = match period {
            Period::Second => Quota::per_second(count),
            Period::Minute => Quota::per_minute(count),
            Period::Hour => Quota::per_hour(count),
        };
        Some(quota.allow_burst(burst))
    }
}

impl FromStr for Network {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Network, NotValid> {
        let error = || NotValid { value: text.into(), allowed: "an address or network like \"10.0.0.0/8\"" };
        let net = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(Network).map_err(|_| error())
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What serde asks for, in terms of the two above.
macro_rules! as_text {
    ($($kind:ident)*) => { $(
        impl TryFrom<String> for $kind {
            type Error = NotValid;
            fn try_from(text: String) -> Result<$kind, NotValid> {
                text.parse()
            }
        }
        impl From<$kind> for String {
            fn from(value: $kind) -> String {
                value.to_string()
            }
        }
    )* };
}

as_text!(KeyHash Rate Network);

/// A new key, which only its owner is to know, and what the configuration holds of it.
pub fn new_key() -> std::io::Result<(String, KeyHash)> {
    use base64::Engine;
    use std::io::Read;
    let mut random = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    let key = KEY_PREFIX.to_owned() + &base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random);
    let hash = KeyHash::of(&key);
    Ok((key, hash))
}

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// It needs a key and has none that is known.
    NoKey,
    /// Its client sends too many; when the next one will be served.
    TooMany(Duration),
}

/// What a request brings along that tells who sent it.
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
    /// A gate that knows of no earlier request.
    pub fn new(settings: &AccessSettings) -> Gate {
        Gate {
            keys: settings.keys.iter().map(|(name, hash)| (name.as_str().into(), *hash)).collect(),
            limiter: settings.rate.quota(settings.burst).map(RateLimiter::hashmap),
            forgot: Mutex::new(Instant::now()),
            trusted: settings.trusted_proxies.clone(),
        }
    }

    /// Who sent a request: the owner of its key, or else an address.
    pub fn client(&self, credentials: &Credentials) -> Client {
        let key = credentials.key.or_else(|| credentials.authorization.map(bearer));
        match (key.and_then(|key| self.owner(key)), credentials.peer) {
            (Some(owner), _) => Client::Key(owner),
            (None, Some(peer)) => Client::at(self.address(peer, &credentials.forwarded)),
            (None, None) => Client::Ourselves,
        }
    }

    /// Whether this client has the key that is needed, if one is.
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

    /// Forgets, from time to time, those whose rate is as if they had never come.
    fn forget(&self, limiter: &DefaultKeyedRateLimiter<Client>) {
        let mut forgot = self.forgot.lock().unwrap_or_else(PoisonError::into_inner);
        if forgot.elapsed() >= FORGET_PAUSE {
            *forgot = Instant::now();
            drop(forgot);
            limiter.retain_recent();
        }
    }

    /// Every key is compared in a time that tells nothing of it, and all are.
    fn owner(&self, key: &str) -> Option<Arc<str>> {
        let hash = KeyHash::of(key);
        self.keys
            .iter()
            .fold(None, |found, (name, known)| if hash.0 == known.0 { Some(Arc::clone(name)) } else { found })
    }

    /// Whether this is the address of a proxy of ours.
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.0.contains(&address.to_canonical()))
    }

    /// The nearest address that none of our proxies has.
    fn address(&self, peer: IpAddr, forwarded: &[&str]) -> IpAddr {
        let hops = forwarded.iter().rev().flat_map(|header| header.rsplit(',')).map(str::trim);
        let mut nearest = peer;
        for hop in hops {
            if !self.trusts(nearest) {
                break;
            }
            // Whatever is before one that is no address cannot be believed.
            match hop.parse().or_else(|_| hop.parse::<SocketAddr>().map(|address| address.ip())) {
                Ok(address) => nearest = address,
                Err(_) => break,
            }
        }
        nearest
    }
}

/// The key in an `Authorization`: behind `Bearer`, or alone, as clients of Piston send it.
fn bearer(value: &str) -> &str {
    match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn keys_are_long_and_no_two_are_the_same() {
        let (one, other) = (new_key().unwrap().0, new_key().unwrap().0);
        assert_ne!(one, other);
        assert!(one.starts_with(KEY_PREFIX) && one.len() == KEY_PREFIX.len() + 43, "{one}");
    }

    #[test]
    fn a_forwarded_address_is_believed_from_our_proxies_only() {
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
    fn clients_without_number_cost_bounded_memory() {
        let gate = Gate::new(&AccessSettings { rate: "1/h".parse().unwrap(), ..settings("") });
        let addresses = (0..MAX_CLIENTS as u32 + 100).map(|n| Client::at(IpAddr::from(n.to_be_bytes())));
        let refused = addresses.filter(|client| gate.count(client).is_err()).count();
        assert_eq!(refused, 98, "those beyond share the burst of one");
        assert!(gate.limiter.as_ref().unwrap().len() <= MAX_CLIENTS + 1);
        assert_eq!(gate.count(&Client::Key("alice".into())), Ok(()), "known by name");
    }

    #[test]
    fn values_are_what_they_were_written_as() {
        for rate in ["off", "5/s", "30/m", "1000/h"] {
            assert_eq!(rate.parse::<Rate>().unwrap().to_string(), rate);
        }
        for wrong in ["", "0/m", "5", "5/d", "-1/s", "/s", "5 / s"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
        assert!("10.0.0.0/33".parse::<Network>().is_err());
    }
}
