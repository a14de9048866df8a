//! Health: whether payrelay is alive and accepts payments, and the waiting rows.

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::app::App;
use super::response::{Body, json_response};
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::Health;
use crate::sampler::Sample;
use crate::store::waiting::Waiting;
use crate::store::{self, StoreError};

/// A disk that hangs may hold the readers up: the response does not wait for them.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(2);

impl App {
    /// Ready also while Kafka or Slack is unavailable: payments are accepted.
    pub(super) async fn health_ready(&self) -> Response<Body> {
        let (status, ready) = self.health_readiness().await;
        json_response(status, &ready)
    }

    /// For load balancers: the status alone.
    pub(super) async fn health_ready_status_only(&self) -> Response<Body> {
        let (status, ready) = self.health_readiness().await;
        json_response(status, &serde_json::json!({ "status": ready.status }))
    }

    pub(super) async fn health_readiness(&self) -> (StatusCode, ReadyView<'_>) {
        let ping = self.try_query_within(READ_TIMEOUT, store::ping_store).await;
        let store = &self.context.store;
        let database = store.database_state();
        let disk = store.disk_state();
        if database.is_failing() {
            // No payment is accepted any more, so only a probe shows that the database works again.
            store.probe();
        }
        // Too many waiting reads are no failure: payments have a queue of their own.
        let responds = matches!(ping, Some(Ok(()) | Err(StoreError::Busy)));
        let works = responds && !database.is_failing() && !disk.is_failing();
        let mut components: BTreeMap<_, _> = self
            .context
            .components
            .iter()
            .map(|(name, health)| (name.as_str(), health.get()))
            .collect();
        let pending = self
            .context
            .snapshots
            .latest()
            .map(|snapshot| ReadyPending::new(&snapshot, Timestamp::now()));
        let late = pending.as_ref().is_some_and(ReadyPending::is_late);
        let (status, name) = if !works {
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
        } else if late || components.values().any(Health::is_failing) {
            (StatusCode::OK, "degraded")
        } else {
            (StatusCode::OK, "ready")
        };
        components.extend([("database", database), ("disk", disk)]);
        (
            status,
            ReadyView {
                status: name,
                node: store.node().as_str(),
                components,
                pending,
                warnings: self.context.warnings.get(),
            },
        )
    }
}

#[derive(Serialize)]
pub(super) struct ReadyView<'a> {
    status: &'static str,
    node: &'a str,
    components: BTreeMap<&'a str, Health>,
    /// `null` until the first sample.
    pending: Option<ReadyPending>,
    /// Risks of the configuration: they do not change the status.
    warnings: Vec<String>,
}

/// The waiting rows of the last sample.
#[derive(Serialize)]
struct ReadyPending {
    sampled_at: Timestamp,
    unpublished: Age,
    unconsumed: Age,
    undelivered: Age,
    dead_letters: Age,
}

#[derive(Serialize)]
struct Age {
    count: i64,
    oldest_at: Option<Timestamp>,
    oldest_age_s: u64,
}

/// A published event usually has its delivery long before.
const UNCONSUMED_AGE_MAX_S: u64 = 60;

impl ReadyPending {
    fn new(snapshot: &Sample, now: Timestamp) -> Self {
        let age = |waiting: Waiting| Age {
            count: waiting.count,
            oldest_at: waiting.oldest_at,
            oldest_age_s: waiting.age(now).as_secs(),
        };
        let backlog = &snapshot.backlog;
        Self {
            sampled_at: snapshot.at,
            unpublished: age(backlog.unpublished),
            unconsumed: age(backlog.unconsumed),
            undelivered: age(backlog.undelivered()),
            dead_letters: age(backlog.dead_letters),
        }
    }

    fn is_late(&self) -> bool {
        self.unconsumed.oldest_age_s > UNCONSUMED_AGE_MAX_S
    }
}
