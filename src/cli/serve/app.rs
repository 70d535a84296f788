//! Builds the application that answers requests. A reload replaces it.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use bytesize::ByteSize;

use crate::config::Settings;
use crate::http::auth::Gate;
use crate::http::middleware::App;
use crate::http::origin::Origins;
use crate::http::routes::Routes;
use crate::http::{Api, Budget, Sockets};
use crate::metrics::Export;
use crate::model::language::Language;
use crate::run::cache::OutcomeCache;
use crate::run::readiness::Readiness;
use crate::run::{Runner, Tasks};
use crate::scheduler::Pool;

/// Builds the application from settings. Its fields belong to the server and survive reloads.
#[derive(Clone)]
pub(super) struct AppBuilder {
    /// The address of the listener, which systemd may have opened.
    pub(super) address: SocketAddr,
    pub(super) pool: Arc<Pool>,
    pub(super) tasks: Tasks,
    pub(super) metrics: Export,
    pub(super) sockets: Arc<Sockets>,
}

impl AppBuilder {
    /// Builds the application for these settings and languages.
    pub(super) fn build(&self, settings: &Settings, languages: &[Arc<Language>]) -> anyhow::Result<Arc<App>> {
        let cache = OutcomeCache::new(settings.cache).context("cannot make the cache")?;
        let (pool, tasks) = (Arc::clone(&self.pool), self.tasks.clone());
        let bytes = |size: ByteSize| usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
        let api = Api {
            runner: Arc::new(Runner::new(languages.to_vec(), cache, pool, tasks, settings.batch.build.as_u64())),
            readiness: Readiness::new(settings.ready),
            metrics: self.metrics.clone(),
            answers: Arc::new(Budget::new(bytes(settings.answer_memory))),
            bodies: Arc::new(Budget::new(bytes(settings.answer_memory))),
            sockets: Arc::clone(&self.sockets),
            body_limit: bytes(settings.body_limit),
            source_limit: bytes(settings.source_limit),
            playground: settings.playground,
        };
        let origins = Origins::new(&settings.allowed_hosts, &settings.cors_origins, self.address);
        Ok(Arc::new(App { routes: Routes::new(api), gate: Gate::new(&settings.access), origins }))
    }
}
