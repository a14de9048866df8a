//! The node in its database: when it was created, its role, and the events that others deliver.
//!
//! `node.edge_through`: every event up to this id without a delivery was published by an edge. So
//! the audit misses no delivery there, and the purge waits for none, also after the node has become
//! single again.

use rusqlite::{Connection, Result as SqlResult, Transaction};

use super::row::row_limit;
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

/// The largest ids that the node has given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastIds {
    /// To an event.
    pub event: i64,
    /// To a payment.
    pub payment: i64,
}

/// The largest ids.
pub fn last_ids(connection: &Connection) -> SqlResult<LastIds> {
    let last = |table| {
        connection
            .prepare_cached("SELECT ifnull((SELECT seq FROM sqlite_sequence WHERE name = ?1), 0)")?
            .query_row([table], |row| row.get(0))
    };
    Ok(LastIds {
        event: last("outbox")?,
        payment: last("payment")?,
    })
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
    // Up to the first event that waits. Rejected ones get new ids once they are replayed.
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
        "SELECT o.id, o.status = 'PUBLISHED', o.published_at < ?1, o.published_at > ?3, \
            EXISTS (SELECT 1 FROM delivery d WHERE d.outbox_id = o.id) FROM outbox o \
            WHERE o.id <= (SELECT edge_through FROM node) ORDER BY o.id LIMIT ?2",
    )?;
    let now = Timestamp::now().as_micros();
    let mut rows = statement.query((cutoff, row_limit(STEP_ROWS), now))?;
    let mut ids = Vec::new();
    while let Some(row) = rows.next()? {
        let is_published: bool = row.get(1)?;
        // Rejected events, and those that were delivered here, are not the purge's business.
        if !is_published || row.get(4)? {
            continue;
        }
        // Published while the clock was wrong: it says nothing about later ones.
        if row.get(3)? {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::dead_letter_action::replay_rejected_event;
    use crate::store::engine::open;
    use crate::store::outbox::purge_outbox;
    use rusqlite::TransactionBehavior;

    /// Events in these states, from id 1 on: published at the time of their id, rejected or not
    /// published. `+` adds a delivery.
    fn with_edge_events<T>(states: &[&str], work: impl FnOnce(&Transaction<'_>) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = Transaction::new(&mut connection, TransactionBehavior::Immediate).unwrap();
        for (id, state) in (1_i64..).zip(states) {
            let name = state.trim_end_matches('+');
            tx.execute(
                "INSERT INTO payment (user_id, reservation_id, amount, currency, status, \
                    executed_at) VALUES (1, ?1, 1, 'KRW', 'COMPLETED', 1)",
                [id],
            )
            .unwrap();
            let published_at = (name == "PUBLISHED").then_some(id);
            let rejection = (name == "REJECTED").then_some("too large");
            tx.execute(
                "INSERT INTO outbox (payment_id, user_id, type, status, rejection, created_at, \
                    published_at) VALUES (?1, 1, 'payment.completed', ?2, ?3, 1, ?4)",
                (id, name, rejection, published_at),
            )
            .unwrap();
            if state.ends_with('+') {
                let sql = "INSERT INTO delivery (outbox_id, channel, created_at) \
                    VALUES (?1, 'default', 1)";
                tx.execute(sql, [id]).unwrap();
            }
        }
        work(&tx)
    }

    fn ids(tx: &Transaction<'_>) -> Vec<i64> {
        let mut statement = tx.prepare("SELECT id FROM outbox ORDER BY id").unwrap();
        let ids = statement.query_map([], |row| row.get(0)).unwrap();
        ids.map(Result::unwrap).collect()
    }

    #[test]
    fn the_purge_deletes_published_events_of_an_edge_and_waits_for_deliveries_of_a_single_node() {
        let states = ["PUBLISHED", "REJECTED", "PUBLISHED", "INIT", "PUBLISHED"];
        let cutoff = Timestamp::from_micros(100);
        with_edge_events(&states, |tx| {
            assert_eq!(purge_outbox(tx, cutoff, 10).unwrap(), 0, "a single node");
            save_node_role(tx, NodeRole::Edge).unwrap();
            assert_eq!(purge_outbox(tx, Timestamp::from_micros(2), 10).unwrap(), 1);
            assert_eq!(purge_outbox(tx, cutoff, 10).unwrap(), 1);
            assert_eq!(ids(tx), [2, 4, 5], "nothing after the first that waits");
            tx.execute(
                "UPDATE outbox SET status = 'PUBLISHED', published_at = 9 WHERE id = 4",
                [],
            )
            .unwrap();
            assert_eq!(purge_outbox(tx, cutoff, 1).unwrap(), 1);
            assert_eq!(purge_outbox(tx, cutoff, 1).unwrap(), 1);
            assert_eq!(ids(tx), [2]);
            let purged: i64 = tx
                .query_row("SELECT events_purged FROM node", [], |row| row.get(0))
                .unwrap();
            assert_eq!(purged, 4);
        });
    }

    #[test]
    fn events_of_an_edge_are_purged_after_it_has_become_single_again() {
        with_edge_events(&["PUBLISHED", "PUBLISHED"], |tx| {
            save_node_role(tx, NodeRole::Edge).unwrap();
            advance_edge_mark(tx).unwrap();
            save_node_role(tx, NodeRole::Single).unwrap();
            let cutoff = Timestamp::from_micros(100);
            assert_eq!(purge_outbox(tx, cutoff, 10).unwrap(), 2);
        });
    }

    #[test]
    fn an_edge_replays_a_rejected_event_under_a_new_id() {
        with_edge_events(&["PUBLISHED", "REJECTED", "PUBLISHED"], |tx| {
            save_node_role(tx, NodeRole::Edge).unwrap();
            assert!(replay_rejected_event(tx, 2).unwrap());
            assert_eq!(ids(tx), [1, 3, 4]);
            let next: i64 = tx
                .query_row(
                    "SELECT seq FROM sqlite_sequence WHERE name = 'payment'",
                    [],
                    |row| row.get(0),
                )
                .unwrap();
            assert_eq!(next, 4, "the next payment has the id of its event");
        });
    }
}
