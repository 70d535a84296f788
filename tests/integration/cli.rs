//! The commands other than `serve`: `run`, `config`, `update` and what they print.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fake_podman::FakePodman;
use crate::harness::{self, Files, Options, Server, eventually, marked_seconds, wait_gone, wait_running};
use crate::leftovers;

/// Runs `coderunner run` with a configuration, on programs that it writes beside it.
struct RunCommand {
    files: Files,
    config: &'static str,
}

impl RunCommand {
    fn new(config: &'static str) -> RunCommand {
        RunCommand { files: Files::new(&RunCommand::options(config)), config }
    }

    fn options(config: &str) -> Options<'_> {
        Options { languages: &["c", "python", "bash"], config, ..Options::default() }
    }

    fn write(&self, name: &str, code: &str) -> PathBuf {
        let path = self.files.dir().join(name);
        std::fs::write(&path, code).unwrap();
        path
    }

    /// Starts `coderunner run` with pipes as standard streams.
    fn start(&self, name: &str, code: &str, args: &[&str]) -> Child {
        let path = self.write(name, code);
        let mut command = self.files.command("run", &RunCommand::options(self.config));
        command.arg(path).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs a program to its end, and checks that nothing is left behind.
    fn run(&self, name: &str, code: &str, args: &[&str], stdin: &[u8]) -> Output {
        let child = self.start(name, code, args);
        let instance = format!("run-{}", child.id());
        let output = harness::finish(child, stdin);
        leftovers::assert_none(&instance);
        output
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Returns stderr without log lines, which begin with the year.
fn stderr(output: &Output) -> String {
    let lines = text(&output.stderr).lines().filter(|line| !line.starts_with("20"));
    lines.map(|line| format!("{line}\n")).collect()
}

#[test]
fn run_command_passes_stdin_arguments_streams_and_exit_code() {
    let cli = RunCommand::new("");
    let code = "echo out \"$#\" \"$@\"; echo err >&2; cat; exit 3";
    let input = b"typed\0\xff\nwithout end";
    let output = cli.run("main.sh", code, &["--help", "-l", "--", "a b", "$(c)", ""], input);
    assert_eq!(output.stdout, [b"out 6 --help -l -- a b $(c) \n", &input[..]].concat());
    assert_eq!((stderr(&output).as_str(), output.status.code()), ("err\n", Some(3)));
}

#[test]
fn run_command_exits_with_the_code_of_the_program() {
    let cli = RunCommand::new("");
    // 125, 126 and 127 are podman's own codes.
    for code in [0, 125, 126, 127, 255] {
        let output = cli.run("main.sh", &format!("echo before; exit {code}"), &[], b"");
        assert_eq!((text(&output.stdout), output.status.code()), ("before\n", Some(code)));
        assert_eq!(stderr(&output), "");
    }
    let output = cli.run("main.sh", "kill -KILL $$", &[], b"");
    assert_eq!(output.status.code(), Some(128 + 9));
    assert_eq!(stderr(&output), "coderunner: ended by signal 9 (SIGKILL)\n");
}

#[test]
fn run_command_exits_with_1_on_compile_error_and_124_on_timeout() {
    let cli = RunCommand::new("[limits]\nrun_time = \"2s\"");
    let output = cli.run("main.c", "int main(void) { return missing; }\n", &[], b"");
    assert_eq!((output.stdout.as_slice(), output.status.code()), (&b""[..], Some(1)));
    assert!(stderr(&output).contains("missing"), "{output:?}");
    let output = cli.run("main.sh", "echo so far; sleep 60", &[], b"");
    assert_eq!((text(&output.stdout), output.status.code()), ("so far\n", Some(124)));
    assert!(stderr(&output).starts_with("coderunner: killed: out of time after "), "{output:?}");
}

#[test]
fn run_command_truncates_each_stream_separately() {
    let cli = RunCommand::new("[limits]\nrun_time = \"60s\"\nrun_cpu_time = \"60s\"");
    let code = "head -c 10485760 /dev/zero & head -c 10485760 /dev/zero >&2 & wait; exit 7";
    let output = cli.run("main.sh", code, &[], b"");
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(output.stdout.len(), 262_144);
    let zeros = output.stderr.iter().filter(|byte| **byte == 0).count();
    assert_eq!(zeros, 262_144);
    let end = String::from_utf8_lossy(&output.stderr);
    assert!(end.ends_with("coderunner: output cut: 524288 of 20971520 bytes shown\n"), "{}", end.trim_matches('\0'));
}

#[test]
fn run_command_takes_the_language_from_file_name_or_option() {
    let cli = RunCommand::new("");
    let output = cli.run("main.py", "print('python')", &[], b"");
    assert_eq!(text(&output.stdout), "python\n");
    let path = cli.write("program", "echo \"bash $1\"");
    let run = |args: &[&str]| {
        let mut command = cli.files.command("run", &RunCommand::options(""));
        harness::output(command.args(args).arg(&path).arg("-l"), b"")
    };
    assert_eq!(
        text(&run(&["-l", "sh"]).stdout),
        "bash -l\n",
        "-l takes an alias, and arguments after the file belong to the program"
    );
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("name it with -l (one of bash, c, "), "{output:?}");
    let output = run(&["-l", "cobol"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("\"cobol\": one of bash, c, "), "{output:?}");
}

#[test]
fn run_command_accepts_extra_files_stdin_and_limits() {
    let cli = RunCommand::new("");
    let dir = cli.files.dir();
    std::fs::create_dir(dir.join("lib")).unwrap();
    cli.write("lib/one", "one\n");
    cli.write("two", "two\n");
    cli.write("main.sh", "cat lib/one two; cat; echo err >&2; sleep ${1:-0}");
    let run = |args: &[&str]| {
        let mut command = cli.files.command("run", &RunCommand::options(""));
        // Paths below the working directory are kept, others are placed beside the program.
        let files = ["--file", "lib/one", "--file", dir.join("two").to_str().unwrap()].map(str::to_owned);
        harness::output(command.current_dir(dir).args(files).args(args), b"not read")
    };
    let output = run(&["--stdin", "typed\n", "main.sh"]);
    assert_eq!((text(&output.stdout), output.status.code()), ("one\ntwo\ntyped\n", Some(0)));

    let output = run(&["--json", "--stdin", "", "--time", "2s", "main.sh", "60"]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&answer["verdict"], output.status.code()), (&"time_limit".into(), Some(124)), "{answer}");
    assert_eq!((&answer["run"]["stdout"], &answer["run"]["stderr"]), (&"one\ntwo\n".into(), &"err\n".into()));
    assert_eq!((&answer["language"], stderr(&output).as_str()), (&"bash".into(), ""));

    for (args, words) in [
        (&["--time", "0s", "main.sh"][..], "run_time"),
        (&["--memory", "900GiB", "main.sh"], "memory"),
        (&["--file", "main.sh", "main.sh"], "in the way"),
        (&["--file", "missing", "main.sh"], "cannot read missing"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(stderr(&output).contains(words), "{words}: {output:?}");
    }
}

#[test]
fn run_command_shows_progress_only_on_a_terminal() {
    let cli = RunCommand::new("");
    let path = cli.write(
        "main.c",
        "#include <stdio.h>\nint main(void) { puts(\"hello\"); fflush(stdout); *(volatile int *)0 = 1; }\n",
    );
    let mut command = cli.files.command("run", &RunCommand::options(""));
    let words = [command.get_program()].into_iter().chain(command.get_args()).map(|word| word.to_str().unwrap());
    let line = words.chain([path.to_str().unwrap()]).map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    // `script` runs the command on a pseudo-terminal.
    let mut script = std::process::Command::new("script");
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    script.env_remove("NO_COLOR").env("TERM", "xterm").args(["-qec", &line, "/dev/null"]);
    let output = harness::output(&mut script, b"");
    let shown = text(&output.stdout);
    for part in ["starting", "compiling", " s", "hello\r\n", "\u{1b}[1m\u{1b}[33mcoderunner: ended by signal 11"] {
        assert!(shown.contains(part), "{part:?} is not in {shown:?}");
    }
    assert_eq!(output.status.code(), Some(128 + 11), "{shown}");
    let output = harness::output(command.arg(path), b"");
    assert_eq!(stderr(&output), "coderunner: ended by signal 11 (SIGSEGV)\n");
}

#[test]
fn manual_pages_and_completions_cover_the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let print = |args: &[&str]| {
        let output = harness::output(std::process::Command::new(harness::executable()).args(args), b"");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        text(&output.stdout).to_owned()
    };
    print(&["man", dir.path().to_str().unwrap()]);
    let page = std::fs::read_to_string(dir.path().join("coderunner-run.1")).unwrap();
    assert!(page.contains("\\-\\-memory"), "{page}");
    assert!(!dir.path().join("coderunner-init.1").exists(), "internal commands have no manual page");
    for shell in ["bash", "zsh", "fish"] {
        let script = print(&["completions", shell]);
        for word in ["serve", "doctor", "memory"] {
            assert!(script.contains(word), "{word} is not in the completions of {shell}");
        }
    }
}

#[test]
fn interrupted_run_command_leaves_nothing() {
    let cli = RunCommand::new("[limits]\nrun_time = \"120s\"");
    // SIGHUP is what a closed terminal sends.
    for signal in [Signal::SIGINT, Signal::SIGHUP] {
        let mark = marked_seconds(100);
        let mut child = cli.start("main.sh", &format!("sleep {mark}"), &[]);
        let instance = format!("run-{}", child.id());
        wait_running(&mark);
        assert!(!leftovers::containers(&instance).is_empty());
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let status = eventually("the command exits", || child.try_wait().unwrap());
        assert_eq!(status.code(), Some(130));
        wait_gone(&mark);
        leftovers::assert_none(&instance);
    }
}

#[test]
fn run_command_under_nohup_survives_sighup() {
    let cli = RunCommand::new("");
    let path = cli.write("main.sh", "echo ready; read line; echo $line");
    let command = cli.files.command("run", &RunCommand::options(""));
    // Ignores SIGHUP as nohup does.
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args()).arg(path);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = shell.spawn().unwrap();
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGHUP).unwrap();
    let output = harness::finish(child, b"typed\n");
    assert_eq!((text(&output.stdout), output.status.code()), ("typed\n", Some(0)));
}

#[test]
fn run_command_can_be_interrupted_during_an_image_pull() {
    let mark = marked_seconds(10_000);
    let fake = FakePodman::new(&format!("[ \"$1\" != pull ] || exec sleep {mark}"));
    let config = format!("{}[language.bash]\nimage = \"registry.invalid/bash:latest\"", fake.config());
    let options = RunCommand::options(&config);
    let files = Files::new(&options);
    let path = files.dir().join("main.sh");
    std::fs::write(&path, "echo never").unwrap();
    let mut child = files.command("run", &options).arg(path).stderr(Stdio::null()).spawn().unwrap();
    wait_running(&mark);
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let status = eventually("the command exits", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    wait_gone(&mark);
    leftovers::assert_none(&format!("run-{}", child.id()));
}

#[test]
fn config_command_prints_a_valid_configuration_file() {
    let options = Options {
        languages: &["bash", "python"],
        config: "[limits]\nrun_time = \"3s\"\n[language.bash.env]\nGREETING = \"hello\"",
        env: &[("CODERUNNER_CACHE_TTL", "7m")],
        ..Options::default()
    };
    let files = Files::new(&options);
    let printed = harness::output(&mut files.command("config", &options), b"");
    assert_eq!((printed.status.code(), stderr(&printed).as_str()), (Some(0), ""));
    let settings: toml::Table = text(&printed.stdout).parse().unwrap();
    assert_eq!(settings["cache"]["ttl"].as_str(), Some("7m"));
    assert_eq!(settings["limits"]["run_time"].as_str(), Some("3s"));
    assert_eq!(settings["languages"], toml::Value::from(vec!["bash", "python"]));
    assert!(settings["language"]["pivot"].is_table(), "the whole catalogue");

    std::fs::write(files.config(), &printed.stdout).unwrap();
    let plain = Options::default();
    let again = harness::output(&mut files.command("config", &plain), b"");
    assert_eq!(text(&again.stdout), text(&printed.stdout));
    let server = Server::launch_with(files, &plain);
    server.wait_ready();
    assert_eq!(server.run("echo $GREETING").run_output, "hello\n");
    server.stop();
}

#[test]
fn version_and_help_need_no_configuration() {
    for (word, expected) in
        [("--version", concat!("coderunner ", env!("CARGO_PKG_VERSION"), "\n")), ("--help", "serve")]
    {
        let output = harness::output(std::process::Command::new(harness::executable()).arg(word), b"");
        assert_eq!(output.status.code(), Some(0));
        assert!(text(&output.stdout).contains(expected), "{output:?}");
        assert!(!text(&output.stdout).contains("PID 1"), "internal commands are hidden");
    }
}

/// Runs a command with these for stdout and stderr to its end, and checks that it leaves nothing behind.
fn run_with_output_to(command: &mut std::process::Command, stdout: Stdio, stderr: Stdio) -> Output {
    let mut child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().unwrap();
    eventually("the command exits", || child.try_wait().unwrap());
    leftovers::assert_none(&format!("run-{}", child.id()));
    child.wait_with_output().unwrap()
}

fn full_disk() -> Stdio {
    std::fs::File::options().write(true).open("/dev/full").unwrap().into()
}

/// A pipe whose reading end is closed.
fn closed_pipe() -> Stdio {
    std::io::pipe().unwrap().1.into()
}

/// Checks that a command whose output cannot be written exits with the usual codes and messages.
fn assert_handles_write_errors(words: &str, mut command: impl FnMut() -> std::process::Command) {
    let output = run_with_output_to(&mut command(), closed_pipe(), Stdio::piped());
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(128 + 13), ""), "{words}: as after SIGPIPE");
    let output = run_with_output_to(&mut command(), full_disk(), Stdio::piped());
    let said = stderr(&output);
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{words}: {output:?}");
    assert!(said.starts_with("coderunner: cannot write to stdout: No space left"), "{words}: {said}");
}

#[test]
fn commands_exit_without_panic_when_output_cannot_be_written() {
    let options = RunCommand::options("");
    let files = Files::new(&options);
    for words in ["config", "key", "completions bash", "--help", "run --help"] {
        assert_handles_write_errors(words, || match words {
            "config" => files.command(words, &options),
            _ => {
                let mut command = std::process::Command::new(harness::executable());
                command.args(words.split(' '));
                command
            }
        });
    }
    // Where stderr cannot be written either, the exit code still reports the error.
    for (words, code) in [("run missing.sh", 1), ("completions no-shell", 2), ("agent", 1), ("init", 1)] {
        for stderr in [full_disk, closed_pipe] {
            // Init expects its channel as descriptor 3, which is not one here.
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "exec \"$@\" 3</dev/null", "sh"]).arg(harness::executable()).args(words.split(' '));
            let output = run_with_output_to(&mut command, Stdio::null(), stderr());
            assert_eq!(output.status.code(), Some(code), "{words}");
        }
    }
}

#[test]
fn run_command_stops_when_its_output_cannot_be_written() {
    let cli = RunCommand::new("[limits]\nrun_time = \"120s\"\nrun_cpu_time = \"120s\"");
    let path = cli.write("main.sh", "echo begun; while :; do sleep 0.1; echo more; done");
    let short = cli.write("short.sh", "echo done");
    assert_handles_write_errors("run", || {
        let mut command = cli.files.command("run", &RunCommand::options(cli.config));
        command.arg(&path);
        command
    });
    assert_handles_write_errors("run --json", || {
        let mut command = cli.files.command("run", &RunCommand::options(cli.config));
        command.arg("--json").arg(&short);
        command
    });
}

#[test]
fn update_command_exits_when_its_reader_is_gone() {
    let options = Options { languages: &["bash"], ..Options::default() };
    let server = Server::start(options.clone());
    assert_handles_write_errors("update", || server.files().command("update", &options));
    server.stop();
}
