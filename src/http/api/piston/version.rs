//! Version ranges as in npm.

/// Whether a version is in an npm range: alternatives separated by `||`, each a list of comparators that all have to
/// match.
pub fn is_within(version: &semver::Version, range: &str) -> bool {
    range.split("||").any(|set| {
        let words: Vec<&str> = set.split_whitespace().collect();
        match words[..] {
            [] => true,
            [from, "-", to] => {
                matches_comparator(version, &format!(">={from}")) && matches_comparator(version, &format!("<={to}"))
            }
            _ => join_operators(&words).iter().all(|comparator| matches_comparator(version, comparator)),
        }
    })
}

/// Joins operators with their versions, which white space may separate.
fn join_operators(words: &[&str]) -> Vec<String> {
    words.iter().fold(Vec::new(), |mut comparators: Vec<String>, word| {
        match comparators.last_mut().filter(|last| last.ends_with(['<', '>', '=', '^', '~'])) {
            Some(last) => last.push_str(word),
            None => comparators.push((*word).to_owned()),
        }
        comparators
    })
}

fn matches_comparator(version: &semver::Version, comparator: &str) -> bool {
    let at = comparator.find(|c: char| !"<>=^~".contains(c)).unwrap_or(comparator.len());
    let (operator, operand) = comparator.split_at(at);
    let operand = operand.strip_prefix('v').unwrap_or(operand);
    if matches!(operand, "" | "*" | "x" | "X" | "latest") {
        return operator.is_empty() || operator == ">=";
    }
    // A version without an operator means exactly this version, not a compatible one.
    let operator = if operator.is_empty() { "=" } else { operator };
    semver::VersionReq::parse(&format!("{operator}{operand}")).is_ok_and(|required| required.matches(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_ranges_follow_npm_syntax() {
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
