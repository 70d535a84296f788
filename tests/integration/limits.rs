//! Limits on time, output, processes, memory and disk: a program that exceeds one is killed, the answer says why, and
//! other runs are not affected.

use std::fs;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::client::Answer;
use crate::harness::{Options, Server, code};
use crate::shared::Shared;

/// Timeout of answers that must not wait for a sleeping program. It is shorter than these programs sleep.
const AT_ONCE: Duration = Duration::from_secs(40);

/// A server with one container: most tests run one program after another.
fn serve(language: &[&str], config: &str) -> Server {
    Server::start(Options { languages: language, containers: 1, config, ..Options::default() })
}

fn serve_on(engine: &str, language: &[&str], config: &str) -> Server {
    serve(language, &format!("engine = \"{engine}\"\n{config}"))
}

on_each_engine! {
    process_limit_counts_processes_and_threads
    fork_bomb_is_contained_and_neighbour_unaffected
    memory_limit_kills_the_program_where_enforced
    full_disks_leave_memory_for_the_program
    disk_limits_are_enforced_and_disks_start_empty
    request_files_exceeding_the_disk_limits_return_400
    programs_that_ignore_signals_or_stop_themselves_are_killed
    daemon_holding_the_streams_does_not_delay_the_answer
    compiler_cpu_time_is_not_charged_to_the_run
}

/// Splits off the last line, which must begin with `coderunner: `, and returns it without this prefix.
fn last_line(answer: &Answer) -> (&str, &str) {
    let text = answer.run_output.strip_suffix('\n').unwrap_or_else(|| panic!("{answer:?}"));
    let at = text.rfind('\n').map_or(0, |at| at + 1);
    let line = text[at..].strip_prefix("coderunner: ").unwrap_or_else(|| panic!("{answer:?}"));
    (&text[..at], line)
}

#[track_caller]
fn assert_out_of(what: &str, answer: &Answer, printed: &str) {
    let (before, line) = last_line(answer);
    assert_eq!((answer.status, answer.compile_output.as_str(), before), (1, "", printed));
    assert!(line.starts_with(&format!("killed: out of {what} after ")), "{line}");
}

/// A number of KiB from `/proc/PID/status`.
fn status_kib(pid: Pid, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches([':', ' ', '\t', 'k', 'B']).parse().unwrap()
}

#[test]
fn wall_time_limit_kills_the_program_and_keeps_its_output() {
    let server = serve(&["bash"], "[limits]\nrun_time = \"3s\"");
    assert_out_of("time", &server.run("printf 'so far'; sleep 60"), "so far\n");
    let many = "seq 20000; sleep 60";
    let lines: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert_out_of("time", &server.run(many), &lines);
    // A program that prints all the time is killed, too: the limit is on the whole run.
    let trickle = server.run("while :; do echo drop; sleep 0.1; done");
    let (before, line) = last_line(&trickle);
    assert!(line.starts_with("killed: out of time after "), "{line}");
    assert!(before.lines().all(|line| line == "drop"), "{before}");
    server.stop();
}

#[test]
fn cpu_time_limit_covers_all_processes() {
    let server = serve(&["c"], "[limits]\nrun_time = \"60s\"\nrun_cpu_time = \"500ms\"");
    assert_out_of("CPU time", &server.run("int main(void) { for (;;); }"), "");
    // The CPU time of all processes counts together.
    let two = "#include <unistd.h>\nint main(void) { fork(); fork(); for (;;); }";
    assert_out_of("CPU time", &server.run(two), "");
    server.stop();
}

fn compiler_cpu_time_is_not_charged_to_the_run(engine: &str) {
    // The compiler of a program that says so uses 1.2 seconds of CPU time, and so does the program. Together they would
    // exceed the limit of the run.
    let server = serve_on(
        engine,
        &["python"],
        r#"
        [limits]
        compile_time = "60s"
        compile_cpu_time = "60s"
        run_time = "60s"
        run_cpu_time = "2s"
        [language.python]
        compile = ["python3", "-c", """
import shutil, time
shutil.copy('main.py', 'out')
while 'slow to compile' in open('out').read() and time.process_time() < 1.2: pass"""]
        artifact = "out"
        run = ["python3", "out"]
        "#,
    );
    let burn = |seconds| format!("import time\nwhile time.process_time() < {seconds}: pass\nprint('end')\n");
    let body = json!({"language": "python", "files": [{"content": format!("# slow to compile\n{}", burn(1.2))}]});
    let headers = [("Content-Type", "application/json")];
    let answer = server.request("POST", "/api/v2/execute", &headers, body.to_string().as_bytes()).json();
    assert_eq!(answer["run"]["stdout"], "end\n", "{answer}");
    for stage in ["compile", "run"] {
        assert!(answer[stage]["cpu_time"].as_u64() >= Some(1200), "{stage}: {answer}");
    }
    assert_out_of("CPU time", &server.run(&burn(30.0)), "");
    server.stop();
}

#[test]
fn many_short_lived_children_are_not_overcharged() {
    let server = serve(&["python"], "[limits]\nrun_time = \"60s\"\nrun_cpu_time = \"5s\"");
    // Many short-lived children that use almost no CPU time, with and without a parent that waits for them.
    let children = "
        import os, signal, time
        for disposition in signal.SIG_DFL, signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, disposition)
            for n in range(300):
                reader, writer = os.pipe()
                if os.fork() == 0:
                    time.sleep(0.02)
                    os._exit(0)
                os.close(writer)
                os.read(reader, 1)
                os.close(reader)
                if disposition == signal.SIG_DFL: os.wait()
        print('end')
    ";
    assert_eq!(server.run(&code(children)), Answer::ran("end\n"));
    server.stop();
}

#[test]
fn endless_compilers_are_killed() {
    let server = serve(
        &["c"],
        r#"
        [limits]
        compile_time = "10s"
        compile_cpu_time = "60s"
        output_total = "1MiB"
        [language.c]
        compile = ["sh", "-c", """
            grep -q LOOP main.c && while :; do sleep 0.1; done
            grep -q CHATTER main.c && yes
            exec tcc -o out main.c"""]
        "#,
    );
    for (code, why) in
        [("// LOOP", "coderunner: killed: out of time after "), ("// CHATTER", "coderunner: killed: too much output\n")]
    {
        let answer = server.run(code);
        assert_eq!((answer.status, answer.run_output.as_str()), (0, ""), "{code}");
        assert!(answer.compile_output.contains(why), "{code}: {:?}", answer.compile_output.lines().last());
    }
    // Sources that attack the compiler: compilation ends, and nothing leaks.
    for code in [
        "#include \"main.c\"",
        "#include \"/dev/zero\"",
        "#include \"/dev/stdin\"",
        "#include \"/proc/1/environ\"",
        "#include \"/job/main.c\"",
    ] {
        let answer = server.run(code);
        assert_eq!((answer.status, answer.run_output.as_str()), (0, ""), "{code}");
        assert!(!answer.compile_output.is_empty(), "{code}");
    }
    server.stop();
}

#[test]
fn large_output_on_both_streams_is_drained_in_little_memory() {
    let server = serve(&["bash"], "[limits]\nrun_cpu_time = \"60s\"");
    server.run("echo warm");
    let before = status_kib(server.pid(), "VmHWM");
    let answer = server.run(
        "head -c 10485760 /dev/zero | tr '\\0' o &\n\
         head -c 10485760 /dev/zero | tr '\\0' e >&2 &\n\
         wait; echo end",
    );
    let (kept, line) = last_line(&answer);
    assert_eq!(line, "output cut: 262144 of 20971524 bytes shown");
    assert_eq!(kept.len(), 262_144 + 1);
    assert!(kept.trim_end().chars().all(|c| c == 'o' || c == 'e'));
    // VmHWM is the peak, so it includes memory that was used only for a moment.
    let grown = status_kib(server.pid(), "VmHWM") - before;
    assert!(grown < 8 * 1024, "20 MiB of output took {grown} KiB of memory");
    server.stop();
}

#[test]
fn output_limit_kills_the_program() {
    let server = serve(&["bash"], "[limits]\noutput_total = \"1MiB\"\nrun_time = \"60s\"\nrun_cpu_time = \"60s\"");
    let started = Instant::now();
    let answer = server.run("yes");
    assert!(started.elapsed() < AT_ONCE);
    let (before, line) = last_line(&answer);
    assert_eq!(line, "killed: too much output");
    let cut = before.lines().last().unwrap();
    assert!(cut.starts_with("coderunner: output cut: 262144 of "), "{cut}");
    assert_eq!(before.len(), 262_144 + cut.len() + 1);
    server.stop();
}

fn daemon_holding_the_streams_does_not_delay_the_answer(engine: &str) {
    let server = Shared::patient(engine, "python");
    let started = Instant::now();
    let daemon = "
        import os, time
        print('parent', flush=True)
        printed, tell = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                print('daemon', flush=True)
                os.write(tell, b'x')
                time.sleep(50)
                print('late', flush=True)
            os._exit(0)
        os.wait()
        os.read(printed, 1)
    ";
    let answer = server.run(&code(daemon));
    assert_eq!(answer, Answer::ran("parent\ndaemon\n"));
    assert!(started.elapsed() < AT_ONCE);
}

fn programs_that_ignore_signals_or_stop_themselves_are_killed(engine: &str) {
    let server = serve_on(engine, &["bash"], "[limits]\nrun_time = \"3s\"");
    let stubborn = "for n in $(seq 64); do trap '' $n 2>/dev/null; done; echo deaf; while :; do sleep 60; done";
    assert_out_of("time", &server.run(stubborn), "deaf\n");
    assert_out_of("time", &server.run("echo stopping; kill -STOP $$"), "stopping\n");
    server.stop();
}

fn process_limit_counts_processes_and_threads(engine: &str) {
    let server = serve_on(engine, &["python"], "[limits]\nprocesses = 16");
    let forks = "
        import os, time
        made = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(60)
                made += 1
        except BlockingIOError:
            print(made)
    ";
    let threads = "
        import threading, time
        made = 0
        try:
            while True:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                made += 1
        except RuntimeError:
            print(made)
    ";
    // 15 besides the program itself.
    assert_eq!(server.run(&code(forks)), Answer::ran("15\n"));
    assert_eq!(server.run(&code(threads)), Answer::ran("15\n"));
    server.stop();
}

fn fork_bomb_is_contained_and_neighbour_unaffected(engine: &str) {
    let limits = "[limits]\nprocesses = 24\nrun_time = \"60s\"\nrun_cpu_time = \"60s\"\ncompile_time = \"60s\"";
    let config = format!("engine = \"{engine}\"\n{limits}");
    let server = Server::start(Options { containers: 2, config: &config, ..Options::default() });
    let bomb = "#include <unistd.h>\nint main(void) { for (;;) fork(); }";
    let bomb = json!({"language": "c", "files": [{"content": bomb}], "run_timeout": 2000}).to_string();
    let headers = [("Content-Type", "application/json")];
    let bomb = server.begin_request("POST", "/api/v2/execute", &headers, bomb.as_bytes());
    let forking = "
        #include <stdio.h>
        #include <unistd.h>
        #include <sys/wait.h>
        int main(void) {
            int n, ended = 0;
            for (n = 0; n < 20; n++)
                if (fork() == 0) return usleep(100000);
            while (wait(0) > 0) ended++;
            printf(\"%d children\\n\", ended);
            return 0;
        }
    ";
    assert_eq!(server.run(forking), Answer::ran("20 children\n"));
    let answer = bomb.reply().json();
    // Without a pids cgroup, a limit per uid bounds the processes. It does not report that it refused one.
    let (verdict, why) = match server.enforces("processes") {
        true => ("process_limit", "failed: no more processes or threads allowed"),
        false => ("time_limit", "killed: out of time after "),
    };
    assert_eq!((&answer["verdict"], &answer["run"]["output"]), (&json!(verdict), &json!("")), "{answer}");
    assert!(answer["run"]["message"].as_str().unwrap().starts_with(why), "{answer}");
    assert_eq!(server.run(&format!("{forking}\n// again")), Answer::ran("20 children\n"));
    server.stop();
}

fn memory_limit_kills_the_program_where_enforced(engine: &str) {
    let server = serve_on(engine, &["python"], "[limits]\nmemory = \"64MiB\"\nrun_time = \"30s\"");
    let answer = server.run("hog = bytearray(160 << 20)\nprint('survived')\n");
    if server.enforces("memory") {
        assert_eq!(last_line(&answer), ("", "killed: out of memory"));
    } else {
        assert_eq!(answer, Answer::ran("survived\n"));
        server.wait_log(&["limits are NOT enforced", "memory"]);
    }
    server.stop();
}

fn disk_limits_are_enforced_and_disks_start_empty(engine: &str) {
    let server = serve_on(engine, &["python"], "[limits]\ndisk = \"4MiB\"\ninodes = 200\nrun_time = \"60s\"");
    let fill = "
        import os, errno
        for place in '/work', '/tmp', '/dev/shm':
            size = 0
            try:
                for n in range(64):
                    with open(f'{place}/{n}', 'wb', buffering=0) as file:
                        size += file.write(bytes(1 << 20))
            except OSError as error:
                print(place, errno.errorcode[error.errno], 3 << 20 < size <= 4 << 20)
    ";
    let many = "
        import os, errno
        for place in '/work', '/tmp', '/dev/shm':
            try:
                for n in range(1000000):
                    os.mkdir(f'{place}/{n}')
            except OSError as error:
                print(place, errno.errorcode[error.errno], 150 < n <= 200)
    ";
    for each in [fill, many] {
        let full = Answer::ran("/work ENOSPC True\n/tmp ENOSPC True\n/dev/shm ENOSPC True\n");
        assert_eq!(server.run(&code(each)), full);
    }
    let deep = "
        import os
        try:
            while True:
                os.mkdir('d')
                os.chdir('d')
        except OSError:
            print('full')
    ";
    assert_eq!(server.run(&code(deep)), Answer::ran("full\n"));
    let sparse = "
        import os
        try:
            os.truncate(os.open('sparse', os.O_CREAT | os.O_WRONLY), 1 << 40)
        except OSError as error:
            print(error.strerror)
    ";
    assert_eq!(server.run(&code(sparse)), Answer::ran("File too large\n"));
    let look = "
        import os
        for place in '/work', '/tmp', '/dev/shm':
            print(place, os.listdir(place))
    ";
    assert_eq!(server.run(&code(look)), Answer::ran("/work ['main.py']\n/tmp []\n/dev/shm []\n"));
    server.stop();
}

fn request_files_exceeding_the_disk_limits_return_400(engine: &str) {
    let server = serve_on(engine, &["bash"], "[limits]\ndisk = \"64KiB\"\ninodes = 16");
    let ask = |files: Vec<(String, String)>| {
        let program = [("main.sh".to_owned(), "echo *; cat large | wc -c".to_owned())];
        let file = |(name, content): (String, String)| json!({ "name": name, "content": content });
        let files: Vec<Value> = program.into_iter().chain(files).map(file).collect();
        let body = json!({ "language": "bash", "version": "*", "files": files }).to_string();
        server.request("POST", "/api/v2/execute", &[("Content-Type", "application/json")], body.as_bytes())
    };
    // The working directory, the program and two directories count, too.
    let nested = |count: usize| (0..count).map(|number| (format!("a/b/{number}"), String::new())).collect();
    let large = |size: usize| vec![("large".to_owned(), "x".repeat(size))];
    assert_eq!(ask(nested(12)).json()["run"]["stdout"], "a main.sh\n0\n");
    assert_eq!(ask(large(60 << 10)).json()["run"]["stdout"], "large main.sh\n61440\n");
    for (files, words) in [(nested(13), "at most 16 are allowed"), (large((60 << 10) + 1), "a disk of 65536")] {
        let reply = ask(files);
        assert_eq!(reply.status, 400, "{reply:?}");
        assert!(reply.message().contains(words), "{}", reply.message());
    }
    server.stop();
}

fn full_disks_leave_memory_for_the_program(engine: &str) {
    // Files are charged to the memory limit, so each directory may hold at most a quarter of it.
    let server = serve_on(engine, &["python"], "[limits]\nmemory = \"64MiB\"\ndisk = \"256MiB\"\nrun_time = \"30s\"");
    let fill = "
        for place in '/work', '/tmp', '/dev/shm':
            size = 0
            try:
                for n in range(64):
                    with open(f'{place}/{n}', 'wb', buffering=0) as file:
                        size += file.write(bytes(1 << 20))
            except OSError:
                print(place, 15 << 20 < size <= 16 << 20)
    ";
    assert_eq!(server.run(&code(fill)), Answer::ran("/work True\n/tmp True\n/dev/shm True\n"));
    server.stop();
}

#[test]
fn open_files_limit_is_enforced() {
    let server = serve(&["python"], "[limits]\nopen_files = 32");
    let open = "
        import os
        made = 0
        try:
            while True:
                os.dup(0)
                made += 1
        except OSError as error:
            os.write(1, f'{made} {error.strerror}\\n'.encode())
        os._exit(0)
    ";
    assert_eq!(server.run(&code(open)), Answer::ran("29 Too many open files\n"));
    server.stop();
}
