//! What an edge reports about itself.

use crate::config::Config;
use crate::domain::node_role::NodeRole;
use crate::domain::node_status::{NodeStatus, ReportedEvents, ReportedPending};
use crate::domain::timestamp::Timestamp;
use crate::kafka::status::StatusReports;
use crate::sampler::Samples;
use crate::store::{Store, node_role};

/// The reports of an edge; `None` for other nodes.
pub(super) fn edge_reports(
    config: &Config,
    store: &Store,
    samples: &Samples,
) -> Option<StatusReports> {
    let interval = config.fleet.status_interval;
    if config.node.role != NodeRole::Edge || interval.is_zero() {
        return None;
    }
    let store = store.clone();
    let samples = samples.clone();
    let started_at = Timestamp::now();
    let source = move |published| {
        let status = describe_edge(&store, &samples, started_at, published)?;
        // Numbers and texts always become JSON.
        serde_json::to_string(&status).ok()
    };
    Some(StatusReports {
        interval,
        source: Box::new(source),
    })
}

/// `None` before the first sample, and while the database does not answer.
fn describe_edge(
    store: &Store,
    samples: &Samples,
    started_at: Timestamp,
    published: i64,
) -> Option<NodeStatus> {
    let sample = samples.last()?;
    let last = store.read(node_role::last_ids).ok()?;
    let unpublished = sample.backlog.unpublished;
    Some(NodeStatus {
        v: 1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        role: NodeRole::Edge.as_str().to_owned(),
        at: Timestamp::now(),
        started_at,
        events: ReportedEvents {
            stored: last.event,
            published,
        },
        pending: ReportedPending {
            count: unpublished.count,
            oldest_at: unpublished.oldest_at,
        },
        rejected: sample.gauges.rejected_events,
        last_payment: last.payment,
        disk_free: sample.files.disk_free_bytes,
        is_full: store.disk_state().is_failing(),
        database_bytes: sample.files.database_bytes,
    })
}
