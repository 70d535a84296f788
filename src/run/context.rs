//! On whose behalf something is done: known to all that a request does itself, like the span of its log lines.

use std::sync::Arc;

use tracing::Instrument;

use crate::host::signals;
use crate::model::client::Client;

tokio::task_local! {
    static CALLER: Caller;
}

/// A request, and who sent it.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The request's id.
    pub request: Arc<str>,
    /// Who sent it.
    pub client: Client,
}

impl Caller {
    /// The one on whose behalf the code that asks is run, if it is a request's.
    pub fn current() -> Option<Caller> {
        CALLER.try_with(Clone::clone).ok()
    }

    /// For a task that is spawned: does what it does on behalf of whoever spawns it, and its log lines are of that span. A
    /// panic in it ends nothing else.
    pub fn pass_on<F: Future>(future: F) -> impl Future<Output = F::Output> {
        let caller = Caller::current();
        // Its state is large, and would be copied from one wrapper into the next on the stack.
        let future = Box::pin(future);
        let passed_on = async move {
            match caller {
                Some(caller) => caller.scope(future).await,
                None => future.await,
            }
        };
        signals::apart(passed_on).in_current_span()
    }

    /// Does something on this caller's behalf. Tasks that it spawns are not: they have to be told.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        CALLER.scope(self, future).await
    }
}
