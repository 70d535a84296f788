//! The report: tables and JSON.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use crate::growth::Cost;
use crate::hits::Hits;
use crate::rounds::{Pace, Plan, Row};

/// The contenders that coderunner is compared with, besides its baseline.
const RIVALS: [&str; 3] = ["bare exec", "bwrap", "podman run"];

/// Names of the measured build and of the older one.
pub const OURS: &str = "coderunner";
pub const BASELINE: &str = "baseline";

/// How much slower than bare exec an uncached run of the job `sh` may be with a full pool.
const MOST_ABOVE_BARE_MS: f64 = 5.0;

/// The time from the start of a server to its first answer.
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    pub contender: String,
    pub job: &'static str,
    pub first_answer_ms: f64,
}

/// Memory of an idle server, in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    pub contender: String,
    pub job: &'static str,
    /// RSS of the server.
    pub server: u64,
    /// PSS of a sandbox and of all processes that exist for it.
    pub sandbox: u64,
}

/// Ratios: the numbers of a contender, divided by those of a rival for the same job and pace.
#[derive(Debug, Clone, Serialize)]
struct Ratio {
    job: &'static str,
    pace: Pace,
    contender: String,
    rival: String,
    p50: f64,
    runs_per_s: Option<f64>,
    cpu: Option<f64>,
}

/// A claim about performance, and whether it holds.
#[derive(Debug, Clone, Serialize)]
struct Claim {
    claim: String,
    measured: String,
    holds: bool,
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    cpus: usize,
    load_before: String,
    plan: Plan,
    pub took_s: f64,
    pub rows: Vec<Row>,
    pub starts: Vec<Start>,
    pub memory: Vec<Memory>,
    pub hits: Vec<Hits>,
    pub growth: Vec<Cost>,
}

impl Report {
    /// An empty report.
    pub fn new(plan: Plan) -> Report {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Report {
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            load_before: load.split(' ').take(3).collect::<Vec<_>>().join(" "),
            plan,
            took_s: 0.0,
            rows: Vec::new(),
            starts: Vec::new(),
            memory: Vec::new(),
            hits: Vec::new(),
            growth: Vec::new(),
        }
    }

    /// Whether all claims hold.
    pub fn holds(&self) -> bool {
        self.claims().iter().all(|claim| claim.holds)
    }

    /// Prints the tables, and on request the JSON.
    pub fn print(&self, json: bool) -> Result<()> {
        let tables = self.tables();
        if !json {
            print!("{tables}");
            return Ok(());
        }
        eprint!("{tables}");
        let mut value = serde_json::to_value(self)?;
        value["ratios"] = serde_json::to_value(self.ratios())?;
        value["claims"] = serde_json::to_value(self.claims())?;
        println!("{value:#}");
        Ok(())
    }

    /// The ratios of coderunner to each rival.
    fn ratios(&self) -> Vec<Ratio> {
        let ours = self.rows.iter().filter(|row| row.contender.starts_with(OURS));
        let against = |row: &Row, rival: String| {
            let same = |other: &&Row| (other.job, other.pace, &other.contender) == (row.job, row.pace, &rival);
            let other = self.rows.iter().find(same)?;
            let quotient = |ours: Option<f64>, theirs: Option<f64>| Some(ours? / theirs?);
            Some(Ratio {
                job: row.job,
                pace: row.pace,
                contender: row.contender.clone(),
                rival,
                p50: row.p50_ms / other.p50_ms,
                runs_per_s: quotient(row.runs_per_s, other.runs_per_s),
                cpu: quotient(row.cpu_ms, other.cpu_ms),
            })
        };
        let rivals = |row: &Row| {
            let baseline = row.contender.replacen(OURS, BASELINE, 1);
            RIVALS.iter().map(|rival| (*rival).to_owned()).chain([baseline])
        };
        ours.flat_map(|row| rivals(row).filter_map(move |rival| against(row, rival))).collect()
    }

    /// The claims, checked with the numbers of this run.
    fn claims(&self) -> Vec<Claim> {
        let warm = |row: &&Row| (row.job, row.pace) == ("sh", Pace::WarmPool);
        let Some(bare) = self.rows.iter().filter(warm).find(|row| row.contender == RIVALS[0]) else {
            return Vec::new();
        };
        let ours = self.rows.iter().filter(warm).filter(|row| row.contender.starts_with(OURS));
        let claim = |row: &Row| Claim {
            claim: format!(
                "{}, full pool, uncached sh: median at most bare exec + {MOST_ABOVE_BARE_MS} ms",
                row.contender
            ),
            measured: format!("{} ms, bare exec {} ms", number(row.p50_ms), number(bare.p50_ms)),
            holds: row.p50_ms <= bare.p50_ms + MOST_ABOVE_BARE_MS,
        };
        ours.map(claim).collect()
    }

    fn tables(&self) -> String {
        let mut text = format!(
            "\n{} CPUs, load before {}, {} rounds of {} ms, {:.0} s in all.\n",
            self.cpus,
            self.load_before,
            self.plan.rounds,
            self.plan.slice.as_millis(),
            self.took_s,
        );
        text.push_str(
            "Clients \"1, warm pool\": the pool is full again before each run. The other loads run without pauses: \
             latencies exclude\nthe runs that the pool served, runs/s and CPU are measured from full pool to full pool. \
             CPU: user and system time of\nall processes that a run needs, including those that make its sandbox and \
             clean up.\n",
        );
        let mut section = |title: &str, left: usize, head: &[&str], lines: Vec<Vec<String>>| {
            if !lines.is_empty() {
                let _ = write!(text, "\n## {title}\n\n{}", table(left, head, &lines));
            }
        };
        let head = ["job", "clients", "contender", "runs", "p50 ms", "p95 ms", "runs/s", "CPU ms/run"];
        section("Runs", 3, &head, self.rows.iter().map(run_line).collect());
        let head = ["job", "clients", "contender", "divided by", "p50", "runs/s", "CPU/run"];
        let ratio = |ratio: &Ratio| {
            let numbers = [Some(ratio.p50), ratio.runs_per_s, ratio.cpu].map(optional);
            let names = [ratio.job.into(), pace(ratio.pace), ratio.contender.clone(), ratio.rival.clone()];
            names.into_iter().chain(numbers).collect()
        };
        section("Ratios of the same run", 4, &head, self.ratios().iter().map(ratio).collect());
        let hit = |hits: &Hits| vec![hits.server.clone(), number(hits.p50_ms), format!("{:.0}", hits.per_s)];
        let mut lines: Vec<Vec<String>> = self.hits.iter().map(hit).collect();
        if let [ours, others @ ..] = self.hits.as_slice() {
            let divided = |other: &Hits| {
                let name = format!("{} / {}", ours.server, other.server);
                vec![name, number(ours.p50_ms / other.p50_ms), number(ours.per_s / other.per_s)]
            };
            lines.extend(others.iter().map(divided));
        }
        section("Cache hits, 4 clients", 1, &["server", "p50 ms", "hits/s"], lines);
        let start = |start: &Start| vec![start.contender.clone(), start.job.into(), number(start.first_answer_ms)];
        let lines = self.starts.iter().map(start).collect();
        section("From the server's start to the first answer", 2, &["server", "job", "ms"], lines);
        let memory = |m: &Memory| vec![m.contender.clone(), m.job.into(), mebibytes(m.server), mebibytes(m.sandbox)];
        let head = ["server", "job", "server MiB (RSS)", "idle sandbox MiB (PSS)"];
        section("Memory", 2, &head, self.memory.iter().map(memory).collect());
        let cost = |cost: &Cost| {
            let numbers = [cost.cpu_ms, cost.wall_ms].map(number);
            let rest = [mebibytes(cost.server_memory), cost.descriptors.to_string()];
            [cost.contender.clone(), cost.after.to_string()].into_iter().chain(numbers).chain(rest).collect()
        };
        let head = ["server", "runs before", "CPU ms/run", "wall ms/run", "server MiB", "open files"];
        section("Cost of an sh run after others", 1, &head, self.growth.iter().map(cost).collect());
        let claim = |claim: &Claim| {
            let holds = if claim.holds { "yes" } else { "NO" };
            vec![claim.claim.clone(), claim.measured.clone(), holds.into()]
        };
        let lines = self.claims().iter().map(claim).collect();
        section("Claims", 3, &["claim", "measured", "holds"], lines);
        text
    }
}

fn run_line(row: &Row) -> Vec<String> {
    let names = [row.job.into(), pace(row.pace), row.contender.clone(), row.runs.to_string()];
    let numbers = [Some(row.p50_ms), Some(row.p95_ms), row.runs_per_s, row.cpu_ms];
    names.into_iter().chain(numbers.map(optional)).collect()
}

fn pace(pace: Pace) -> String {
    match pace {
        Pace::WarmPool => "1, warm pool".into(),
        Pace::Sustained(clients) => clients.to_string(),
    }
}

fn optional(value: Option<f64>) -> String {
    value.map_or("-".into(), number)
}

/// Formats a number with about three significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        v if v < 0.1 => format!("{value:.4}"),
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn mebibytes(bytes: u64) -> String {
    number(bytes as f64 / f64::from(1 << 20))
}

/// Formats a Markdown table with aligned columns; the first `left` columns are left-aligned.
fn table(left: usize, head: &[&str], lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].len(), 3]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let cell = |(column, text): (usize, &str)| match column < left {
        true => format!(" {text:<0$} |", widths[column]),
        false => format!(" {text:>0$} |", widths[column]),
    };
    let row = |cells: &mut dyn Iterator<Item = &str>| format!("|{}\n", cells.enumerate().map(cell).collect::<String>());
    let rule = |(column, width): (usize, &usize)| match column < left {
        true => format!("{}|", "-".repeat(width + 2)),
        false => format!("{}:|", "-".repeat(width + 1)),
    };
    let mut text = row(&mut head.iter().copied());
    let _ = writeln!(text, "|{}", widths.iter().enumerate().map(rule).collect::<String>());
    lines.iter().for_each(|line| text.push_str(&row(&mut line.iter().map(String::as_str))));
    text
}
