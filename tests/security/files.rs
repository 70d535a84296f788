//! File names, which the host writes and a shell may see: names that leave the directory are refused, all others arrive
//! unchanged.

use serde_json::{Value, json};

use crate::client::Reply;
use crate::harness::{Endpoint, code};
use crate::shared::Shared;

on_each_engine! {
    unusual_file_names_arrive_unchanged
    escaping_file_names_are_refused
}

/// Runs a program with additional files of these names.
fn execute(server: &Endpoint, program: &str, names: &[&str]) -> Reply {
    let others = names.iter().map(|name| json!({"name": name, "content": format!("<{name}>")}));
    let files: Vec<Value> = std::iter::once(json!({"content": code(program)})).chain(others).collect();
    let body = json!({"language": "python", "version": "*", "files": files}).to_string();
    server.request("POST", "/api/v2/execute", &[("Content-Type", "application/json")], body.as_bytes())
}

fn unusual_file_names_arrive_unchanged(engine: &str) {
    let server = Shared::patient(engine, "python");
    let long = "x".repeat(255);
    let names = [
        "-rf",
        "--help",
        "a b",
        " ",
        "\t",
        "new\nline",
        "\r",
        "'\"`$(touch /tmp/x);&|<>",
        "é🦀",
        "*",
        "?",
        "[a]",
        "~",
        "#",
        "%s%n",
        "\\",
        "\u{1b}[2J",
        "\u{7f}",
        "\u{202e}",
        "...",
        ".hidden",
        "..x",
        "CON",
        "MAIN.PY",
        "main.py.",
        "main.py ",
        "lib/-x",
        "lib/ /y",
        "/job/main.py".trim_start_matches('/'),
        &long,
    ];
    let list = "
        import json, os
        found = {}
        for path, dirs, files in os.walk('/work'):
            for file in files:
                name = os.path.join(path, file)
                found[name[len('/work/'):]] = open(name, newline='').read() if file != 'main.py' or path != '/work' else ''
        print(json.dumps(found))
        print(os.listdir('/tmp'))
    ";
    let answer = execute(&server, list, &names).json();
    let printed = answer["run"]["stdout"].as_str().unwrap_or_else(|| panic!("{answer}"));
    let (found, tmp) = printed.trim_end().split_once('\n').unwrap();
    let mut expected: serde_json::Map<String, Value> =
        names.iter().map(|name| ((*name).to_owned(), json!(format!("<{name}>")))).collect();
    expected.insert("main.py".into(), json!(""));
    assert_eq!(serde_json::from_str::<Value>(found).unwrap(), Value::Object(expected));
    assert_eq!(tmp, "[]");
}

fn escaping_file_names_are_refused(engine: &str) {
    let server = Shared::patient(engine, "python");
    let (long, longer, deep) = ("x".repeat(256), "x".repeat(4096), "d/".repeat(1000) + "x");
    for names in [
        &["/etc/passwd"][..],
        &["../x"],
        &["a/../../x"],
        &["a/.."],
        &[".."],
        &["."],
        &["./x"],
        &["x/"],
        &["a//x"],
        &["//x"],
        &["x\0"],
        &["\0"],
        &[&long],
        &[&longer],
        &[&deep],
        &["x", "x"],
        &["x", "x/y"],
        &["x/y", "x"],
        // The name of the program itself, or a path through it.
        &["main.py"],
        &["main.py/x"],
    ] {
        let reply = execute(&server, "print('it ran')", names);
        assert_eq!(reply.status, 400, "{names:?}: {reply:?}");
        assert!(reply.message().contains("name"), "{names:?}: {}", reply.message());
    }
    let answer = execute(&server, "print('it ran')", &["x/y", "x/z"]).json();
    assert_eq!(answer["run"]["stdout"], "it ran\n", "{answer}");
}
