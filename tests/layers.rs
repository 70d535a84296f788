//! Checks which part of the program uses which: dependencies go one way, without cycles.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each part, and the parts that it may use besides `model`. A module belongs to the part with the longest matching
/// name.
const LAYERS: &[(&str, &str)] = &[
    (
        "cli",
        "config http images metrics run scheduler sandbox::engine sandbox::podman sandbox::agent sandbox::init sandbox host",
    ),
    // The types of settings belong to the parts that they configure.
    ("config", "http images run scheduler sandbox::engine"),
    ("http", "run metrics host"),
    ("run", "scheduler sandbox metrics host"),
    ("images", "scheduler sandbox::podman sandbox metrics host"),
    ("metrics", "sandbox host"),
    ("scheduler", "sandbox host"),
    ("sandbox::engine", "sandbox::direct sandbox::podman sandbox host"),
    ("sandbox::direct", "sandbox::podman sandbox::agent sandbox sandbox::oci_config sandbox::protocol host"),
    ("sandbox::podman", "sandbox sandbox::protocol host"),
    ("sandbox", "sandbox::init sandbox::protocol host"),
    // Code that runs in other processes does not depend on the server.
    ("sandbox::agent", "sandbox::init sandbox::oci_config sandbox::protocol sandbox::seccomp host"),
    ("sandbox::init", "sandbox::protocol sandbox::seccomp host"),
    ("sandbox::oci_config", "sandbox::seccomp"),
    ("sandbox::protocol", "host"),
    ("sandbox::seccomp", ""),
    ("host", ""),
    ("model", ""),
];

/// Modules that belong to another part than the folder that they are in.
const PLACES: &[(&str, &str)] = &[
    ("sandbox::channel", "sandbox::protocol"),
    ("sandbox::direct::oci_config", "sandbox::oci_config"),
    ("sandbox::orphans", "sandbox::podman"),
    ("sandbox::sweep", "sandbox::engine"),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

/// The part that a path of modules belongs to.
fn part(path: &str) -> Option<&'static str> {
    let within = |name: &str| path == name || path.starts_with(&format!("{name}::"));
    let placed = PLACES.iter().find(|(module, _)| within(module)).map(|(_, part)| *part);
    placed.or_else(|| LAYERS.iter().map(|(name, _)| *name).filter(|name| within(name)).max_by_key(|name| name.len()))
}

/// The paths after `crate::` in a text; each name in braces gives a path.
fn paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        // The visibility of an item is no use.
        if text[..at].ends_with("pub(in ") {
            continue;
        }
        let rest = &text[at + "crate::".len()..];
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).unwrap_or(rest.len());
        let head = rest[..end].trim_end_matches(':');
        match rest[end..].strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((inner, _)) if rest[..end].ends_with("::") || end == 0 => {
                for name in inner.split(',').map(str::trim).filter(|name| !name.is_empty()) {
                    found.push(format!("{head}::{name}").trim_start_matches(':').to_owned());
                }
            }
            _ => found.push(head.to_owned()),
        }
    }
    found
}

/// All uses of one part by another, and where they are.
fn uses() -> BTreeMap<(&'static str, &'static str), BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut uses: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    for file in files {
        let name = file.strip_prefix(&root).unwrap().with_extension("");
        let module = name.to_str().unwrap().replace('/', "::");
        let module = module.trim_end_matches("::mod");
        // Entry points and test support may use everything.
        if ["lib", "main", "fuzz", "sandbox::fake"].contains(&module) {
            continue;
        }
        let from = part(module).unwrap_or_else(|| panic!("{module} belongs to no part; add it to LAYERS"));
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("\n#[cfg(test)]\n").next().unwrap();
        let code: String =
            text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        for path in paths(&code) {
            if let Some(to) = part(&path).filter(|to| *to != from) {
                uses.entry((from, to)).or_default().insert(format!("{} uses {path}", file.display()));
            }
        }
    }
    uses
}

#[test]
fn parts_use_only_allowed_parts() {
    let allowed: BTreeMap<&str, Vec<&str>> =
        LAYERS.iter().map(|(name, below)| (*name, below.split_whitespace().collect())).collect();
    let wrong: Vec<String> = uses()
        .into_iter()
        .filter(|((from, to), _)| *to != "model" && !allowed[from].contains(to))
        .map(|((from, to), places)| format!("{from} may not use {to}: {places:#?}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn there_are_no_dependency_cycles() {
    let uses = uses();
    for (start, _) in LAYERS {
        let (mut reached, mut next) = (BTreeSet::new(), vec![*start]);
        while let Some(part) = next.pop() {
            let below = uses.keys().filter(|(from, _)| *from == part).map(|(_, to)| *to);
            next.extend(below.filter(|to| reached.insert(*to)));
        }
        assert!(!reached.contains(start), "{start} depends on itself through {reached:?}");
    }
}
