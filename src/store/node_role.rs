//! The node in its database: when it was created, its role, and the events that others deliver.
//!
//! `node.edge_through`: every event up to this id without a delivery was published by an edge. So
//! the audit misses no delivery there, and the purge waits for none, also after the node has become
//! single again.

use rusqlite::{Connection, Result as SqlResult, Transaction};

use super::row::row_limit;
use super::unconsumed;
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;

/// How many rows one step of the mark passes.
const STEP_ROWS: usize = 10_000;

/// The role at the last start.
pub fn node_role(connection: &Connection) -> SqlResult<NodeRole> {
    connection
        .prepare_cached("SELECT role FROM node")?
        .query_row([], |row| row.get(0))
}

/// When the database was created, in the first place: a copy has the same time.
pub fn node_created_at(connection: &Connection) -> SqlResult<Timestamp> {
    connection
        .prepare_cached("SELECT created_at FROM node")?
        .query_row([], |row| row.get(0).map(Timestamp::from_micros))
}

/// How many events this node still has to deliver itself: before that it cannot be an edge.
pub fn count_own_deliveries(connection: &Connection) -> SqlResult<i64> {
    let sql = "SELECT count(*) FROM delivery WHERE status IN ('PENDING', 'SENDING', 'DEAD')";
    let deliveries: i64 = connection.query_row(sql, [], |row| row.get(0))?;
    if node_role(connection)? == NodeRole::Edge {
        return Ok(deliveries);
    }
    Ok(deliveries + unconsumed::count_unconsumed(connection)?.count)
}

/// Whether others deliver this event, unless it has a delivery.
pub(super) fn is_edge_event(connection: &Connection, outbox_id: i64) -> SqlResult<bool> {
    connection
        .prepare_cached("SELECT role = 'edge' OR ?1 <= edge_through FROM node")?
        .query_row([outbox_id], |row| row.get(0))
}

/// Stores the role.
pub fn save_node_role(tx: &Transaction<'_>, role: NodeRole) -> SqlResult<()> {
    tx.prepare_cached("UPDATE node SET role = ?1")?
        .execute([role])
        .map(drop)
}

/// On an edge: moves the marks over published events. Returns whether there may be more of them.
pub fn advance_edge_mark(tx: &Transaction<'_>) -> SqlResult<bool> {
    if node_role(tx)? != NodeRole::Edge {
        return Ok(false);
    }
    // The next event that is not published, or is rejected: few rows have no other status.
    let mut statement = tx.prepare_cached(
        "SELECT id, status = 'INIT' FROM outbox \
            WHERE id > (SELECT max(edge_through, consumed_through) FROM node) \
            ORDER BY id LIMIT ?1",
    )?;
    let mut rows = statement.query([row_limit(STEP_ROWS)])?;
    let mut passed = 0;
    let mut reached = 0;
    while let Some(row) = rows.next()? {
        if row.get(1)? {
            break;
        }
        passed += 1;
        reached = row.get(0)?;
    }
    if passed > 0 {
        let sql = "UPDATE node SET edge_through = max(edge_through, ?1), \
            consumed_through = max(consumed_through, ?1)";
        tx.prepare_cached(sql)?.execute([reached])?;
    }
    Ok(passed == STEP_ROWS)
}

/// The oldest events that an edge published, and that are published before `cutoff`. They have no
/// delivery.
pub(super) fn purgeable_edge_events(
    tx: &Transaction<'_>,
    cutoff: i64,
    limit: usize,
) -> SqlResult<Vec<i64>> {
    let mut statement = tx.prepare_cached(
        "SELECT o.id, o.status = 'PUBLISHED', o.published_at < ?1, \
            EXISTS (SELECT 1 FROM delivery d WHERE d.outbox_id = o.id) FROM outbox o \
            WHERE o.id <= (SELECT edge_through FROM node) ORDER BY o.id LIMIT ?2",
    )?;
    let mut rows = statement.query((cutoff, row_limit(STEP_ROWS)))?;
    let mut ids = Vec::new();
    while let Some(row) = rows.next()? {
        let is_published: bool = row.get(1)?;
        // Rejected events, and those that were delivered here, are not the purge's business.
        if !is_published || row.get(3)? {
            continue;
        }
        // Events are published in the order of their ids.
        let is_old: bool = row.get(2)?;
        if !is_old || ids.len() == limit {
            break;
        }
        ids.push(row.get(0)?);
    }
    Ok(ids)
}
