//! What the handlers share, and how they wait for the store.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::auth::Authenticator;
use super::limits::Limits;
use super::problem::Problem;
use super::refusals::Refusals;
use super::reply_queue::ReplyQueue;
use crate::config;
use crate::runtime::health::HealthHandle;
use crate::runtime::metrics::Metrics;
use crate::runtime::resume::ResumeHandle;
use crate::runtime::warnings::Warnings;
use crate::runtime::worker::Waker;
use crate::sampler::Snapshots;
use crate::store::{Connection, SqlResult, Store, StoreError, Transaction};

/// A channel, as the operator sees it.
pub struct Channel {
    /// As its rows in the delivery table say.
    pub name: String,
    /// How it is.
    pub health: HealthHandle,
    /// Ends its pause.
    pub resume: ResumeHandle,
}

/// What the edge needs of the rest.
pub struct AppContext {
    /// Where payments go.
    pub store: Store,
    /// Woken when events were committed.
    pub relay: Waker,
    /// Woken when dead letters were replayed.
    pub notifiers: Waker,
    /// Of new payments.
    pub currency: String,
    /// How many Idempotency-Keys are kept.
    pub keys_max: usize,
    /// Limits.
    pub settings: config::Http,
    /// Who may call.
    pub authenticator: Arc<Authenticator>,
    /// The remote parts, by name.
    pub components: Vec<(String, HealthHandle)>,
    /// Where events go by way of, if they do.
    pub topic: String,
    /// Who is told.
    pub channels: Vec<Channel>,
    /// What waits.
    pub snapshots: Snapshots,
    /// What was refused is counted here.
    pub metrics: Metrics,
    /// Risks of the configuration.
    pub warnings: Warnings,
}

/// What the routes need.
pub struct App {
    pub(super) context: AppContext,
    pub(super) mailbox: Arc<ReplyQueue>,
    pub(super) limits: Arc<Limits>,
    pub(super) refusals: Refusals,
}

impl App {
    /// An edge on the rest.
    pub fn new(context: AppContext) -> Self {
        let limits = Arc::new(Limits::new(&context.settings));
        let refusals = Refusals::new(context.metrics.clone());
        Self {
            context,
            mailbox: Arc::default(),
            limits,
            refusals,
        }
    }

    /// What is kept about clients.
    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// What was refused.
    pub(super) fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// Where answers of other threads arrive.
    pub(super) fn mailbox(&self) -> &Arc<ReplyQueue> {
        &self.mailbox
    }

    /// A write, and its result once it is on the disk.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, Problem> {
        let (answer, answered) = oneshot::channel();
        let mailbox = Arc::clone(&self.mailbox);
        self.context
            .store
            .submit(1, work, move |result| mailbox.post(answer, result))?;
        Ok(flatten(answered.await)?)
    }

    pub(super) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, Problem> {
        // The store's own threads say why, once for as many as are refused.
        Ok(self.look(query).await?)
    }

    pub(super) async fn look<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let mailbox = Arc::clone(&self.mailbox);
        self.context
            .store
            .query(query, move |result| mailbox.post(answer, result))?;
        flatten(answered.await)
    }
}

/// The answer of the store's thread; none comes if the store was closed with the work undone.
pub(super) fn flatten<T>(
    answer: Result<Result<T, StoreError>, oneshot::error::RecvError>,
) -> Result<T, StoreError> {
    answer.unwrap_or(Err(StoreError::Closed))
}
