//! Metrics: their names, units and help texts, and the functions by which other modules record events. Only this file
//! uses the `metrics` crate.
//!
//! Label values come from bounded sets: configured languages, verdicts, routes, error kinds. Data that a client sends
//! never becomes a label.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use metrics::Unit::{Bytes, Count, Seconds};
use metrics::{Counter, Histogram, Unit, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

use crate::host::log;
use crate::model::language::Language;
use crate::model::outcome::{Outcome, StageOutcome};
use crate::sandbox::{Engine, Observer, Sandbox, SandboxError, SandboxSpec};

const REQUESTS: &str = "coderunner_requests_total";
const REQUEST_TIME: &str = "coderunner_request_seconds";
const RUNS: &str = "coderunner_runs_total";
const STAGE_TIME: &str = "coderunner_stage_seconds";
const QUEUE_LENGTH: &str = "coderunner_queue_length";
const QUEUE_WAIT: &str = "coderunner_queue_wait_seconds";
const READY: &str = "coderunner_sandboxes_ready";
const BUSY: &str = "coderunner_sandboxes_busy";
const START_TIME: &str = "coderunner_sandbox_start_seconds";
const REMOVED: &str = "coderunner_sandboxes_removed_total";
const SWEEPS: &str = "coderunner_sweeps_total";
const SWEPT: &str = "coderunner_swept_containers_total";
const CACHE_HITS: &str = "coderunner_cache_hits_total";
const CACHE_MISSES: &str = "coderunner_cache_misses_total";
const CACHE_BYTES: &str = "coderunner_cache_bytes";
const IMAGE_CREATED: &str = "coderunner_image_created_timestamp_seconds";
const IMAGE_UPDATES: &str = "coderunner_image_updates_total";
const PROBES: &str = "coderunner_probes_total";
const ERRORS: &str = "coderunner_errors_total";
const LOG_DROPPED: &str = "coderunner_log_dropped_lines_total";
const BUILD: &str = "coderunner_build_info";

#[derive(Debug, Clone, Copy, PartialEq)]
enum MetricKind {
    Counter,
    Gauge,
    /// Durations in these buckets, in seconds.
    Histogram(&'static [f64]),
}

/// Buckets for requests and stages in seconds: from a cache hit to the longest run.
const TIMES: &[f64] = &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Buckets for making a sandbox, in seconds.
const STARTS: &[f64] = &[0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0];

/// All metrics: kind, name, unit, help.
const ALL: [(MetricKind, &str, Unit, &str); 21] = [
    (MetricKind::Counter, REQUESTS, Count, "Requests by route and status; 499 if the client left before the response"),
    (MetricKind::Histogram(TIMES), REQUEST_TIME, Seconds, "Time from request head to response head, by route"),
    (MetricKind::Counter, RUNS, Count, "Programs run, by language and verdict; cache hits are not counted"),
    (MetricKind::Histogram(TIMES), STAGE_TIME, Seconds, "Wall time of a program's stage, by language and stage"),
    (MetricKind::Gauge, QUEUE_LENGTH, Count, "Requests waiting for a sandbox"),
    (MetricKind::Histogram(TIMES), QUEUE_WAIT, Seconds, "Time a run waited for its sandbox, by language"),
    (MetricKind::Gauge, READY, Count, "Ready sandboxes, by language"),
    (MetricKind::Gauge, BUSY, Count, "Sandboxes running a program, by language"),
    (MetricKind::Histogram(STARTS), START_TIME, Seconds, "Time to make a sandbox, by language"),
    (MetricKind::Counter, REMOVED, Count, "Removed sandboxes, by how: ended by themselves, or removed by force"),
    (MetricKind::Counter, SWEEPS, Count, "Sweeps for containers without an owner, by result"),
    (MetricKind::Counter, SWEPT, Count, "Containers without an owner removed by sweeps"),
    (MetricKind::Counter, CACHE_HITS, Count, "Requests answered from the cache"),
    (MetricKind::Counter, CACHE_MISSES, Count, "Requests not found in the cache"),
    (MetricKind::Gauge, CACHE_BYTES, Bytes, "Memory used by the cache"),
    (MetricKind::Gauge, IMAGE_CREATED, Seconds, "Unix time at which the image in use was created, by language"),
    (MetricKind::Counter, IMAGE_UPDATES, Count, "Image updates, by result"),
    (MetricKind::Counter, PROBES, Count, "Health checks run by /readyz, by language and result"),
    (MetricKind::Counter, ERRORS, Count, "Server-side failures, by kind"),
    (MetricKind::Counter, LOG_DROPPED, Count, "Log lines dropped because they could not be written in time"),
    (MetricKind::Gauge, BUILD, Count, "1, with the version of this server"),
];

/// Collects the metrics of this process and exports them.
#[derive(Clone)]
pub struct Export {
    handle: PrometheusHandle,
    /// Languages whose gauges were ever set: the gauge of a language that is no longer served has to become 0.
    languages: Arc<Mutex<BTreeSet<String>>>,
}

/// Current values of the gauges that are read only when metrics are exported.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Number of requests that wait for a sandbox.
    pub queue_length: usize,
    /// Memory used by the cache, in bytes.
    pub cache_bytes: usize,
    /// Number of ready sandboxes by language.
    pub ready: BTreeMap<String, usize>,
}

/// Metrics cannot be collected.
#[derive(Debug, thiserror::Error)]
#[error("cannot collect metrics: {0}")]
pub struct MetricsError(String);

impl Export {
    /// Installs the recorder of this process.
    pub fn install() -> Result<Export, MetricsError> {
        let error = |error: &dyn std::fmt::Display| MetricsError(error.to_string());
        let mut builder = PrometheusBuilder::new();
        for (kind, name, ..) in ALL {
            if let MetricKind::Histogram(buckets) = kind {
                let matcher = Matcher::Full(name.into());
                builder = builder.set_buckets_for_metric(matcher, buckets).map_err(|e| error(&e))?;
            }
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|e| error(&e))?;
        for (kind, name, unit, help) in ALL {
            match kind {
                MetricKind::Counter => metrics::describe_counter!(name, unit, help),
                MetricKind::Gauge => metrics::describe_gauge!(name, unit, help),
                MetricKind::Histogram(_) => metrics::describe_histogram!(name, unit, help),
            }
        }
        gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        // Export counters without labels from the start: a rate needs an initial 0.
        [CACHE_HITS, CACHE_MISSES, SWEPT].into_iter().for_each(|name| counter!(name).absolute(0));
        Ok(Export { handle, languages: Arc::default() })
    }

    /// Moves recorded samples into their buckets until `stop`: without scrapes they would accumulate.
    pub async fn keep_up(self, stop: CancellationToken) {
        /// Short enough that at full load only a few thousand samples accumulate.
        const PAUSE: Duration = Duration::from_secs(5);
        while tokio::time::timeout(PAUSE, stop.cancelled()).await.is_err() {
            self.handle.run_upkeep();
        }
    }

    /// All metrics in the text format of Prometheus.
    pub fn text(&self, snapshot: &Snapshot) -> String {
        gauge!(QUEUE_LENGTH).set(snapshot.queue_length as f64);
        counter!(LOG_DROPPED).absolute(log::dropped());
        counter!(ERRORS, "kind" => "panic").absolute(log::panics());
        gauge!(CACHE_BYTES).set(snapshot.cache_bytes as f64);
        let mut languages = self.languages.lock().unwrap_or_else(PoisonError::into_inner);
        languages.extend(snapshot.ready.keys().cloned());
        for language in languages.iter() {
            let ready = snapshot.ready.get(language).copied().unwrap_or_default();
            gauge!(READY, "language" => language.clone()).set(ready as f64);
        }
        drop(languages);
        self.handle.render()
    }
}

/// Records a request that was answered or whose client left.
pub fn request(route: &'static str, code: u16, took: Duration) {
    type Handles = HashMap<(&'static str, u16), (Counter, Histogram)>;
    thread_local! {
        // Cached: looking up metrics by labels takes as long as everything else here.
        static HANDLES: RefCell<Handles> = RefCell::default();
    }
    HANDLES.with_borrow_mut(|handles| {
        let (count, times) = handles.entry((route, code)).or_insert_with(|| {
            let count = counter!(REQUESTS, "route" => route, "code" => code.to_string());
            (count, histogram!(REQUEST_TIME, "route" => route))
        });
        count.increment(1);
        times.record(took);
    });
}

/// Records a cache hit or miss.
pub fn cache(hit: bool) {
    counter!(if hit { CACHE_HITS } else { CACHE_MISSES }).increment(1);
}

/// Records that a run got its sandbox after this wait. The sandbox counts as busy until the returned guard is dropped.
pub fn sandbox_taken(language: &str, waited: Duration) -> impl Drop + Send + use<> {
    struct Busy(metrics::Gauge);
    impl Drop for Busy {
        fn drop(&mut self) {
            self.0.decrement(1.0);
        }
    }
    histogram!(QUEUE_WAIT, "language" => language.to_owned()).record(waited);
    let busy = gauge!(BUSY, "language" => language.to_owned());
    busy.increment(1.0);
    Busy(busy)
}

/// Records a run. `compiled` says whether this run compiled the program itself.
pub fn ran(language: &str, outcome: &Outcome, compiled: bool) {
    let labels = [("language", language.to_owned()), ("verdict", api_name(&outcome.verdict()))];
    counter!(RUNS, &labels).increment(1);
    let stage = |stage: &StageOutcome| {
        let labels = [("language", language.to_owned()), ("stage", api_name(&stage.stage))];
        histogram!(STAGE_TIME, &labels).record(Duration::from_micros(stage.usage.wall_us));
    };
    let compile = outcome.compile.as_ref().filter(|_| compiled);
    [compile, outcome.run.as_ref()].into_iter().flatten().for_each(stage);
}

/// Records when the image of a language was built.
pub fn image_created(language: &str, created: SystemTime) {
    let since = created.duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!(IMAGE_CREATED, "language" => language.to_owned()).set(since.as_secs_f64());
}

/// Records an image update.
pub fn image_update(result: &'static str) {
    counter!(IMAGE_UPDATES, "result" => result).increment(1);
}

/// Records that `/readyz` ran a health program.
pub fn probed(language: &str, ok: bool) {
    counter!(PROBES, "language" => language.to_owned(), "result" => result_label(ok)).increment(1);
}

/// Records a failure of the server.
pub fn error(kind: &'static str) {
    counter!(ERRORS, "kind" => kind).increment(1);
}

fn result_label(ok: bool) -> &'static str {
    if ok { "ok" } else { "failed" }
}

/// The name that a unit variant has in the API.
fn api_name(variant: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(variant).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// Measures the sandbox starts of an engine.
pub struct Measured(pub Arc<dyn Engine>);

impl Engine for Measured {
    fn start(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, SandboxError>> {
        Box::pin(async move {
            let language = spec.language.name.clone();
            let began = Instant::now();
            let started = self.0.start(spec).await;
            match &started {
                Ok(_) => histogram!(START_TIME, "language" => language).record(began.elapsed()),
                Err(failure) => error(failure.kind()),
            }
            started
        })
    }

    fn release<'a>(&'a self, image: Option<&'a str>) -> BoxFuture<'a, ()> {
        self.0.release(image)
    }

    fn keep_only(&self, languages: &[Arc<Language>]) {
        self.0.keep_only(languages);
    }
}

/// Counts removed containers and sweeps.
#[derive(Debug, Clone, Copy)]
pub struct Counted;

impl Observer for Counted {
    fn removed(&self, forced: bool) {
        counter!(REMOVED, "how" => if forced { "forced" } else { "itself" }).increment(1);
    }

    fn swept(&self, removed: Option<usize>) {
        counter!(SWEEPS, "result" => result_label(removed.is_some())).increment(1);
        counter!(SWEPT).increment(removed.unwrap_or_default() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::job::Stage;
    use crate::model::outcome::Verdict;

    /// The Grafana dashboard of the package.
    const DASHBOARD: &str = include_str!("../packaging/grafana/coderunner.json");

    /// The names of our metrics in a text; the suffix of a histogram's series is removed.
    fn names(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let ours = words.filter(|word| word.starts_with("coderunner_"));
        let base = |word: &str| match ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)) {
            Some(name) if kind(name).is_some_and(|kind| matches!(kind, MetricKind::Histogram(_))) => name.to_owned(),
            _ => word.to_owned(),
        };
        ours.map(base).collect()
    }

    fn kind(name: &str) -> Option<MetricKind> {
        ALL.iter().find(|(_, known, ..)| *known == name).map(|(kind, ..)| *kind)
    }

    #[test]
    fn metric_names_end_with_their_unit() {
        for (kind, name, unit, help) in ALL {
            assert!(name.starts_with("coderunner_") && !help.ends_with('.'), "{name}");
            assert_eq!(name.ends_with("_total"), kind == MetricKind::Counter, "{name}");
            assert_eq!(name.ends_with("_seconds"), unit == Seconds, "{name}");
            assert_eq!(name.ends_with("_bytes"), unit == Bytes, "{name}");
        }
        let distinct: BTreeSet<&str> = ALL.iter().map(|(_, name, ..)| *name).collect();
        assert_eq!(distinct.len(), ALL.len());
    }

    #[test]
    fn label_values_match_the_api_words() {
        assert_eq!(api_name(&Verdict::TimeLimit), "time_limit");
        assert_eq!(api_name(&Stage::Compile), "compile");
    }

    #[test]
    fn dashboard_shows_exactly_the_known_metrics() {
        let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        assert!(panels.iter().all(|panel| panel["title"].is_string()));
        let queries: String = panels
            .iter()
            .flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default())
            .map(|target| target["expr"].as_str().unwrap().to_owned() + "\n")
            .collect();
        let known: BTreeSet<String> = ALL.iter().map(|(_, name, ..)| (*name).to_owned()).collect();
        assert_eq!(names(&queries), known);
    }
}
