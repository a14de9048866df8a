//! The payments of a time, such as those of a day.
//!
//! Payments have no index of their time: it would cost each payment a write. Ids grow with time,
//! so the first id of a time is searched. After a clock was set back, a time's ids overlap with
//! those before. So the search begins an hour early and ends an hour late.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _};

use super::payment::{COLUMNS, read_payment_row};
use super::row::row_limit;
use crate::domain::payment::{Payment, Status};
use crate::domain::timestamp::Timestamp;

/// By how much a clock may have been set back.
const CLOCK_STEP_MAX: Duration = Duration::from_hours(1);

/// The payments of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakingsFilter {
    /// From this moment on.
    pub since: Timestamp,
    /// Before this moment.
    pub until: Timestamp,
    /// Only those with this status.
    pub status: Option<Status>,
}

/// At most `limit` payments with ids larger than `after`, in the order of their ids.
pub fn payments_of_time(
    connection: &Connection,
    filter: TakingsFilter,
    after: i64,
    limit: usize,
) -> rusqlite::Result<Vec<Payment>> {
    let first = first_payment_since(connection, filter.since.minus(CLOCK_STEP_MAX))?;
    let end = first_payment_since(connection, filter.until.plus(CLOCK_STEP_MAX))?;
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM payment p WHERE p.id >= ?1 AND p.id < ?2 \
                AND p.executed_at >= ?3 AND p.executed_at < ?4 \
                AND (?5 IS NULL OR p.status = ?5) ORDER BY p.id LIMIT ?6"
        ))?
        .query_map(
            (
                first.max(after.saturating_add(1)),
                end,
                filter.since.as_micros(),
                filter.until.as_micros(),
                filter.status,
                row_limit(limit),
            ),
            read_payment_row,
        )?
        .collect()
}

/// The id of the first payment that is not older; beyond the last one if all are.
fn first_payment_since(connection: &Connection, time: Timestamp) -> rusqlite::Result<i64> {
    let mut low: i64 = 0;
    let last: i64 = connection
        .prepare_cached("SELECT ifnull(max(id), 0) FROM payment")?
        .query_row([], |row| row.get(0))?;
    let mut high = last.saturating_add(1);
    let mut probe = connection
        .prepare_cached("SELECT id, executed_at FROM payment WHERE id >= ?1 ORDER BY id LIMIT 1")?;
    while low < high {
        let middle = low.midpoint(high);
        let found: Option<(i64, i64)> = probe
            .query_row([middle], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        match found {
            Some((id, executed_at)) if executed_at < time.as_micros() => low = id + 1,
            _ => high = middle,
        }
    }
    Ok(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open;

    const HOUR: i64 = 3_600_000_000;

    fn ids_of(payments: &[(i64, i64)], since: i64, until: i64, status: Option<Status>) -> Vec<i64> {
        let dir = tempfile::tempdir().unwrap();
        let (connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        for (id, executed_at) in payments {
            let status = if id % 2 == 0 { "FAILED" } else { "COMPLETED" };
            let failure = (id % 2 == 0).then_some("no");
            connection
                .execute(
                    "INSERT INTO payment VALUES (?1, 1, ?1, 5, 'KRW', ?2, ?3, ?4, NULL)",
                    (id, status, failure, executed_at),
                )
                .unwrap();
        }
        let filter = TakingsFilter {
            since: Timestamp::from_micros(since),
            until: Timestamp::from_micros(until),
            status,
        };
        let mut ids = Vec::new();
        loop {
            let after = ids.last().copied().unwrap_or(0);
            let page = payments_of_time(&connection, filter, after, 2).unwrap();
            if page.is_empty() {
                return ids;
            }
            ids.extend(page.iter().map(|payment| payment.id));
        }
    }

    #[test]
    fn the_payments_of_a_time_are_found_by_their_ids() {
        let hourly: Vec<_> = (1..=48).map(|id| (id * 3, id * HOUR)).collect();
        let hours = |ids: Vec<i64>| ids.iter().map(|id| id / 3).collect::<Vec<_>>();
        assert_eq!(
            hours(ids_of(&hourly, 10 * HOUR, 15 * HOUR, None)),
            [10, 11, 12, 13, 14]
        );
        assert_eq!(
            hours(ids_of(&hourly, 10 * HOUR, 15 * HOUR, Some(Status::Failed))),
            [10, 12, 14]
        );
        assert_eq!(ids_of(&hourly, 0, i64::MAX, None).len(), 48);
        assert!(ids_of(&hourly, 49 * HOUR, 50 * HOUR, None).is_empty());
        assert!(ids_of(&[], 0, HOUR, None).is_empty());
    }

    #[test]
    fn the_payments_of_a_time_are_found_though_the_clock_was_set_back() {
        let payments = [(1, HOUR), (2, 10 * HOUR), (3, 9 * HOUR + 1), (4, 11 * HOUR)];
        assert_eq!(ids_of(&payments, 10 * HOUR, 11 * HOUR, None), [2]);
        assert_eq!(ids_of(&payments, 9 * HOUR, 10 * HOUR, None), [3]);
    }
}
