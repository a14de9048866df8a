//! What a sample reads of the database in addition to the waiting rows. Each number is read from
//! the end of an index, or from a table that stays small.

use rusqlite::{Connection, OptionalExtension as _};

use super::topic::{self, Partition};
use super::{dead_letter, idempotency, operation};
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
    let rejected_events = connection
        .prepare_cached(
            "SELECT count(*) FROM outbox o JOIN dead_letter l ON l.outbox_id = o.id \
                WHERE o.status = 'REJECTED' AND l.state = 'OPEN'",
        )?
        .query_row([], |row| row.get(0))?;
    let created_at: Option<i64> = connection
        .prepare_cached("SELECT created_at FROM node")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(StoredGauges {
        rejected_events,
        dead_records: i64::try_from(dead_letter::count_open_dead_records(connection)?)
            .unwrap_or(i64::MAX),
        partitions: match topic {
            Some(name) => topic::topic_partitions_by_name(connection, name)?,
            None => Vec::new(),
        },
        idempotency_keys: idempotency::count_idempotency_keys(connection)?,
        operations: operation::last_operations(connection)?,
        created_at: created_at.map(Timestamp::from_micros),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open;
    use crate::store::operation::{Operation, OperationOutcome, OperationRecord};

    #[test]
    fn the_gauges_of_the_database_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = connection.transaction().unwrap();
        let empty = read_stored_gauges(&tx, Some("payment-event")).unwrap();
        assert!(empty.created_at.is_some());
        assert_eq!((empty.dead_records, empty.rejected_events), (0, 0));
        tx.execute_batch(
            "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
                VALUES ('t', 0, 1, 'no', 1)",
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
    }
}
