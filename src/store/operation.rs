//! The commands that an operator must not forget: when they last succeeded.

use rusqlite::{Connection, OptionalExtension as _, Transaction};
use serde::Serialize;

use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;

text_enum! {
    /// The outcome of a command.
    pub enum OperationOutcome {
        /// It succeeded.
        Succeeded = "ok",
        /// It did not.
        Failed = "failed",
    }
}

/// A command that ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OperationRecord {
    /// When it ended.
    pub ended_at: Timestamp,
    /// The local user who ran it.
    pub origin: String,
}

/// Records that a backup ended.
pub fn record_backup(
    tx: &Transaction<'_>,
    outcome: OperationOutcome,
    origin: &str,
    now: Timestamp,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO operation (operation, outcome, origin, ended_at) \
            VALUES ('backup', ?1, ?2, ?3)",
    )?
    .execute((outcome.as_str(), origin, now.as_micros()))
    .map(drop)
}

/// The last backup that succeeded.
pub fn last_backup(connection: &Connection) -> rusqlite::Result<Option<OperationRecord>> {
    connection
        .prepare_cached(
            "SELECT ended_at, origin FROM operation WHERE operation = 'backup' \
                AND outcome = 'ok' ORDER BY id DESC LIMIT 1",
        )?
        .query_row([], |row| {
            Ok(OperationRecord {
                ended_at: Timestamp::from_micros(row.get(0)?),
                origin: row.get(1)?,
            })
        })
        .optional()
}

/// When an operation last ended with an outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastOperation {
    /// The command.
    pub operation: &'static str,
    /// The outcome.
    pub outcome: OperationOutcome,
    /// When it ended.
    pub ended_at: Timestamp,
}

/// The commands that are recorded.
pub const OPERATIONS: [&str; 1] = ["backup"];

/// The last operation of each kind with each outcome, of those that there were.
pub fn last_operations(connection: &Connection) -> rusqlite::Result<Vec<LastOperation>> {
    let mut last = connection.prepare_cached(
        "SELECT ended_at FROM operation WHERE operation = ?1 AND outcome = ?2 \
            ORDER BY id DESC LIMIT 1",
    )?;
    let mut found = Vec::new();
    for operation in OPERATIONS {
        for outcome in OperationOutcome::ALL.iter().copied() {
            let ended_at: Option<i64> = last
                .query_row((operation, outcome.as_str()), |row| row.get(0))
                .optional()?;
            found.extend(ended_at.map(|ended_at| LastOperation {
                operation,
                outcome,
                ended_at: Timestamp::from_micros(ended_at),
            }));
        }
    }
    Ok(found)
}
