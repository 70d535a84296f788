//! The OpenAPI description: the server behaves as described, and people can read it at `/docs`.

use std::time::Duration;

use crate::harness::{Options, Server, clients, run_program_within};

/// How long requests are generated, in seconds.
const FUZZING: &str = "40";
/// Covers generation, the start of schemathesis, and a last request that takes as long as possible.
const PATIENCE: Duration = Duration::from_secs(240);

#[test]
fn server_matches_its_openapi_description() {
    let server = Server::start(Options { languages: &["bash", "c"], ..Options::default() });
    server.wait_each_ready();
    let url = format!("http://{}/openapi.json", server.address);
    let schemathesis = format!("{}/python/bin/schemathesis", clients());
    let flags = ["--generation-deterministic", "--no-color", "--max-examples", "20"];
    // Languages and limits are configuration, so the server may refuse a request that is valid by the description.
    let limits = ["--exclude-checks", "positive_data_acceptance", "--max-time", FUZZING, "--request-timeout", "60"];
    let said = run_program_within(PATIENCE, &schemathesis, &[&["run", url.as_str()], &flags[..], &limits].concat());
    assert!(said.contains("Tested: 8"), "{said}");
    assert!(!said.contains("unresolvable"), "{said}");
    server.stop();
}

#[test]
fn docs_page_lists_the_api_without_scripts() {
    let server = Server::start(Options { languages: &["bash"], config: "playground = false", ..Options::default() });
    let page = server.get("/docs");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let html = String::from_utf8(page.body).unwrap();
    let api = server.get("/openapi.json").json();
    assert_eq!(api["openapi"], "3.1.0");
    for path in api["paths"].as_object().unwrap().keys() {
        assert!(html.contains(&format!("<code>{path}</code>")), "{path} is not in {html}");
    }
    for name in api["components"]["schemas"].as_object().unwrap().keys() {
        assert!(html.contains(&format!("id=\"{name}\"")), "{name} is not in {html}");
    }
    assert!(!html.contains("<script") && !html.contains("//"), "{html}");
    assert_eq!(server.get("/docs.css").status, 200);
    assert_eq!(server.request("POST", "/docs", &[], b"").status, 405);
    server.stop();
}
