//! `/admin/overview`: everything that an operator looks at first, in one response.

use std::time::Duration;

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::super::app::App;
use super::super::health::ReadyView;
use super::super::response::{Body, json_response};
use super::channels::ChannelView;
use super::disk_forecast::time_until_full;
use crate::domain::timestamp::Timestamp;
use crate::sampler::{Point, Quantiles};
use crate::store::FileSizes;
use crate::store::operation;

const MINUTE: Duration = Duration::from_mins(1);

#[derive(Serialize)]
struct OverviewView<'a> {
    version: &'static str,
    started_at: Timestamp,
    #[serde(flatten)]
    ready: ReadyView<'a>,
    /// `null` until the first sample.
    last_minute: Option<LastMinute>,
    latency: LatencyView,
    channels: Vec<ChannelView<'a>>,
    files: Option<FileSizes>,
    /// At the pace of the last hour; `null`: not known yet.
    disk_full_in_s: Option<u64>,
    /// Missing if the database cannot say; `null` if there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_backup: Option<serde_json::Value>,
    /// The same for the last audit.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_audit: Option<serde_json::Value>,
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
    payments: i64,
    published: u64,
    delivered: u64,
}

impl LastMinute {
    /// Compares the last point with the last one that is a minute older, or else the first one.
    fn of_points(points: &[Point]) -> Option<Self> {
        let last = points.last()?;
        let begin = last.at.minus(MINUTE);
        let before = points.iter().rev().find(|point| point.at <= begin);
        let first = before.or_else(|| points.first())?;
        Some(Self {
            payments: last.last_payment_id.saturating_sub(first.last_payment_id),
            published: last.totals.published - first.totals.published,
            delivered: last.totals.delivered - first.totals.delivered,
        })
    }
}

impl App {
    /// 200 also while payments are refused, or the database fails: the response says so.
    pub(super) async fn overview(&self) -> Response<Body> {
        let last_backup = self.try_query(operation::last_backup).await.ok();
        let last_backup = last_backup.map(|backup| serde_json::json!(backup));
        let last_audit = self.try_query(operation::last_audit).await.ok();
        let last_audit = last_audit.map(|audit| serde_json::json!(audit));
        let (_, ready) = self.health_readiness().await;
        let sample = self.context.snapshots.latest();
        let latencies = self.context.snapshots.latencies();
        let history = self.context.snapshots.history();
        let view = OverviewView {
            version: env!("CARGO_PKG_VERSION"),
            started_at: self.started_at,
            ready,
            last_minute: LastMinute::of_points(&history),
            latency: LatencyView {
                answer: latencies.answer,
                publish: latencies.publish,
                consume: latencies.consume,
            },
            channels: self.view_channels(sample.as_deref()),
            files: sample.as_ref().map(|sample| sample.files),
            disk_full_in_s: time_until_full(&history).map(|time| time.as_secs()),
            last_backup,
            last_audit,
        };
        json_response(StatusCode::OK, &view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::metrics::MetricTotals;

    #[test]
    fn the_overview_compares_points_that_are_a_minute_apart() {
        let point = |seconds: i64| Point {
            at: Timestamp::from_micros(seconds * 1_000_000),
            totals: MetricTotals {
                published: seconds.unsigned_abs(),
                ..MetricTotals::default()
            },
            last_payment_id: seconds * 2,
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
        assert_eq!(LastMinute::of_points(&points), Some(minute(120, 60)));
        assert_eq!(LastMinute::of_points(&points[..4]), Some(minute(30, 15)));
        assert_eq!(LastMinute::of_points(&[]), None);
    }
}
