//! How long the disk lasts at the pace of the last hour.

use std::time::Duration;

use super::point::Point;

/// Over a shorter time, a checkpoint or a purge looks like a trend.
const SPAN_MIN: Duration = Duration::from_mins(10);

/// What takes longer is not worth a number.
pub const FORECAST_MAX: Duration = Duration::from_hours(30 * 24);

/// The time until the disk is full, at most [`FORECAST_MAX`]; `None`: not known yet.
pub fn time_until_full(points: &[Point]) -> Option<Duration> {
    let mut known = points
        .iter()
        .filter_map(|point| Some((point.at, point.disk_free_bytes?)));
    let (began_at, free_before) = known.next()?;
    let (ended_at, free) = known.next_back()?;
    let span = ended_at.since(began_at);
    if span < SPAN_MIN {
        return None;
    }
    let used = free_before.saturating_sub(free);
    let seconds = u128::from(free) * u128::from(span.as_secs());
    let left = seconds.checked_div(u128::from(used));
    let left = left.and_then(|seconds| u64::try_from(seconds).ok());
    Some(left.map_or(FORECAST_MAX, |seconds| {
        Duration::from_secs(seconds).min(FORECAST_MAX)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::timestamp::Timestamp;
    use crate::runtime::metrics::MetricTotals;

    fn point(minutes: i64, disk_free_bytes: Option<u64>) -> Point {
        Point {
            at: Timestamp::from_micros(minutes * 60_000_000),
            totals: MetricTotals::default(),
            unpublished: 0,
            unconsumed: 0,
            undelivered: 0,
            dead_letters: 0,
            disk_free_bytes,
        }
    }

    #[test]
    fn a_disk_that_loses_a_tenth_in_an_hour_is_full_in_nine() {
        let until_full = |points: &[(i64, Option<u64>)]| {
            let points: Vec<_> = points.iter().map(|(at, free)| point(*at, *free)).collect();
            time_until_full(&points)
        };
        let hour = [(0, Some(1000 << 30)), (30, None), (60, Some(900 << 30))];
        assert_eq!(until_full(&hour), Some(Duration::from_hours(9)));
        // Nothing is known after a short time, or without a free space.
        assert_eq!(until_full(&[(0, Some(1000)), (9, Some(1))]), None);
        assert_eq!(until_full(&[(0, Some(1000)), (60, None)]), None);
        assert_eq!(until_full(&[]), None);
        // It grows, stays, or lasts for years.
        for last in [2000, 1000, 999] {
            let hour = [(0, Some(1_000_000 + 1000)), (60, Some(1_000_000 + last))];
            assert_eq!(until_full(&hour), Some(FORECAST_MAX), "{last}");
        }
        assert_eq!(
            until_full(&[(0, Some(1000)), (60, Some(0))]),
            Some(Duration::ZERO)
        );
    }
}
