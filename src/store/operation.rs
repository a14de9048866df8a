//! The commands that an operator must not forget: when they last ended, and how.

use rusqlite::{Connection, OptionalExtension as _, Transaction};
use serde::Serialize;

use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;

text_enum! {
    /// A command.
    pub enum Operation {
        /// `payrelay backup`
        Backup = "backup",
        /// `payrelay audit`
        Audit = "audit",
        /// `payrelay restore`
        Restore = "restore",
    }
}

text_enum! {
    /// The outcome of a command.
    pub enum OperationOutcome {
        /// It succeeded; an audit found nothing.
        Succeeded = "ok",
        /// It did not end its work.
        Failed = "failed",
        /// An audit found something, or a copy was refused for what it has.
        Findings = "findings",
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

/// An audit that ended with a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AuditRecord {
    /// When it ended, and who ran it.
    #[serde(flatten)]
    pub record: OperationRecord,
    /// How many kinds of findings it has.
    pub findings: u32,
    /// Whether it read the database alone.
    pub file_only: bool,
}

/// The report of an audit, for its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditSummary {
    /// How many kinds of findings it has.
    pub findings: u32,
    /// Whether it read the database alone.
    pub file_only: bool,
}

/// Records that a command ended. `audit` is the report of an audit.
pub fn record_operation(
    tx: &Transaction<'_>,
    operation: Operation,
    outcome: OperationOutcome,
    audit: Option<AuditSummary>,
    record: &OperationRecord,
) -> rusqlite::Result<()> {
    insert_operation(tx, operation, outcome, audit, record)
}

/// As [`record_operation`], where there is no transaction.
pub(super) fn insert_operation(
    connection: &Connection,
    operation: Operation,
    outcome: OperationOutcome,
    audit: Option<AuditSummary>,
    record: &OperationRecord,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO operation (operation, outcome, origin, findings, file_only, ended_at) \
                VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute((
            operation.as_str(),
            outcome.as_str(),
            &record.origin,
            audit.map(|audit| audit.findings),
            audit.map(|audit| audit.file_only),
            record.ended_at.as_micros(),
        ))
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

/// The last audit that ended with a report.
pub fn last_audit(connection: &Connection) -> rusqlite::Result<Option<AuditRecord>> {
    connection
        .prepare_cached(
            "SELECT ended_at, origin, ifnull(findings, 0), ifnull(file_only, 0) FROM operation \
                WHERE id = max(\
                    ifnull((SELECT max(id) FROM operation WHERE operation = 'audit' \
                        AND outcome = 'ok'), 0), \
                    ifnull((SELECT max(id) FROM operation WHERE operation = 'audit' \
                        AND outcome = 'findings'), 0))",
        )?
        .query_row([], |row| {
            Ok(AuditRecord {
                record: OperationRecord {
                    ended_at: Timestamp::from_micros(row.get(0)?),
                    origin: row.get(1)?,
                },
                findings: row.get(2)?,
                file_only: row.get(3)?,
            })
        })
        .optional()
}

/// When an operation last ended with an outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastOperation {
    /// The command.
    pub operation: Operation,
    /// The outcome.
    pub outcome: OperationOutcome,
    /// When it ended.
    pub ended_at: Timestamp,
}

/// The last operation of each kind with each outcome, of those that there were.
pub fn last_operations(connection: &Connection) -> rusqlite::Result<Vec<LastOperation>> {
    let mut last = connection.prepare_cached(
        "SELECT ended_at FROM operation WHERE operation = ?1 AND outcome = ?2 \
            ORDER BY id DESC LIMIT 1",
    )?;
    let mut found = Vec::new();
    for operation in Operation::ALL.iter().copied() {
        for outcome in OperationOutcome::ALL.iter().copied() {
            let ended_at: Option<i64> = last
                .query_row((operation.as_str(), outcome.as_str()), |row| row.get(0))
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
