//! The actions of operators on the relay. A fenced relay looks for a new resume.

use rusqlite::{Connection, Transaction};

use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;

text_enum! {
    /// What an operator lets the relay do.
    pub enum RelayAction {
        /// A fenced one acquires its transactional ids again.
        Resume = "resume",
        /// It tries at once.
        Wake = "wake",
    }
}

/// Records an action. `origin` is `http, token NAME` or `local user NAME`.
pub fn record_relay_action(
    tx: &Transaction<'_>,
    action: RelayAction,
    origin: &str,
    reason: Option<&str>,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO relay_action (action, origin, reason, acted_at) \
        VALUES (?1, ?2, ?3, ?4)";
    tx.prepare_cached(sql)?
        .execute((action.as_str(), origin, reason, now.as_micros()))
        .map(drop)
}

/// Who requested an action, and why.
pub fn find_relay_action_origin(
    connection: &Connection,
    id: i64,
) -> rusqlite::Result<(String, Option<String>)> {
    connection
        .prepare_cached("SELECT origin, reason FROM relay_action WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
}

/// The id of the last resume, which grows; 0 if there was none.
pub fn last_relay_resume(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT ifnull(max(id), 0) FROM relay_action WHERE action = 'resume'")?
        .query_row([], |row| row.get(0))
}
