//! The payments of a trace. There is no index of trace ids: it would cost each payment a write. So
//! the outbox is read, newest first, a bounded part of it at a time.

use rusqlite::Connection;

use super::payment::{COLUMNS, read_payment_row};
use crate::domain::payment::Payment;
use crate::domain::trace_context::TraceId;

/// How many events one call reads: some milliseconds of a reader. The writer waits for none of it.
pub const EVENTS_READ: u32 = 20_000;

/// What one call found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TracePage {
    /// Newest first.
    pub payments: Vec<Payment>,
    /// The event before which the next call begins; `None`: this was the oldest.
    pub next_before: Option<i64>,
}

/// The payments of a trace among the events before this one. An event that was purged is not found.
pub fn payments_of_trace(
    connection: &Connection,
    trace: &TraceId,
    before: i64,
    events_max: u32,
) -> rusqlite::Result<TracePage> {
    let (oldest, count): (Option<i64>, u32) = connection
        .prepare_cached(
            "SELECT min(id), count(*) FROM \
                (SELECT id FROM outbox WHERE id < ?1 ORDER BY id DESC LIMIT ?2)",
        )?
        .query_row((before, events_max), |row| Ok((row.get(0)?, row.get(1)?)))?;
    let Some(oldest) = oldest else {
        return Ok(TracePage::default());
    };
    // A traceparent begins with its version and a hyphen.
    let payments = connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM outbox o JOIN payment p ON p.id = o.payment_id \
                WHERE o.id >= ?1 AND o.id < ?2 AND substr(o.traceparent, 4, 32) = ?3 \
                ORDER BY o.id DESC"
        ))?
        .query_map((oldest, before, trace.as_str()), read_payment_row)?
        .collect::<rusqlite::Result<_>>()?;
    Ok(TracePage {
        payments,
        next_before: (count == events_max).then_some(oldest),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open;

    #[test]
    fn the_payments_of_a_trace_are_found_page_by_page() {
        let dir = tempfile::tempdir().unwrap();
        let (connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        for id in 1..=7 {
            let payment = "INSERT INTO payment \
                VALUES (?1, 1, ?1, 5, 'KRW', 'COMPLETED', NULL, 1, NULL)";
            connection.execute(payment, [id]).unwrap();
            let parent = (id % 3 == 0).then(|| format!("00-{trace}-00f067aa0ba902b7-01"));
            // Ids may have gaps.
            let event = "INSERT INTO outbox \
                (id, payment_id, user_id, type, traceparent, created_at) \
                VALUES (?1 * 1000000000, ?1, 1, 'payment.completed', ?2, 1)";
            connection.execute(event, (id, parent)).unwrap();
        }
        let trace = TraceId::parse(trace).unwrap();
        let mut before = Some(i64::MAX);
        let mut pages = Vec::new();
        while let Some(id) = before {
            let page = payments_of_trace(&connection, &trace, id, 2).unwrap();
            pages.push(
                page.payments
                    .iter()
                    .map(|payment| payment.id)
                    .collect::<Vec<_>>(),
            );
            before = page.next_before;
        }
        assert_eq!(pages, [vec![6], vec![], vec![3], vec![]]);
        let other = TraceId::parse("4bf92f3577b34da6a3ce929d0e0e4737").unwrap();
        let page = payments_of_trace(&connection, &other, i64::MAX, EVENTS_READ).unwrap();
        assert_eq!(page, TracePage::default());
    }
}
