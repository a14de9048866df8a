//! What operators asked of the relay, and from where. A relay that is fenced looks for a new row.

use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, Transaction};

/// Has a fenced relay take its transactional ids over again. `origin` is where the operator asked:
/// `http` or `command line`.
pub fn resume(tx: &Transaction<'_>, origin: &str, now: Timestamp) -> rusqlite::Result<()> {
    let sql = "INSERT INTO relay_action (action, origin, acted_at) VALUES ('resume', ?1, ?2)";
    tx.prepare_cached(sql)?
        .execute((origin, now.as_micros()))
        .map(drop)
}

/// The last time that it was resumed; 0 if it never was. It grows.
pub fn last_resume(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT ifnull(max(id), 0) FROM relay_action")?
        .query_row([], |row| row.get(0))
}
