//! The events that wait to be published, as people see them.

use rusqlite::{Connection, Row};
use serde::Serialize;

use super::outbox::EventStatus;
use super::row::row_limit;
use crate::domain::node_id::NodeId;
use crate::domain::timestamp::Timestamp;

/// The events of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutboxFilter {
    /// Those that wait.
    Init,
    /// Those that the broker rejects: each is an open dead letter.
    Rejected,
}

/// An event of the outbox, as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OutboxEventView {
    /// Its place in commit order.
    pub outbox_id: i64,
    /// The id of the event.
    pub event: String,
    /// The payment.
    pub payment_id: i64,
    /// The user.
    pub user_id: i64,
    /// Its status.
    pub status: EventStatus,
    /// When it was committed.
    pub created_at: Timestamp,
    /// Why the broker rejects it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejection: Option<String>,
}

/// At most `limit` events with larger ids than `after`, oldest first.
pub fn list_outbox_events(
    connection: &Connection,
    node: &NodeId,
    filter: OutboxFilter,
    after: i64,
    limit: usize,
) -> rusqlite::Result<Vec<OutboxEventView>> {
    let sql = match filter {
        OutboxFilter::Init => {
            "SELECT o.id, o.payment_id, o.user_id, o.status, o.created_at, o.rejection \
                FROM outbox o WHERE o.status = 'INIT' AND o.id > ?1 ORDER BY o.id LIMIT ?2"
        }
        // No index has them, but the open dead letters are few.
        OutboxFilter::Rejected => {
            "SELECT o.id, o.payment_id, o.user_id, o.status, o.created_at, o.rejection \
                FROM dead_letter l JOIN outbox o ON o.id = l.outbox_id WHERE l.state = 'OPEN' \
                AND o.status = 'REJECTED' AND o.id > ?1 ORDER BY o.id LIMIT ?2"
        }
    };
    let read = |row: &Row<'_>| {
        let outbox_id = row.get(0)?;
        Ok(OutboxEventView {
            outbox_id,
            event: node.event_id(outbox_id),
            payment_id: row.get(1)?,
            user_id: row.get(2)?,
            status: row.get(3)?,
            created_at: Timestamp::from_micros(row.get(4)?),
            rejection: row.get(5)?,
        })
    };
    connection
        .prepare_cached(sql)?
        .query_map((after, row_limit(limit)), read)?
        .collect()
}
