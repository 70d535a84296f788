//! Measures the cost of a run: bare exec, bwrap, `podman run` and coderunner take turns within one execution.
//!
//! Latency with one client is measured with a full pool: each run starts only after the previous one has been cleaned
//! up and its sandbox replaced. The other loads run without pauses. Their latencies are those after the ready sandboxes
//! have been used up; throughput and CPU time are measured from full pool to full pool, so they are those of a
//! sustained load. Everything is bounded in count and time, and stays on loopback.

mod contenders;
mod cpu;
mod growth;
mod hits;
mod http;
mod jobs;
mod load;
mod processes;
mod report;
mod rounds;
mod sandboxes;
mod server;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use contenders::{Contender, Programs, Spawning, bare, bwrap, podman_run, require_images};
use jobs::{JOBS, Job};
use report::{BASELINE, Memory, OURS, Report, Start};
use rounds::Plan;
use server::{Build, ENGINES, Server};

/// The bench exits after this time, because something must hang.
const QUICK_LIMIT: Duration = Duration::from_secs(1800);
const LONG_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// Measures coderunner against bare exec, bwrap and podman run.
#[derive(Parser)]
struct Cli {
    /// More rounds, longer slices, and the cost of a run after 10,000 others
    #[arg(long)]
    long: bool,
    /// One job only
    #[arg(long, value_parser = JOBS.map(|job| job.name))]
    job: Option<String>,
    /// An older executable of coderunner to compare with
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Print JSON on standard output, and the tables on standard error
    #[arg(long)]
    json: bool,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
    /// Serve the bare warp handler instead of measuring
    #[arg(long, hide = true)]
    bare_warp: bool,
    /// Passed by the subreaper
    #[arg(long, hide = true)]
    reaped: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match (cli.bare_warp, cli.reaped) {
        (true, _) => hits::serve_bare().map(|()| ExitCode::SUCCESS),
        (false, false) => cpu::reap(),
        (false, true) => bench(&cli).map(|holds| if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
    };
    done.unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}

/// Runs the whole bench. Returns whether all claims hold.
fn bench(cli: &Cli) -> Result<bool> {
    ensure!(!cfg!(debug_assertions), "this is a debug build; cargo bench makes a release build");
    ensure!(!nix::unistd::geteuid().is_root(), "cannot run as root, whose containers are not rootless: use make bench");
    let start = Instant::now();
    let (plan, limit) = match cli.long {
        false => (quick(), QUICK_LIMIT),
        true => (long(), LONG_LIMIT),
    };
    watch(limit);
    let jobs: Vec<&Job> = JOBS.iter().filter(|job| cli.job.as_deref().is_none_or(|name| name == job.name)).collect();
    let mut builds = vec![Build { name: OURS, path: executable()? }];
    builds.extend(cli.baseline.clone().map(|path| Build { name: BASELINE, path }));
    let programs = Programs::find()?;
    require_images(&programs, &jobs)?;
    let spawning = [bare(&programs), bwrap(&programs)?, podman_run(&programs)?];

    let mut report = Report::new(plan.clone());
    for job in jobs {
        for contender in &spawning {
            let cannot = || format!("{} cannot run {}", contender.name(), job.name);
            contender.client(job).and_then(|mut run| run()).with_context(cannot)?;
        }
        runs(&mut report, job, &spawning, &builds, &plan)?;
    }
    for engine in ENGINES {
        let start = |build: &Build| Server::start(build, engine, &JOBS[0]);
        let servers = builds.iter().map(start).collect::<Result<Vec<_>>>()?;
        for server in &servers {
            report.growth.extend(growth::measure(server, &JOBS[0], &plan.growth)?);
        }
        // Cache hits do not depend on the engine, so one is enough.
        if report.hits.is_empty() {
            eprintln!("cache hits");
            report.hits = hits::measure(&servers)?;
        }
        servers.into_iter().try_for_each(Server::stop)?;
    }
    report.took_s = start.elapsed().as_secs_f64();
    report.print(cli.json)?;
    Ok(report.holds())
}

/// Measures a job with all contenders: the spawned ones, and a server per engine and build.
fn runs(report: &mut Report, job: &Job, spawning: &[Spawning; 3], builds: &[Build], plan: &Plan) -> Result<()> {
    eprintln!("{}: starting {}", job.name, ENGINES.join(", "));
    let each = ENGINES.iter().flat_map(|engine| builds.iter().map(move |build| (build, *engine)));
    let servers = each.map(|(build, engine)| Server::start(build, engine, job)).collect::<Result<Vec<_>>>()?;
    report.starts.extend(servers.iter().map(|server| Start {
        contender: server.name().into(),
        job: job.name,
        first_answer_ms: server.first_answer.as_secs_f64() * 1e3,
    }));
    let [bare, bwrap, podman_run] = spawning;
    let (bare, bwrap): (&dyn Contender, &dyn Contender) = (bare, bwrap);
    let ours = || servers.iter().map(|server| server as &dyn Contender);
    let all: Vec<&dyn Contender> = [bare, bwrap, podman_run].into_iter().chain(ours()).collect();
    // `podman run` has no pool, so its sustained load with one client measures the same.
    let warm: Vec<&dyn Contender> = [bare, bwrap].into_iter().chain(ours()).collect();
    report.rows.extend(rounds::measure(job, &all, &warm, plan)?);
    for server in servers {
        report.memory.push(Memory {
            contender: server.name().into(),
            job: job.name,
            server: server.memory()?,
            sandbox: server.memory_per_sandbox()?,
        });
        server.stop()?;
    }
    Ok(())
}

fn quick() -> Plan {
    Plan { rounds: 3, slice: Duration::from_millis(400), warm_runs: 8, growth: vec![100] }
}

fn long() -> Plan {
    Plan { rounds: 10, slice: Duration::from_secs(2), warm_runs: 20, growth: vec![100, 1_000, 10_000] }
}

/// Path of the server's executable: the release build that cargo made for this bench, or a copy of it.
fn executable() -> Result<PathBuf> {
    let path = match std::env::var_os("CODERUNNER_TEST_EXE") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_BIN_EXE_coderunner")).to_owned(),
    };
    let missing = || format!("cannot read {}: run make bench, which makes it readable for this user", path.display());
    path.metadata().with_context(missing)?;
    Ok(path)
}

/// Ends this process, and with it the servers, after the time limit.
fn watch(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("bench: not finished after {} s: something hangs", limit.as_secs());
        std::process::exit(1);
    });
}
