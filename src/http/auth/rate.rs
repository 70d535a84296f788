//! Rate limits as settings.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use governor::Quota;
use serde::{Deserialize, Serialize};

use crate::http::auth::parse::{NotValid, as_text};

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

impl Rate {
    /// The quota for the limiter; `None` if there is no limit.
    pub(super) fn quota(self, burst: NonZeroU32) -> Option<Quota> {
        let (count, period) = self.0?;
        let quota = match period {
            Period::Second => Quota::per_second(count),
            Period::Minute => Quota::per_minute(count),
            Period::Hour => Quota::per_hour(count),
        };
        Some(quota.allow_burst(burst))
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

as_text!(Rate);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_printed_as_they_were_written() {
        for rate in ["off", "5/s", "30/m", "1000/h"] {
            assert_eq!(rate.parse::<Rate>().unwrap().to_string(), rate);
        }
        for wrong in ["", "0/m", "5", "5/d", "-1/s", "/s", "5 / s"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }
}
