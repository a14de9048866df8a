//! `/overview`: everything that an operator looks at first, in one response; and the last hour of
//! it. Both have counts and states of all payments, and the content of none.

use std::time::Duration;

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::admin::channels::ChannelView;
use super::app::App;
use super::health::{READ_TIMEOUT, ReadyView};
use super::response::{Body, json_response};
use crate::config::PublisherKind;
use crate::domain::access::Access;
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;
use crate::runtime::metrics::MetricTotals;
use crate::sampler::disk_forecast::time_until_full;
use crate::sampler::{Point, Quantiles, Sample};
use crate::store::operation::{self, AuditRecord, OperationRecord};
use crate::store::topic::Partition;
use crate::store::{Connection, FileSizes};

const MINUTE: Duration = Duration::from_mins(1);

#[derive(Serialize)]
struct OverviewView<'a> {
    version: &'static str,
    started_at: Timestamp,
    /// What the client of this request may do.
    access: &'static str,
    /// `application` or `kafka`.
    publisher: &'static str,
    /// `single` or `edge`.
    role: NodeRole,
    #[serde(flatten)]
    ready: ReadyView<'a>,
    totals: TotalsView,
    /// `null` until the first sample.
    last_minute: Option<LastMinute>,
    latency: LatencyView,
    queue: QueueView,
    channels: Vec<ChannelView<'a>>,
    /// `null` without Kafka.
    topic: Option<TopicView<'a>>,
    files: Option<FileSizes>,
    /// At the pace of the last hour; `null`: not known yet.
    disk_full_in_s: Option<u64>,
    /// Missing if the database cannot say.
    #[serde(flatten)]
    operations: Option<OperationsView>,
}

/// The last ones; `null` if there was none.
#[derive(Serialize)]
struct OperationsView {
    last_backup: Option<OperationRecord>,
    last_audit: Option<AuditRecord>,
}

/// What was done since the start of payrelay. Two of these show a rate.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct TotalsView {
    payments: u64,
    published: u64,
    delivered: u64,
}

impl TotalsView {
    fn new(totals: &MetricTotals) -> Self {
        Self {
            payments: totals.payments,
            published: totals.published,
            delivered: totals.delivered,
        }
    }
}

/// The payments that wait for their commit.
#[derive(Serialize)]
struct QueueView {
    payments: usize,
    max: usize,
}

#[derive(Serialize)]
struct TopicView<'a> {
    name: &'a str,
    partitions: &'a [Partition],
}

/// A point of the last hour.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct PointView {
    at: Timestamp,
    #[serde(flatten)]
    totals: TotalsView,
    unpublished: i64,
    unconsumed: i64,
    undelivered: i64,
    dead_letters: i64,
}

impl PointView {
    fn new(point: &Point) -> Self {
        Self {
            at: point.at,
            totals: TotalsView::new(&point.totals),
            unpublished: point.unpublished,
            unconsumed: point.unconsumed,
            undelivered: point.undelivered,
            dead_letters: point.dead_letters,
        }
    }
}

#[derive(Serialize)]
struct HistoryView {
    points: Vec<PointView>,
}

/// The latencies of the last minute; `null` without any.
#[derive(Serialize)]
struct LatencyView {
    answer: Option<Quantiles>,
    publish: Option<Quantiles>,
    consume: Option<Quantiles>,
}

/// What was done in the last minute, or since the start.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct LastMinute {
    payments: u64,
    published: u64,
    delivered: u64,
}

impl LastMinute {
    /// Compares with the last point that is a minute old, or else the first one.
    fn since_points(points: &[Point], totals: &MetricTotals, now: Timestamp) -> Option<Self> {
        let begin = now.minus(MINUTE);
        let before = points.iter().rev().find(|point| point.at <= begin);
        let first = before.or_else(|| points.first())?;
        Some(Self {
            payments: totals.payments - first.totals.payments,
            published: totals.published - first.totals.published,
            delivered: totals.delivered - first.totals.delivered,
        })
    }
}

impl App {
    /// 200 also while payments are refused, or the database fails: the response says so.
    pub(super) async fn overview(&self, access: Access) -> Response<Body> {
        let query = |connection: &Connection| {
            Ok(OperationsView {
                last_backup: operation::last_backup(connection)?,
                last_audit: operation::last_audit(connection)?,
            })
        };
        let operations = self.try_query_within(READ_TIMEOUT, query).await;
        let operations = operations.and_then(Result::ok);
        let (_, ready) = self.health_readiness().await;
        let sample = self.context.snapshots.latest();
        let latencies = self.context.snapshots.latencies();
        let history = self.context.snapshots.history();
        let totals = self.context.store.metrics().totals();
        let view = OverviewView {
            version: env!("CARGO_PKG_VERSION"),
            started_at: self.started_at,
            access: access.name(),
            publisher: self.context.publisher.name(),
            role: self.context.role,
            ready,
            totals: TotalsView::new(&totals),
            last_minute: LastMinute::since_points(&history, &totals, Timestamp::now()),
            latency: LatencyView {
                answer: latencies.answer,
                publish: latencies.publish,
                consume: latencies.consume,
            },
            queue: QueueView {
                payments: self.context.store.queued_payments(),
                max: self.context.database.queue_max.get(),
            },
            channels: self.view_channels(sample.as_deref()),
            topic: self.view_topic(sample.as_deref()),
            files: sample.as_ref().map(|sample| sample.files),
            disk_full_in_s: time_until_full(&history).map(|time| time.as_secs()),
            operations,
        };
        json_response(StatusCode::OK, &view)
    }

    fn view_topic<'a>(&'a self, sample: Option<&'a Sample>) -> Option<TopicView<'a>> {
        (self.context.publisher == PublisherKind::Kafka).then(|| TopicView {
            name: &self.context.topic,
            partitions: sample.map_or(&[], |sample| &sample.gauges.partitions),
        })
    }

    /// The last hour, a point for every five seconds, oldest first.
    pub(super) fn overview_history(&self) -> Response<Body> {
        let points = self.context.snapshots.history();
        let points = points.iter().map(PointView::new).collect();
        json_response(StatusCode::OK, &HistoryView { points })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overview_compares_points_that_are_a_minute_apart() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let totals = |seconds: i64| MetricTotals {
            payments: 2 * seconds.unsigned_abs(),
            published: seconds.unsigned_abs(),
            ..MetricTotals::default()
        };
        let point = |seconds: i64| Point {
            at: at(seconds),
            totals: totals(seconds),
            unpublished: 0,
            unconsumed: 0,
            undelivered: 0,
            dead_letters: 0,
            disk_free_bytes: None,
        };
        let points: Vec<_> = (1..=30).map(|number| point(number * 5)).collect();
        let minute = |payments, published| LastMinute {
            payments,
            published,
            delivered: 0,
        };
        let last_minute = |points: &[Point], seconds| {
            LastMinute::since_points(points, &totals(seconds), at(seconds))
        };
        assert_eq!(last_minute(&points, 150), Some(minute(120, 60)));
        assert_eq!(last_minute(&points, 152), Some(minute(124, 62)));
        assert_eq!(last_minute(&points[..4], 21), Some(minute(32, 16)));
        assert_eq!(last_minute(&[], 150), None);
    }
}
