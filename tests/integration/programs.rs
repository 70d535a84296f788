//! How the answer reflects what a program prints and how it ends.

use crate::client::Answer;
use crate::harness::{Options, Server};
use crate::shared::Shared;

/// A language whose programs print their own source unchanged.
const VERBATIM: &str = r#"
    [language.verbatim]
    image = "localhost/coderunner-bash:latest"
    source = "source"
    run = ["cat", "source"]
    health = { code = "hello", output = "hello" }
"#;

fn shared(language: &str) -> Shared {
    Shared::start(&[language], "")
}

#[test]
fn hello_runs_in_each_local_language() {
    let hello = [
        ("c", "#include <stdio.h>\nint main(void) { puts(\"hello\"); return 0; }\n"),
        ("python", "print('hello')"),
        ("bash", "echo hello"),
    ];
    for (language, code) in hello {
        assert_eq!(shared(language).run(code), Answer::ran("hello\n"), "{language}");
    }
}

#[test]
fn source_files_arrive_unchanged() {
    let server =
        Server::start(Options { languages: &["verbatim"], containers: 1, config: VERBATIM, ..Options::default() });
    // 64 KiB is the default limit of a source; escaped as JSON it is much longer.
    let large: String = "\u{1}é€🦀\\\"\n".chars().cycle().take(65_536).collect();
    let large = &large[..(0..=65_536).rev().find(|&at| large.is_char_boundary(at)).unwrap()];
    let sources = [
        "",
        " ",
        "--help",
        "-",
        "'\"`$(touch /tmp/x)`; rm -rf / #\\ \\\\ %s %n \\n",
        "${IFS}$PATH!! ~ * ? [a-z] {a,b}",
        "nul \0 in the middle\0",
        "no newline at the end",
        "\r\n\r\n\t\u{b}\u{c}\u{7f}",
        "\u{feff}\u{200b}\u{202e}é€🦀\u{10ffff}",
        large,
    ];
    for source in sources {
        assert_eq!(server.run(source), Answer::ran(source));
    }
    server.stop();
}

#[test]
fn source_that_does_not_compile_is_not_run() {
    let server = shared("c");
    let answer = server.run("int main(void) { return missing; }\n");
    assert_eq!(answer.status, 0);
    assert!(answer.compile_output.contains("main.c:1:"), "{answer:?}");
    assert!(answer.compile_output.contains("missing"), "{answer:?}");
    assert_eq!(answer.run_output, "");
    let answer = server.run("");
    assert_eq!((answer.status, answer.run_output.as_str()), (0, ""), "there is no main: {answer:?}");
    assert_ne!(answer.compile_output, "");
}

#[test]
fn compiler_warnings_are_returned_with_the_program_output() {
    let server = shared("c");
    let answer = server.run("int main(void) { puts(\"ran\"); return 0; }\n");
    assert_eq!((answer.status, answer.run_output.as_str()), (1, "ran\n"), "{answer:?}");
    assert!(answer.compile_output.contains("warning"), "{answer:?}");
}

#[test]
fn silent_compiler_without_artifact_counts_as_failed() {
    let server = Server::start(Options {
        containers: 1,
        // Imitates a compiler that exits with 0 although linking failed.
        config: r#"
            [language.c]
            compile = ["sh", "-c", "grep -q NOTHING main.c || tcc -o out main.c"]
        "#,
        ..Options::default()
    });
    let expected = Answer {
        status: 0,
        compile_output: "coderunner: the compiler made no program\n".into(),
        run_output: String::new(),
    };
    assert_eq!(server.run("// NOTHING"), expected);
    server.stop();
}

#[test]
fn failing_programs_keep_their_output() {
    let server = shared("bash");
    // 125, 126 and 127 are podman's own codes.
    for code in [0, 1, 3, 125, 126, 127, 137, 255] {
        assert_eq!(server.run(&format!("echo before; exit {code}")), Answer::ran("before\n"), "exit code {code}");
    }
}

#[test]
fn uncaught_exceptions_appear_in_the_output() {
    let server = shared("python");
    let answer = server.run("print('so far')\nraise ValueError('boom')\n");
    assert_eq!((answer.status, answer.compile_output.as_str()), (1, ""));
    assert!(answer.run_output.starts_with("so far\nTraceback"), "{answer:?}");
    assert!(answer.run_output.ends_with("\nValueError: boom\n"), "{answer:?}");
}

#[test]
fn death_by_signal_is_reported() {
    let server = shared("c");
    let end = |how: &str| {
        server.run(&format!(
            "#include <stdio.h>\n#include <stdlib.h>\n#include <signal.h>\n\
             int main(void) {{ printf(\"so far\"); fflush(stdout); {how}; return 0; }}\n"
        ))
    };
    let ended = |how: &str| Answer::ran(&format!("so far\ncoderunner: ended by signal {how}\n"));
    assert_eq!(end("raise(SIGSEGV)"), ended("11 (SIGSEGV)"));
    assert_eq!(end("*(volatile int *)0 = 1"), ended("11 (SIGSEGV)"));
    assert_eq!(end("abort()"), ended("6 (SIGABRT)"));
    // Not mistaken for a kill by the server.
    assert_eq!(end("raise(SIGKILL)"), ended("9 (SIGKILL)"));
}

#[test]
fn stdout_and_stderr_keep_write_order() {
    let server = shared("bash");
    let code = "for n in 1 2 3; do echo out $n; echo err $n >&2; done";
    let expected = "out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n";
    assert_eq!(server.run(code), Answer::ran(expected));
}

#[test]
fn standard_streams_can_be_opened_by_path() {
    let server = shared("bash");
    let code = "echo out >/dev/stdout; echo err >/dev/stderr; cat </dev/stdin; echo three >/proc/self/fd/2";
    assert_eq!(server.run(code), Answer::ran("out\nerr\nthree\n"));
}

#[test]
fn arbitrary_output_bytes_become_valid_text() {
    let server = shared("bash");
    assert_eq!(
        server.run(r"printf '\xff\xfe|\0|\x1b[31mred\x1b]0;title\x07|\xe2\x82'"),
        Answer::ran("\u{fffd}\u{fffd}|\0|\u{1b}[31mred\u{1b}]0;title\u{7}|\u{fffd}")
    );
    // A character that is written in several pieces is not broken.
    assert_eq!(server.run(r"printf '\xe2'; sleep 0.2; printf '\x82'; sleep 0.2; printf '\xac'"), Answer::ran("€"));
    // Output that looks like part of the answer has no effect.
    let framing = "{\"status\": 0}\r\n\r\nHTTP/1.1 500 no\r\n";
    assert_eq!(server.run(&format!("printf '%s' '{framing}'")), Answer::ran(framing));
}

#[test]
fn output_is_truncated_between_characters() {
    let server = Server::start(Options {
        languages: &["bash"],
        containers: 1,
        config: "[limits]\noutput = \"10B\"",
        ..Options::default()
    });
    assert_eq!(server.run("printf '€€€€'"), Answer::ran("€€€\ncoderunner: output cut: 10 of 12 bytes shown\n"));
    assert_eq!(server.run("printf 0123456789"), Answer::ran("0123456789"));
    server.stop();
}

#[test]
fn standard_input_is_empty() {
    let server = shared("bash");
    assert_eq!(server.run("read -r line && echo got; echo end"), Answer::ran("end\n"));
    assert_eq!(server.run("wc -c"), Answer::ran("0\n"));
}

#[test]
fn programs_start_with_default_signal_handling() {
    let server = shared("bash");
    let ignored = server.run("grep -E '^Sig(Ign|Blk)' /proc/self/status");
    assert_eq!(ignored, Answer::ran("SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"));
    // SIGPIPE kills `yes` silently when `head` exits.
    assert_eq!(server.run("yes | head -n 1"), Answer::ran("y\n"));
}

#[test]
fn end_of_long_output_is_never_lost() {
    // podman sometimes loses the end of a stream; the server's pipes do not go through podman.
    let server = Server::start(Options {
        languages: &["bash"],
        containers: 1,
        config: "[limits]\noutput = \"1MiB\"",
        ..Options::default()
    });
    for round in 0..10 {
        let code = format!("for n in $(seq 50); do seq {round} 1500; done");
        let once: String = (round..=1500).map(|n| format!("{n}\n")).collect();
        let answer = server.run(&code);
        assert_eq!(answer.run_output.len(), once.len() * 50);
        assert_eq!(answer, Answer::ran(&once.repeat(50)));
    }
    server.stop();
}
