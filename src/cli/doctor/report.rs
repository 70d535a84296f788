//! The report of `doctor`: its checks, and the table that people read.

use serde::Serialize;

use crate::sandbox::engine::EngineKind;

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// As expected.
    Ok,
    /// Not as expected, which the configuration can do without.
    Note,
    /// Not as expected, which the configuration cannot do without.
    Fail,
}

/// One check: a line of the table.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    /// The engine that was tried; none where the host was.
    pub(super) engine: Option<EngineKind>,
    pub(super) name: String,
    pub(super) status: Status,
    pub(super) expected: String,
    pub(super) seen: String,
    /// How to mend it; none where nothing is wrong.
    pub(super) mend: Option<String>,
}

impl Check {
    /// A check whose result is as expected.
    pub(super) fn new(name: impl Into<String>, expected: impl Into<String>, seen: impl Into<String>) -> Check {
        Check {
            engine: None,
            name: name.into(),
            status: Status::Ok,
            expected: expected.into(),
            seen: seen.into(),
            mend: None,
        }
    }

    /// Makes it a failure, with how to mend it, unless all is `well`.
    pub(super) fn or(mut self, well: bool, mend: impl Into<String>) -> Check {
        if !well {
            (self.status, self.mend) = (Status::Fail, Some(mend.into()));
        }
        self
    }

    /// Makes a failure a note.
    pub(super) fn noted(mut self) -> Check {
        if self.status == Status::Fail {
            self.status = Status::Note;
        }
        self
    }

    /// Makes it a check of this engine.
    pub(super) fn of(mut self, engine: EngineKind) -> Check {
        self.engine = Some(engine);
        self
    }
}

/// All checks.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether no check failed.
    pub(super) ok: bool,
    /// In the order in which they were made.
    pub(super) checks: Vec<Check>,
}

impl Report {
    /// Adds a check.
    pub(super) fn add(&mut self, check: Check) {
        self.ok &= check.status != Status::Fail;
        self.checks.push(check);
    }

    /// The table for people.
    pub(super) fn table(&self) -> String {
        let widest = |of: fn(&Check) -> &str| self.checks.iter().map(|check| of(check).chars().count()).max();
        let name = widest(|check| &check.name).unwrap_or_default();
        let expected = widest(|check| &check.expected).unwrap_or_default();
        let mut table = format!("      {:name$}  {:expected$}  SEEN\n", "", "EXPECTED");
        let mut engine = None;
        for check in &self.checks {
            if check.engine != engine {
                engine = check.engine;
                table += &engine.map_or_else(|| "\n".to_owned(), |engine| format!("\nengine {engine}\n"));
            }
            let mark = match check.status {
                Status::Ok => "ok",
                Status::Note => "note",
                Status::Fail => "FAIL",
            };
            table += &format!("{mark:4}  {:name$}  {:expected$}  {}\n", check.name, check.expected, check.seen);
            if let Some(mend) = &check.mend {
                table += &format!("      {:name$}  -> {mend}\n", "");
            }
        }
        table
    }
}
