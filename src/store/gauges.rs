//! What a sample reads of the database in addition to the waiting rows. Each number is read from
//! the end of an index, or from a table that stays small.

use rusqlite::{Connection, OptionalExtension as _};

use super::topic::{self, Partition};
use super::{idempotency, operation};
use crate::domain::timestamp::Timestamp;

/// The numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredGauges {
    /// Events that the broker rejected, and that wait for an operator.
    pub rejected_events: i64,
    /// Open dead letters: records of the topic.
    pub dead_records: i64,
    /// The partitions of the topic; none without Kafka.
    pub partitions: Vec<Partition>,
    /// Stored Idempotency-Keys.
    pub idempotency_keys: i64,
    /// The last operation of each kind with each outcome.
    pub operations: Vec<operation::LastOperation>,
    /// When the database was created.
    pub created_at: Option<Timestamp>,
}

/// Reads the numbers; of the topic with this name, with Kafka.
pub fn read_stored_gauges(
    connection: &Connection,
    topic: Option<&str>,
) -> rusqlite::Result<StoredGauges> {
    let count = |sql: &str| -> rusqlite::Result<i64> {
        connection
            .prepare_cached(sql)?
            .query_row([], |row| row.get(0))
    };
    let created_at: Option<i64> = connection
        .prepare_cached("SELECT created_at FROM node")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(StoredGauges {
        rejected_events: count(
            "SELECT count(*) FROM outbox o JOIN dead_letter l ON l.outbox_id = o.id \
                WHERE o.status = 'REJECTED' AND l.state = 'OPEN'",
        )?,
        dead_records: count(
            "SELECT count(*) FROM dead_letter WHERE state = 'OPEN' AND outbox_id IS NULL",
        )?,
        partitions: match topic {
            Some(name) => topic::topic_partitions_by_name(connection, name)?,
            None => Vec::new(),
        },
        idempotency_keys: idempotency::count_idempotency_keys(connection)?,
        operations: operation::last_operations(connection)?,
        created_at: created_at.map(Timestamp::from_micros),
    })
}

/// Actions on dead letters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ActionCounts {
    /// Replays.
    pub replays: u64,
    /// Discards.
    pub discards: u64,
}

/// Counts the actions on dead letters since the first call: an operator may act by a command, which
/// another process executes.
#[derive(Debug, Default)]
pub struct ActionCounter {
    last_id: Option<i64>,
    counts: ActionCounts,
}

impl ActionCounter {
    /// The actions until now. The first time there are none.
    pub fn count(&mut self, connection: &Connection) -> rusqlite::Result<ActionCounts> {
        let last_id = connection
            .prepare_cached("SELECT ifnull(max(id), 0) FROM dead_letter_action")?
            .query_row([], |row| row.get(0))?;
        let before = self.last_id.unwrap_or(last_id);
        let (replays, discards): (i64, i64) = connection
            .prepare_cached(
                "SELECT ifnull(sum(action = 'replay'), 0), ifnull(sum(action = 'discard'), 0) \
                    FROM dead_letter_action WHERE id > ?1 AND id <= ?2",
            )?
            .query_row([before, last_id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        self.last_id = Some(last_id);
        self.counts.replays += replays.unsigned_abs();
        self.counts.discards += discards.unsigned_abs();
        Ok(self.counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open;
    use crate::store::operation::{Operation, OperationOutcome, OperationRecord};

    #[test]
    fn the_gauges_are_read_and_actions_are_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = connection.transaction().unwrap();
        let mut actions = ActionCounter::default();
        assert_eq!(actions.count(&tx).unwrap(), ActionCounts::default());
        let empty = read_stored_gauges(&tx, Some("payment-event")).unwrap();
        assert!(empty.created_at.is_some());
        assert_eq!((empty.dead_records, empty.rejected_events), (0, 0));
        tx.execute_batch(
            "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
                VALUES ('t', 0, 1, 'no', 1); \
             INSERT INTO dead_letter_action (dead_letter_id, action, origin, outcome, acted_at) \
                VALUES (1, 'replay', 'me', 'done', 1), (1, 'replay', 'me', 'done', 1)",
        )
        .unwrap();
        let ended_at = Timestamp::from_micros(5);
        let record = OperationRecord {
            ended_at,
            origin: "me".to_owned(),
        };
        let backup = Operation::Backup;
        let ok = OperationOutcome::Succeeded;
        operation::record_operation(&tx, backup, ok, None, &record).unwrap();
        let gauges = read_stored_gauges(&tx, None).unwrap();
        assert_eq!(gauges.dead_records, 1);
        let last = &gauges.operations[0];
        assert_eq!((last.operation, last.ended_at), (backup, ended_at));
        for _ in 0..2 {
            let counted = actions.count(&tx).unwrap();
            assert_eq!((counted.replays, counted.discards), (2, 0));
        }
    }
}
