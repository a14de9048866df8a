//! The actions of operators on the relay, and their origin. A fenced relay looks for a new row.

use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, Transaction};

/// Lets a fenced relay acquire its transactional ids again. `origin` is `http, token
/// NAME` or `local user NAME`.
pub fn resume(tx: &Transaction<'_>, origin: &str, now: Timestamp) -> rusqlite::Result<()> {
    let sql = "INSERT INTO relay_action (action, origin, acted_at) VALUES ('resume', ?1, ?2)";
    tx.prepare_cached(sql)?
        .execute((origin, now.as_micros()))
        .map(drop)
}

/// The last resume; 0 if there was none. It grows.
pub fn last_resume(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT ifnull(max(id), 0) FROM relay_action")?
        .query_row([], |row| row.get(0))
}
