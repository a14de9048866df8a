//! The number of rows of each kind.

use std::collections::BTreeMap;

use rusqlite::Transaction;
use serde::Serialize;

use crate::store::StoreError;

/// The number of payments, events, deliveries and other rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AuditTotals {
    /// Payments, by status.
    pub payments: BTreeMap<String, i64>,
    /// Events in the outbox, by status.
    pub events: BTreeMap<String, i64>,
    /// Events that were delivered and purged.
    pub events_purged: i64,
    /// Deliveries, by status.
    pub deliveries: BTreeMap<String, i64>,
}

pub(super) fn count_audit_totals(tx: &Transaction<'_>) -> Result<AuditTotals, StoreError> {
    let by_status = |table| -> rusqlite::Result<BTreeMap<String, i64>> {
        let mut statement = tx.prepare(&format!(
            "SELECT status, count(*) FROM {table} GROUP BY status"
        ))?;
        statement
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    };
    Ok(AuditTotals {
        payments: by_status("payment")?,
        events: by_status("outbox")?,
        events_purged: tx.query_row("SELECT events_purged FROM node", [], |row| row.get(0))?,
        deliveries: by_status("delivery")?,
    })
}
