//! The report of `doctor`: its checks, and their table for people.

use serde::Serialize;

use crate::sandbox::engine::EngineKind;

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// As expected.
    Ok,
    /// Not as expected, but the configuration does not depend on it.
    Note,
    /// Not as expected, and the configuration depends on it.
    Fail,
}

/// One check: a line of the table.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    /// The engine that was tested; none for checks of the host.
    pub(super) engine: Option<EngineKind>,
    pub(super) name: String,
    pub(super) status: Status,
    pub(super) expected: String,
    pub(super) seen: String,
    /// How to fix it; none if the status is [`Status::Ok`].
    #[serde(rename = "mend")]
    pub(super) fix: Option<String>,
}

impl Check {
    /// A check with status [`Status::Ok`], until [`Check::fail_unless`] changes it.
    pub(super) fn new(name: impl Into<String>, expected: impl Into<String>, seen: impl Into<String>) -> Check {
        Check {
            engine: None,
            name: name.into(),
            status: Status::Ok,
            expected: expected.into(),
            seen: seen.into(),
            fix: None,
        }
    }

    /// Makes it a failure with this fix, unless it is `ok`.
    pub(super) fn fail_unless(mut self, ok: bool, fix: impl Into<String>) -> Check {
        if !ok {
            (self.status, self.fix) = (Status::Fail, Some(fix.into()));
        }
        self
    }

    /// Makes a failure a note.
    pub(super) fn downgrade_to_note(mut self) -> Check {
        if self.status == Status::Fail {
            self.status = Status::Note;
        }
        self
    }

    /// Makes it a check of this engine.
    pub(super) fn for_engine(mut self, engine: EngineKind) -> Check {
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
            if let Some(fix) = &check.fix {
                table += &format!("      {:name$}  -> {fix}\n", "");
            }
        }
        table
    }
}
