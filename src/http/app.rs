//! The state that the handlers share, and their calls to the store.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::auth::Authenticator;
use super::limits::Limits;
use super::problem::Problem;
use super::refusals::Refusals;
use super::reply_queue::ReplyQueue;
use super::route_pattern::RoutePattern;
use crate::config;
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::HealthHandle;
use crate::runtime::metrics::RouteMetrics;
use crate::runtime::resume::ResumeHandle;
use crate::runtime::warnings::Warnings;
use crate::runtime::worker::{Waker, WorkerGroup};
use crate::sampler::Samples;
use crate::store::{Connection, SqlResult, Store, StoreError, Transaction};

/// A channel, as an operator sees it.
pub struct Channel {
    /// Its name, also in the delivery table.
    pub name: String,
    /// Its state.
    pub health: HealthHandle,
    /// Ends its pause.
    pub resume: ResumeHandle,
}

/// The connections of the HTTP server to the rest.
pub struct AppContext {
    /// Stores payments.
    pub store: Store,
    /// Wakes the relay after a commit.
    pub relay: Waker,
    /// Wakes the notifiers after dead letters were replayed.
    pub notifiers: Waker,
    /// The currency of new payments.
    pub currency: String,
    /// The maximum number of stored Idempotency-Keys.
    pub keys_max: usize,
    /// The configuration.
    pub settings: config::Http,
    /// Knows the clients.
    pub authenticator: Arc<Authenticator>,
    /// The remote components, by name.
    pub components: Vec<(String, HealthHandle)>,
    /// Where events are published.
    pub publisher: config::PublisherKind,
    /// The role of the node.
    pub role: NodeRole,
    /// The topic of the events, with Kafka.
    pub topic: String,
    /// The limits of the database.
    pub database: config::Database,
    /// The threads, and their heartbeats.
    pub workers: WorkerGroup,
    /// The channels of Slack.
    pub channels: Vec<Channel>,
    /// The waiting rows.
    pub snapshots: Samples,
    /// Risks of the configuration.
    pub warnings: Warnings,
}

/// The shared state of the handlers.
pub struct App {
    pub(super) context: AppContext,
    pub(super) replies: Arc<ReplyQueue>,
    pub(super) limits: Arc<Limits>,
    pub(super) refusals: Refusals,
    /// The metrics of each route pattern.
    routes: Vec<RouteMetrics>,
    pub(super) started_at: Timestamp,
}

impl App {
    /// The state for this context.
    pub fn new(context: AppContext) -> Self {
        let limits = Arc::new(Limits::new(&context.settings));
        let routes = RoutePattern::register(context.store.metrics().http());
        Self {
            context,
            routes,
            replies: Arc::default(),
            limits,
            refusals: Refusals::default(),
            started_at: Timestamp::now(),
        }
    }

    /// The usage of the clients.
    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// The metrics of a route.
    pub(super) fn route_metrics(&self, pattern: RoutePattern) -> &RouteMetrics {
        &self.routes[pattern as usize]
    }

    /// The log of refused requests.
    pub(super) fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// Receives replies of other threads.
    pub(super) fn reply_queue(&self) -> &Arc<ReplyQueue> {
        &self.replies
    }

    /// Runs a write, and returns its result after the commit.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, Problem> {
        let (answer, answered) = oneshot::channel();
        let replies = Arc::clone(&self.replies);
        self.context
            .store
            .submit(1, work, move |result| replies.push(answer, result))?;
        Ok(flatten_store_reply(answered.await)?)
    }

    pub(super) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, Problem> {
        // The store's threads log the reason, once for many refusals.
        Ok(self.try_query(query).await?)
    }

    /// `None`: the database has not responded within this time.
    pub(super) async fn try_query_within<T: Send + 'static>(
        &self,
        limit: Duration,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
    ) -> Option<Result<T, StoreError>> {
        tokio::time::timeout(limit, self.try_query(query))
            .await
            .ok()
    }

    pub(super) async fn try_query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let replies = Arc::clone(&self.replies);
        self.context
            .store
            .query(query, move |result| replies.push(answer, result))?;
        flatten_store_reply(answered.await)
    }
}

/// The reply of the store's thread; none arrives if the store was closed first.
pub(super) fn flatten_store_reply<T>(
    answer: Result<Result<T, StoreError>, oneshot::error::RecvError>,
) -> Result<T, StoreError> {
    answer.unwrap_or(Err(StoreError::Closed))
}
