//! The state of a channel between starts, and the actions of operators on it.

use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, OptionalExtension, Transaction};

/// Where a channel's messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sink {
    /// To its webhook.
    Webhook,
    /// To this process as log lines.
    Log,
}

impl Sink {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Log => "log",
        }
    }
}

/// The channels that had a webhook at the last start, each with its number of waiting deliveries.
/// Used at the start only.
pub fn waiting_for_webhooks(connection: &Connection) -> rusqlite::Result<Vec<(String, i64)>> {
    connection
        .prepare(
            "SELECT channel, (SELECT count(*) FROM delivery d WHERE d.channel = s.channel \
                AND d.status IN ('PENDING', 'SENDING')) FROM channel_sink s \
                WHERE sink = 'webhook' ORDER BY channel",
        )?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

/// Replaces the recorded sinks of the channels.
pub fn replace_sinks(tx: &Transaction<'_>, sinks: &[(String, Sink)]) -> rusqlite::Result<()> {
    tx.execute("DELETE FROM channel_sink", [])?;
    for (name, sink) in sinks {
        tx.execute(
            "INSERT INTO channel_sink VALUES (?1, ?2)",
            (name, sink.as_str()),
        )?;
    }
    Ok(())
}

/// The last error of a channel's oldest waiting delivery.
pub fn last_error(connection: &Connection, channel: &str) -> rusqlite::Result<Option<String>> {
    connection
        .prepare_cached(
            "SELECT last_error FROM delivery WHERE channel = ?1 \
                AND status IN ('PENDING', 'SENDING') ORDER BY outbox_id LIMIT 1",
        )?
        .query_row([channel], |row| row.get(0))
        .optional()
        .map(Option::flatten)
}

/// An action of an operator on a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Try now.
    Resume,
    /// Dead-letter the oldest payment of a paused channel, for this reason, and try the next.
    Skip(String),
}

/// An action, and its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Assigned by the store.
    pub id: i64,
    /// The action.
    pub action: Action,
    /// The client's token, or the local user.
    pub origin: String,
}

/// Requests an action on a channel. Returns the action's id.
pub fn request(
    tx: &Transaction<'_>,
    channel: &str,
    action: &Action,
    origin: &str,
    now: Timestamp,
) -> rusqlite::Result<i64> {
    let (word, reason) = match action {
        Action::Resume => ("resume", None),
        Action::Skip(reason) => ("skip", Some(reason)),
    };
    tx.prepare_cached(
        "INSERT INTO channel_action (channel, action, origin, reason, acted_at) \
            VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute((channel, word, origin, reason, now.as_micros()))?;
    Ok(tx.last_insert_rowid())
}

/// The id of the last action on any channel; 0 if there was none.
pub fn last_action(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(
            "SELECT ifnull((SELECT id FROM channel_action ORDER BY id DESC LIMIT 1), 0)",
        )?
        .query_row([], |row| row.get(0))
}

/// The first action on a channel after another one.
pub fn next_action(
    connection: &Connection,
    channel: &str,
    after: i64,
) -> rusqlite::Result<Option<Asked>> {
    connection
        .prepare_cached(
            "SELECT id, action, reason, origin FROM channel_action WHERE id > ?1 AND channel = ?2 \
                ORDER BY id LIMIT 1",
        )?
        .query_row((after, channel), |row| {
            let action = match row.get::<_, Option<String>>(2)? {
                Some(reason) => Action::Skip(reason),
                None => Action::Resume,
            };
            Ok(Asked {
                id: row.get(0)?,
                action,
                origin: row.get(3)?,
            })
        })
        .optional()
}

/// Records the outcome of an action.
pub fn finish(tx: &Transaction<'_>, id: i64, outcome: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE channel_action SET outcome = ?2 WHERE id = ?1")?
        .execute((id, outcome))
        .map(drop)
}

/// The outcome of an action; `None` until the notifier has seen it.
pub fn outcome(connection: &Connection, id: i64) -> rusqlite::Result<Option<String>> {
    connection.query_row(
        "SELECT outcome FROM channel_action WHERE id = ?1",
        [id],
        |row| row.get(0),
    )
}

/// Withdraws an action that no notifier has seen.
pub fn withdraw(tx: &Transaction<'_>, id: i64) -> rusqlite::Result<bool> {
    Ok(tx.execute(
        "DELETE FROM channel_action WHERE id = ?1 AND outcome IS NULL",
        [id],
    )? > 0)
}
