//! Hostile programs. For each, the answer is correct, a concurrent run of another client succeeds, and nothing is left
//! behind.
//!
//! `isolation` tests what a program can see and reach, `limits` what it may use; the programs here try to get round both.

mod bombs;
mod compilers;
mod engines;
mod escapes;
mod files;
mod filter;
mod toolchains;

use crate::client::{Answer, Pending};
use crate::harness::{Endpoint, Options, Server, code, marked_seconds};
use crate::shared::Shared;

/// A server with one container for the attack and one for its neighbour, for attacks that need limits of their own. The
/// others share a [`Shared::patient`] server.
fn serve(engine: &str, language: &str, config: &str) -> Server {
    Server::start(Options {
        languages: &[language],
        containers: 2,
        config: &format!("engine = \"{engine}\"\n{config}"),
        ..Options::default()
    })
}

/// Runs a hostile program beside a harmless one of the same language, which must not be affected.
#[track_caller]
fn attack(server: &Endpoint, language: &str, code: &str) -> Answer {
    attack_at_once(server, language, &[code]).remove(0)
}

/// Runs hostile programs at the same time, and beside them a harmless one of the same language, which must not be
/// affected.
#[track_caller]
fn attack_at_once(server: &Endpoint, language: &str, codes: &[impl AsRef<str>]) -> Vec<Answer> {
    let (harmless, printed) = neighbour(language);
    // Unique, so that it is not answered from the cache.
    let neighbour = server.begin(&harmless.replace("UNIQUE", &marked_seconds(0)));
    let answers: Vec<Pending> = codes.iter().map(|code| server.begin(code.as_ref())).collect();
    let answers = answers.into_iter().map(|answer| answer.reply().answer()).collect();
    let beside = || codes.iter().map(AsRef::as_ref).collect::<Vec<&str>>();
    assert_eq!(neighbour.reply().answer(), Answer::ran(printed), "beside {:?}", beside());
    assert_eq!(server.get("/healthz").status, 200);
    answers
}

/// Runs a program as an attack and checks that it prints exactly this.
#[track_caller]
fn assert_prints(engine: &str, language: &str, program: &str, printed: &str) {
    assert_eq!(attack(&Shared::patient(engine, language), language, &code(program)), Answer::ran(printed));
}

/// A harmless program that forks, allocates, writes files and computes a little, and its output.
fn neighbour(language: &str) -> (&'static str, &'static str) {
    match language {
        "python" => (
            "import subprocess\n# UNIQUE\nopen('/tmp/mine', 'wb').write(bytes(1 << 20))\n\
             print(subprocess.check_output(['wc', '-c', '/tmp/mine']).split()[0].decode(), sum(range(100000)))\n",
            "1048576 4999950000\n",
        ),
        "c" => (
            "// UNIQUE\n#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <sys/wait.h>\n\
             #include <unistd.h>\nint main(void) { char *p = malloc(1 << 20); memset(p, 7, 1 << 20); int s;\n\
             if (fork() == 0) _exit(p[12345]); wait(&s); FILE *f = fopen(\"/tmp/mine\", \"w\"); fwrite(p, 1, 1 << 20, f);\n\
             printf(\"%d %ld\\n\", WEXITSTATUS(s), ftell(f)); return 0; }\n",
            "7 1048576\n",
        ),
        // The source is a script that creates the program.
        "made" => ("# UNIQUE\nprintf '#!/bin/sh\\necho made\\n' >out; chmod +x out\n", "made\n"),
        _ => (
            "# UNIQUE\nhead -c 1048576 /dev/zero >/tmp/mine; (wc -c </tmp/mine) | cat; echo $(seq 5)\n",
            "1048576\n1 2 3 4 5\n",
        ),
    }
}
