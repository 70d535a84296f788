//! The description of the API: that the server is as it says, and that people can read it.

use std::time::Duration;

use crate::harness::{Options, Server, clients, drive_within};

/// The longest that requests may be made up, in seconds.
const FUZZING: &str = "40";
/// That, and its start, and a last request that takes as long as one may.
const PATIENCE: Duration = Duration::from_secs(240);

#[test]
fn server_matches_its_openapi_description() {
    let server = Server::start(Options { languages: &["bash", "c"], ..Options::default() });
    server.wait_each_ready();
    let url = format!("http://{}/openapi.json", server.address);
    let schemathesis = format!("{}/python/bin/schemathesis", clients());
    let of_ours = ["--generation-deterministic", "--no-color", "--max-examples", "20"];
    // Which languages and limits there are is a matter of configuration: a request may be valid and yet be refused.
    let but = ["--exclude-checks", "positive_data_acceptance", "--max-time", FUZZING, "--request-timeout", "60"];
    let said = drive_within(PATIENCE, &schemathesis, &[&["run", url.as_str()], &of_ours[..], &but].concat());
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
