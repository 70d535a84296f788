//! Thousands of harmless and hostile runs, as many at once as there are containers: each answer is correct, and at the
//! end the server holds no more resources than at the start.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::client::Answer;
use crate::harness::{Options, Server, engine, eventually};
use crate::leftovers::{self, podman};

/// Number of containers and of clients.
const WIDTH: usize = 6;

/// Number of runs: `CODERUNNER_TEST_RUNS`, or as many as take about a minute.
fn runs() -> usize {
    let default = if engine() == Some("podman") { 100 } else { 1000 };
    std::env::var("CODERUNNER_TEST_RUNS")
        .map_or(default, |text| text.parse().expect("CODERUNNER_TEST_RUNS is a number"))
}

/// A kind of program, and its expected outcome.
struct Kind {
    language: &'static str,
    /// `NUMBER` is replaced by a different number in each run.
    code: &'static str,
    /// Additional fields of the request.
    with: &'static [(&'static str, u64)],
    /// The verdict is one of these.
    verdicts: &'static [&'static str],
    stdout: &'static str,
}

const fn kind(language: &'static str, code: &'static str, verdict: &'static [&'static str], out: &'static str) -> Kind {
    Kind { language, code, with: &[], verdicts: verdict, stdout: out }
}

const KINDS: [Kind; 17] = [
    kind("bash", "echo NUMBER", &["ok"], "NUMBER\n"),
    kind("bash", "echo $((NUMBER + 1 - 1)) | cat | cat; echo oops >&2", &["ok"], "NUMBER\n"),
    kind("bash", "read -r line; echo \"$line NUMBER\"", &["ok"], "typed NUMBER\n"),
    kind("c", "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", NUMBER); return 0; }", &["ok"], "NUMBER\n"),
    kind("c", "#include <stdlib.h>\nint main(void) { abort(); return NUMBER; }", &["signalled"], ""),
    kind("c", "int main(void) { return missing + NUMBER; }", &["compile_error"], ""),
    kind("python", "print(sum(range(1000)), NUMBER)", &["ok"], "499500 NUMBER\n"),
    kind("bash", "echo NUMBER; exit 3", &["runtime_error"], "NUMBER\n"),
    // Leaves processes behind that hold the streams.
    kind("bash", "sleep 100 & (setsid sleep 100 &); echo NUMBER", &["ok"], "NUMBER\n"),
    kind("bash", "kill -9 -1 1 2>/dev/null; echo NUMBER", &["ok"], "NUMBER\n"),
    kind("bash", "cat /dev/zero >/tmp/full 2>/dev/null; ls -l /tmp | wc -l; : NUMBER", &["ok"], "2\n"),
    kind("bash", "while mkdir d 2>/dev/null && cd d; do :; done; echo NUMBER", &["ok"], "NUMBER\n"),
    kind("bash", "yes NUMBER", &["output_limit"], "NUMBER\n"),
    Kind { with: &[("run_timeout", 2000)], ..kind("bash", "echo NUMBER; sleep 100", &["time_limit"], "NUMBER\n") },
    Kind {
        with: &[("run_cpu_time", 200)],
        ..kind("c", "int main(void) { for (;;); return NUMBER; }", &["time_limit"], "")
    },
    Kind {
        with: &[("run_memory_limit", 40_000_000)],
        ..kind("python", "x = bytearray(100_000_000)\nimport time\ntime.sleep(100)\nNUMBER", &["memory_limit"], "")
    },
    // Where the kernel does not report refused processes, the verdict is the time limit.
    Kind {
        with: &[("run_timeout", 400)],
        ..kind("bash", "bomb() { bomb | bomb & }; bomb; sleep 100; : NUMBER", &["time_limit", "process_limit"], "")
    },
];

impl Kind {
    #[track_caller]
    fn run(&self, server: &Server, number: usize) {
        let fill = |text: &str| text.replace("NUMBER", &(1_000_000 + number).to_string());
        let mut body = json!({"language": self.language, "version": "*", "stdin": "typed\n"});
        body["files"] = json!([{"content": fill(self.code)}]);
        for (field, value) in self.with {
            body[field] = json!(value);
        }
        let headers = [("Content-Type", "application/json")];
        let pending = server.begin_request("POST", "/api/v2/execute", &headers, body.to_string().as_bytes());
        // Every 20th client disconnects after a short delay.
        if number % 20 == 19 {
            std::thread::sleep(Duration::from_millis((number % 7 * 20) as u64));
            return;
        }
        let reply = pending.reply();
        let answer: Value = reply.json();
        let is_expected = self.verdicts.iter().any(|verdict| answer["verdict"] == *verdict)
            && answer["run"]["stdout"].as_str().unwrap_or_default().starts_with(&fill(self.stdout));
        assert!(is_expected, "{} {}: {answer}", reply.status, fill(self.code));
    }
}

/// Everything that a run could leave behind.
#[derive(Debug, PartialEq, Eq)]
struct Resources {
    sandboxes: usize,
    containers: usize,
    mounts: usize,
    cgroups: usize,
    files: usize,
    descriptors: Vec<usize>,
}

impl Resources {
    fn of(server: &Server) -> Resources {
        let count = |dir: &str| fs::read_dir(dir).map_or(0, Iterator::count);
        let processes = [vec![server.pid()], leftovers::agents(server.pid())].concat();
        let mounts = podman(&["unshare", "cat", "/proc/self/mountinfo"]);
        Resources {
            sandboxes: leftovers::sandboxes(&server.instance),
            containers: server.containers().len(),
            // The mounts of other servers change meanwhile.
            mounts: mounts.lines().filter(|line| line.contains(&server.instance)).count(),
            cgroups: count(&cgroup_of(server.pid())),
            files: files_below(&leftovers::runtime_dir(&server.instance)),
            descriptors: processes.iter().map(|pid| count(&format!("/proc/{pid}/fd"))).collect(),
        }
    }
}

/// The directory in which a server creates cgroups, beside its own.
fn cgroup_of(pid: Pid) -> String {
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    format!("/sys/fs/cgroup{}", own.trim_end_matches("/sup"))
}

fn files_below(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.map(|entry| 1 + if is_dir(&entry) { files_below(&entry.path()) } else { 0 }).sum()
}

fn memory_kib(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Runs the programs with numbers from `first` on, and returns how long each took.
fn soak(server: &Server, first: usize, count: usize) -> Vec<Duration> {
    let (next, took) = (AtomicUsize::new(first), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..WIDTH {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= first + count {
                        break;
                    }
                    let started = Instant::now();
                    KINDS[number % KINDS.len()].run(server, number);
                    took.lock().unwrap().push(started.elapsed());
                }
            });
        }
    });
    took.into_inner().unwrap()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn many_runs_leave_no_resources_behind() {
    let runs = runs();
    let server = Server::start(Options {
        languages: &["bash", "c", "python"],
        containers: WIDTH,
        // A small cache and little output, so that cached answers do not look like a leak.
        config: "cache.size = \"64KiB\"\n[limits]\noutput = \"16KiB\"\noutput_total = \"256KiB\"\n\
                 disk = \"4MiB\"\ninodes = 200\nprocesses = 24",
        ..Options::default()
    });
    server.wait_each_ready();
    // Warm up until buffers and tables have reached their final size.
    soak(&server, 0, (runs / 5).max(WIDTH * KINDS.len()));
    let (before, memory) = (at_rest(&server), memory_kib(&server));
    let part = (runs / 5).max(KINDS.len());
    let early = median(soak(&server, runs, part));
    soak(&server, 2 * runs, runs.saturating_sub(2 * part));
    let late = median(soak(&server, 3 * runs, part));
    eventually(&format!("resources before: {before:?}, now: {:?}", Resources::of(&server)), || {
        (Resources::of(&server) == before).then_some(())
    });
    let grown = memory_kib(&server).saturating_sub(memory);
    println!(
        "{runs} runs: median {early:?} at first, {late:?} at last, {:.2} times; memory {memory} KiB and {grown} KiB more; resources: {before:?}",
        late.as_secs_f64() / early.as_secs_f64()
    );
    assert!(grown < 8 * 1024, "{runs} runs took {grown} KiB of memory");
    assert_eq!(server.run("echo end"), Answer::ran("end\n"));
    server.stop();
}

/// Waits until all sandboxes are ready again, and returns the resources that the server then holds.
fn at_rest(server: &Server) -> Resources {
    let mut last = Resources::of(server);
    eventually("the server is idle", || {
        let now = Resources::of(server);
        let is_idle = now == last && now.sandboxes == WIDTH;
        last = now;
        is_idle.then_some(())
    });
    last
}
