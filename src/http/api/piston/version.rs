//! Ranges of versions, as npm writes them.

/// Whether a version is in a range as npm writes them: alternatives apart by `||`, each a list that must all hold.
pub fn is_within(version: &semver::Version, range: &str) -> bool {
    range.split("||").any(|set| {
        let words: Vec<&str> = set.split_whitespace().collect();
        match words[..] {
            [] => true,
            [from, "-", to] => holds(version, &format!(">={from}")) && holds(version, &format!("<={to}")),
            _ => apart(&words).iter().all(|comparator| holds(version, comparator)),
        }
    })
}

/// Comparators whose operator may stand apart from its version.
fn apart(words: &[&str]) -> Vec<String> {
    words.iter().fold(Vec::new(), |mut comparators: Vec<String>, word| {
        match comparators.last_mut().filter(|last| last.ends_with(['<', '>', '=', '^', '~'])) {
            Some(last) => last.push_str(word),
            None => comparators.push((*word).to_owned()),
        }
        comparators
    })
}

fn holds(version: &semver::Version, comparator: &str) -> bool {
    let at = comparator.find(|c: char| !"<>=^~".contains(c)).unwrap_or(comparator.len());
    let (operator, of) = comparator.split_at(at);
    let of = of.strip_prefix('v').unwrap_or(of);
    if matches!(of, "" | "*" | "x" | "X" | "latest") {
        return operator.is_empty() || operator == ">=";
    }
    // A bare version is that one, not what is compatible with it.
    let operator = if operator.is_empty() { "=" } else { operator };
    semver::VersionReq::parse(&format!("{operator}{of}")).is_ok_and(|required| required.matches(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_npm() {
        let is = |range: &str| is_within(&semver::Version::new(3, 10, 2), range);
        for range in
            ["*", "", "x", "latest", "3", "3.x", "3.10", "3.10.x", "3.10.2", "v3.10.2", "=3.10.2", "^3.2", "~3.10.1"]
        {
            assert!(is(range), "{range}");
        }
        for range in [">=3 <4", ">= 3 < 4", "2.x || 3.x", "1.0.0 - 4.0.0", ">3.9", "<=3.10.2"] {
            assert!(is(range), "{range}");
        }
        for range in [
            "3.9",
            "3.10.1",
            "^2",
            "~3.9",
            "4.x",
            ">=3.11",
            "<3",
            "1 || 2",
            "1.0.0 - 2.0.0",
            "python",
            ">",
            "<*",
            "3..1",
        ] {
            assert!(!is(range), "{range}");
        }
    }
}
