//! Piston's API: requests and answers, refused requests, and the additional fields.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Reply;
use crate::harness::{Endpoint, Options, Server, clients, run_program};
use crate::shared::Shared;

const JSON: (&str, &str) = ("Content-Type", "application/json");

fn execute(server: &Endpoint, body: &Value) -> Reply {
    server.request("POST", "/api/v2/execute", &[JSON], body.to_string().as_bytes())
}

/// A request with one file.
fn program(language: &str, code: &str) -> Value {
    json!({"language": language, "version": "*", "files": [{"content": code}]})
}

/// A request with this field set.
fn with(mut body: Value, field: &str, value: impl Into<Value>) -> Value {
    body[field] = value.into();
    body
}

#[track_caller]
fn assert_ok(reply: &Reply) -> Value {
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    reply.json()
}

#[track_caller]
fn assert_refused(reply: &Reply, status: u16, words: &[&str]) {
    let message = reply.message();
    assert_eq!(reply.status, status, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

#[test]
fn runtimes_lists_the_configured_languages() {
    let server = Shared::start(&["python", "bash"], "");
    for path in ["/api/v2/runtimes", "/api/v2/runtimes/"] {
        let reply = server.get(path);
        assert_eq!(reply.status, 200);
        let expected = json!([
            {"language": "python", "version": "3.0.0", "aliases": ["py", "python3"]},
            {"language": "bash", "version": "5.0.0", "aliases": ["sh"]},
        ]);
        assert_eq!(reply.json(), expected);
    }
}

#[test]
fn execute_runs_a_program_with_files_stdin_and_arguments() {
    let server = Shared::start(&["bash"], "");
    let code = "cat; cat lib/one lib/two; echo \"$# $1 $2\"; echo wrong >&2; exit 3";
    let body = json!({
        "language": "sh", "version": "5.x", "stdin": "typed ", "args": ["a b", ""], "unknown": [],
        "files": [
            {"name": "cool.txt", "content": code, "encoding": "utf8"},
            {"name": "lib/one", "content": "b25lIA==", "encoding": "base64"},
            {"name": "lib/two", "content": "74776f20", "encoding": "hex"},
        ],
        "compile_timeout": 10000, "run_timeout": 20000, "compile_memory_limit": -1, "run_memory_limit": -1,
    });
    let answer = assert_ok(&execute(&server, &body));
    assert_eq!((&answer["language"], &answer["version"]), (&json!("bash"), &json!("5.0.0")));
    assert_eq!(answer.get("compile"), None);
    let run = &answer["run"];
    assert_eq!(run["stdout"], "typed one two 2 a b \n");
    assert_eq!(run["stderr"], "wrong\n");
    // `output` has both streams in order of arrival, which is not deterministic between two streams.
    assert_eq!(run["output"].as_str().unwrap().replacen("wrong\n", "", 1), "typed one two 2 a b \n");
    assert_eq!((&run["code"], &run["signal"], &run["status"]), (&json!(3), &json!(null), &json!("RE")));
    assert_eq!((&answer["verdict"], &answer["truncated"]), (&json!("runtime_error"), &json!(false)));
    assert_eq!((&run["stdout_bytes"], &run["stderr_bytes"]), (&json!(21), &json!(6)));
    assert!(run["wall_time"].as_u64() > Some(0) && run["memory"].as_u64() > Some(0), "{run}");
}

#[test]
fn compile_and_run_are_separate_stages() {
    let server = Shared::start(&["c"], "");
    let code = "#include \"n.h\"\n#include <stdio.h>\nint main(void) { printf(\"%d\\n\", N); return 0; }\n";
    let body = json!({"language": "c", "version": "*", "files": [
        {"name": "anything", "content": code}, {"name": "n.h", "content": "#define N 42\n"}]});
    let answer = assert_ok(&execute(&server, &body));
    assert_eq!((&answer["compile"]["code"], &answer["run"]["stdout"]), (&json!(0), &json!("42\n")));
    assert_eq!(answer["run"]["status"], json!(null));

    let answer = assert_ok(&execute(&server, &program("c", "int main(void) { return x; }")));
    assert_eq!((&answer["verdict"], answer.get("run")), (&json!("compile_error"), None));
    assert!(answer["compile"]["code"].as_i64() > Some(0), "{answer}");
    assert!(answer["compile"]["stderr"].as_str().unwrap().contains('x'), "{answer}");
}

#[test]
fn status_says_how_the_program_ended() {
    let server = Shared::start(&["bash"], "limits = { output = \"1KiB\", output_total = \"64KiB\" }");
    let ended = |code: &str, field: &str, value: Value| {
        let answer = assert_ok(&execute(&server, &with(program("bash", code), field, value)));
        let run = &answer["run"];
        (run["status"].clone(), run["signal"].clone(), answer["verdict"].clone(), run.clone())
    };
    let (status, signal, verdict, _) = ended("kill -SEGV $$", "args", json!([]));
    assert_eq!((status, signal, verdict), (json!("SG"), json!("SIGSEGV"), json!("signalled")));
    let (status, signal, verdict, run) = ended("echo so far; sleep 100", "run_timeout", json!(3000));
    assert_eq!((status, signal, verdict), (json!("TO"), json!("SIGKILL"), json!("time_limit")));
    assert_eq!((&run["stdout"], &run["code"]), (&json!("so far\n"), &json!(null)));
    assert!(run["message"].as_str().unwrap().contains("out of time"), "{run}");
    let (status, _, verdict, _) = ended("while :; do :; done", "run_cpu_time", json!(300));
    assert_eq!((status, verdict), (json!("TO"), json!("time_limit")));
    let (status, _, verdict, run) = ended("while :; do echo 0123456789; done", "args", json!([]));
    assert_eq!((status, verdict, &run["truncated"]), (json!("OL"), json!("output_limit"), &json!(true)));
    assert_eq!(run["stdout"].as_str().unwrap().len(), 1024);
    let (status, ..) = ended("while :; do echo 0123456789 >&2; done", "args", json!([]));
    assert_eq!(status, json!("EL"));
}

#[test]
fn lower_memory_limit_is_enforced_on_any_host() {
    let server = Shared::start(&["python"], "");
    let code = "import time\nx = bytearray(100_000_000)\nprint('had it', flush=True)\ntime.sleep(20)\n";
    let body = with(program("python", code), "run_memory_limit", 50_000_000);
    let answer = assert_ok(&execute(&server, &body));
    assert_eq!((&answer["verdict"], &answer["run"]["signal"]), (&json!("memory_limit"), &json!("SIGKILL")), "{answer}");
    assert!(answer["run"]["message"].as_str().unwrap().contains("out of memory"), "{answer}");
    let code = "x = bytearray(100_000_000)\nprint('had it')\n";
    let answer = assert_ok(&execute(&server, &with(program("python", code), "run_memory_limit", 300_000_000)));
    assert_eq!((&answer["verdict"], &answer["run"]["stdout"]), (&json!("ok"), &json!("had it\n")));
}

#[test]
fn invalid_requests_return_400() {
    let config = "source_limit = \"4KiB\"\nlimits = { run_time = \"5s\", memory = \"64MiB\" }";
    let server = Server::start(Options { languages: &["bash"], config, ..Options::default() });
    let base = || program("bash", "echo hello");
    for field in ["run_timeout", "compile_timeout", "run_cpu_time", "compile_cpu_time"] {
        for value in [json!(0), json!(-1), json!(10_000_000), json!(1e300)] {
            assert_refused(&execute(&server, &with(base(), field, value)), 400, &[field, "limit"]);
        }
        assert_refused(&execute(&server, &with(base(), field, "1000")), 400, &[]);
    }
    for field in ["run_memory_limit", "compile_memory_limit"] {
        for value in [json!(0), json!(-2), json!(64 * 1024 * 1024 + 1)] {
            assert_refused(&execute(&server, &with(base(), field, value)), 400, &[field, "limit"]);
        }
    }
    for name in ["/tmp/x", "../x", "a/../../x", "a\0b", "a//b", "."] {
        let body = with(base(), "files", json!([{"content": ""}, {"name": name, "content": ""}]));
        assert_refused(&execute(&server, &body), 400, &["files[1].name"]);
    }
    for names in [["x", "main.sh"], ["x", "main.sh/y"]] {
        let files: Vec<Value> = names.iter().map(|name| json!({"name": name, "content": ""})).collect();
        assert_refused(&execute(&server, &with(base(), "files", files)), 400, &["main.sh"]);
    }
    assert_refused(&execute(&server, &with(base(), "files", json!([]))), 400, &["files"]);
    let wrong = json!([{"content": "%", "encoding": "base64"}]);
    assert_refused(&execute(&server, &with(base(), "files", wrong)), 400, &["files[0].content"]);
    assert_refused(&execute(&server, &with(base(), "args", json!(["\0"]))), 400, &["NUL"]);
    assert_refused(&execute(&server, &with(base(), "args", json!(["x".repeat(100_000)]))), 413, &["args"]);
    assert_refused(&execute(&server, &program("bash", &"x".repeat(5000))), 413, &["files"]);
    assert_refused(&execute(&server, &program("cobol", "")), 400, &["cobol", "runtime is unknown"]);
    assert_refused(&execute(&server, &with(base(), "version", "4.x")), 400, &["bash-4.x runtime is unknown"]);
    for body in ["", "{", "[]", "{\"language\": \"bash\"}", "{\"files\": []}"] {
        let reply = server.request("POST", "/api/v2/execute", &[JSON], body.as_bytes());
        assert_refused(&reply, 400, &["\"language\""]);
    }
    let reply = server.request("POST", "/api/v2/execute", &[("Content-Type", "text/html")], b"{}");
    assert_refused(&reply, 415, &[]);
    for (path, allowed) in [("/api/v2/execute", "POST, OPTIONS"), ("/api/v2/runtimes", "GET, HEAD")] {
        let reply = server.request("DELETE", path, &[], b"");
        assert_eq!((reply.status, reply.header("allow")), (405, Some(allowed)));
    }
    // The most files and the longest time that are allowed.
    let files: Vec<Value> = (0..100).map(|n| json!({"name": format!("{n}/b/c"), "content": "x"})).collect();
    let answer = assert_ok(&execute(&server, &with(with(base(), "files", files), "run_timeout", 5000)));
    assert_eq!(answer["run"]["code"], json!(127), "the program `x` does not exist: {answer}");
    server.stop();
}

#[test]
fn cached_answers_are_marked_and_no_cache_runs_anew() {
    let server = Shared::start(&["bash"], "");
    let body = program("bash", "cat /proc/sys/kernel/random/uuid").to_string();
    let ask = |headers: &[(&str, &str)]| {
        let headers = [headers, &[JSON]].concat();
        assert_ok(&server.request("POST", "/api/v2/execute", &headers, body.as_bytes()))
    };
    let first = ask(&[]);
    assert_eq!((&first["cached"], &first["age"]), (&json!(false), &json!(null)));
    assert!(first["queued"].is_u64());
    let second = ask(&[]);
    assert_eq!((&second["cached"], &second["run"]["stdout"]), (&json!(true), &first["run"]["stdout"]));
    assert!(second["age"].is_u64(), "{second}");
    let fresh = ask(&[("Cache-Control", "no-cache")]);
    assert_eq!(fresh["cached"], json!(false));
    assert_ne!(fresh["run"]["stdout"], first["run"]["stdout"]);
    // It replaces the previous answer in the cache.
    assert_eq!(ask(&[])["run"]["stdout"], fresh["run"]["stdout"]);
}

#[test]
fn aiopyston_works_unmodified() {
    let server = Shared::start(&["python", "c"], "");
    server.wait_each_ready();
    let dir = TempDir::with_prefix("coderunner-test-").unwrap();
    let script = dir.path().join("aiopyston.py");
    std::fs::write(&script, include_str!("clients/aiopyston.py")).unwrap();
    let url = format!("http://{}/api/v2/", server.address);
    let output = run_program(&format!("{}/python/bin/python", clients()), &[script.to_str().unwrap(), &url]);
    assert!(output.contains("all checks passed"), "{output}");
}

#[test]
fn piston_client_works_unmodified() {
    let server = Shared::start(&["python", "c"], "");
    server.wait_each_ready();
    let dir = TempDir::with_prefix("coderunner-test-").unwrap();
    let script = dir.path().join("piston-client.mjs");
    std::fs::write(&script, include_str!("clients/piston-client.mjs")).unwrap();
    let url = format!("http://{}", server.address);
    let output = run_program("node", &[script.to_str().unwrap(), &url, &format!("{}/node", clients())]);
    assert!(output.contains("all checks passed"), "{output}");
}
