//! The actions of operators on the relay. A fenced relay looks for a new resume.

use rusqlite::{Connection, Transaction};

use crate::domain::timestamp::Timestamp;

/// Lets a fenced relay acquire its transactional ids again. `origin` is `http, token NAME` or
/// `local user NAME`.
pub fn request_relay_action(
    tx: &Transaction<'_>,
    origin: &str,
    now: Timestamp,
) -> rusqlite::Result<()> {
    insert_relay_action(tx, "resume", origin, now)
}

/// Records that an operator lets the relay try at once.
pub fn record_relay_wake(
    tx: &Transaction<'_>,
    origin: &str,
    now: Timestamp,
) -> rusqlite::Result<()> {
    insert_relay_action(tx, "wake", origin, now)
}

fn insert_relay_action(
    tx: &Transaction<'_>,
    action: &str,
    origin: &str,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO relay_action (action, origin, acted_at) VALUES (?1, ?2, ?3)";
    tx.prepare_cached(sql)?
        .execute((action, origin, now.as_micros()))
        .map(drop)
}

/// The id of the last resume, which grows; 0 if there was none.
pub fn last_relay_resume(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT ifnull(max(id), 0) FROM relay_action WHERE action = 'resume'")?
        .query_row([], |row| row.get(0))
}
