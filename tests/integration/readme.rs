//! Executes the examples of the README and the documentation, and compares their output.

use std::fs;

use crate::harness::{Options, Server, run_program};

const DOCUMENTS: [&str; 5] = [
    include_str!("../../README.md"),
    include_str!("../../docs/api.md"),
    include_str!("../../docs/configuration.md"),
    include_str!("../../docs/languages.md"),
    include_str!("../../docs/operation.md"),
];

/// The address that the examples call.
const EXAMPLES: &str = "127.0.0.1:8080";

/// The code blocks in this language that call the server.
fn examples(language: &str, server: &Server) -> Vec<String> {
    let blocks = DOCUMENTS.iter().flat_map(|text| text.split("```").skip(1).step_by(2));
    let blocks = blocks.filter_map(|block| block.strip_prefix(language));
    let calling = blocks.filter(|block| block.starts_with('\n') && block.contains(EXAMPLES));
    calling.map(|block| block.trim().replace(EXAMPLES, &server.address.to_string())).collect()
}

#[test]
fn documented_examples_work() {
    let server = Server::start(Options { languages: &["c", "python", "bash"], containers: 3, ..Options::default() });
    server.wait_each_ready();
    let shell = examples("console", &server);
    assert!(shell.len() >= 3, "{shell:?}");
    for block in &shell {
        // Indented lines continue the command; the lines after it are its output.
        let at = block.lines().position(|line| !line.starts_with(['$', ' '])).unwrap_or(block.lines().count());
        let (command, printed): (Vec<_>, Vec<_>) = block.lines().enumerate().partition(|(line, _)| *line < at);
        let lines = |part: Vec<(usize, &str)>| part.into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("\n");
        let command = lines(command).replacen("$ ", "", 1);
        let output = run_program("sh", &["-c", &command.replacen("curl -s", "curl -sS --fail-with-body", 1)]);
        let printed = lines(printed);
        assert!(output.contains(if printed.is_empty() { "\"verdict\"" } else { &printed }), "{command}: {output}");
    }
    let scripts = [("python", "/usr/bin/python3", "example.py", "  # "), ("javascript", "node", "example.mjs", " // ")];
    for (language, program, file, comment) in scripts {
        let blocks = examples(language, &server);
        assert!(!blocks.is_empty(), "there is no example in {language}");
        for block in blocks {
            let path = server.files().dir().join(file);
            fs::write(&path, &block).unwrap();
            let (_, printed) = block.rsplit_once(comment).expect("a comment with the expected output");
            assert_eq!(run_program(program, &[path.to_str().unwrap()]).trim_end(), printed, "{block}");
        }
    }
    server.stop();
}
