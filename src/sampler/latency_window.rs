//! The latencies of the last minute, from the counts of the histograms a minute ago and now.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

use crate::runtime::metrics::Metrics;
use crate::runtime::metrics::histogram::BucketCounts;

/// The samples of a minute, and the one before them.
const WINDOW: usize = 13;

/// The median and the 99th percentile, in milliseconds. They come from the buckets of a histogram,
/// so they are as precise as these.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    p50_ms: f64,
    p99_ms: f64,
}

impl Quantiles {
    fn of_counts(counts: &BucketCounts) -> Option<Self> {
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1_000.0;
        Some(Self {
            p50_ms: milliseconds(counts.quantile(500)?),
            p99_ms: milliseconds(counts.quantile(990)?),
        })
    }
}

/// The latencies of the last minute; `None` without any.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Latencies {
    /// From a complete head of a request to its response, of everything at `/payments`.
    pub answer: Option<Quantiles>,
    /// From the commit to the acknowledgement.
    pub publish: Option<Quantiles>,
    /// From the publication to the delivery table.
    pub consume: Option<Quantiles>,
    /// From the commit to the acceptance by each channel, in their order.
    pub channels: Vec<Option<Quantiles>>,
}

/// The counts of all histograms at one moment: answer, publish, consume, then the channels.
type LatencyCounts = Vec<Option<BucketCounts>>;

/// The counts of the last minute, oldest first.
#[derive(Debug, Default)]
pub(super) struct LatencyWindow(VecDeque<LatencyCounts>);

impl LatencyWindow {
    /// Adds the counts now, and returns the latencies since the oldest counts.
    pub(super) fn add(&mut self, metrics: &Metrics) -> Latencies {
        let stages = [
            metrics.http().durations_of_route("/payments"),
            Some(metrics.relay().latency.counts()),
            Some(metrics.consumer().latency.counts()),
        ];
        let channels = metrics.channel_latencies().into_iter().map(Some);
        let now: LatencyCounts = stages.into_iter().chain(channels).collect();
        let before = self.0.front();
        let quantiles = |(index, counts): (usize, &Option<BucketCounts>)| {
            let counts = counts.as_ref()?;
            let before = before.and_then(|before| before.get(index)?.as_ref());
            match before {
                Some(before) => Quantiles::of_counts(&counts.since(before)),
                None => Quantiles::of_counts(counts),
            }
        };
        let mut found = now.iter().enumerate().map(quantiles);
        let latencies = Latencies {
            answer: found.next().flatten(),
            publish: found.next().flatten(),
            consume: found.next().flatten(),
            channels: found.collect(),
        };
        if self.0.len() == WINDOW - 1 {
            self.0.pop_front();
        }
        self.0.push_back(now);
        latencies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_of_latencies_forgets_what_is_older_than_a_minute() {
        let metrics = Metrics::default();
        let channel = metrics.channel("default");
        let mut window = LatencyWindow::default();
        let none = Latencies {
            channels: vec![None],
            ..Latencies::default()
        };
        assert_eq!(window.add(&metrics), none);
        channel.latency.observe(Duration::from_millis(3), None);
        metrics
            .relay()
            .latency
            .observe(Duration::from_secs(20), None);
        for _ in 1..WINDOW {
            let latencies = window.add(&metrics);
            assert!(latencies.publish.unwrap().p50_ms > 10_000.0);
            assert!(latencies.channels[0].unwrap().p99_ms <= 5.0);
        }
        assert_eq!(window.add(&metrics), none);
    }
}
