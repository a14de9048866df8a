//! The actions of operators on a channel. Its notifier looks for new rows.

use rusqlite::{Connection, OptionalExtension, Row, Transaction};

use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;

/// An action of an operator on a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelAction {
    /// Send nothing until a resume, for this reason, if there is one.
    Pause(Option<String>),
    /// Ends a pause, and tries now, for this reason, if there is one.
    Resume(Option<String>),
    /// Dead-letter the oldest payment of a paused channel, for this reason, and try the next.
    Skip(String),
}

text_enum! {
    /// The kind of an action on a channel.
    pub enum ChannelActionKind {
        /// [`ChannelAction::Pause`].
        Pause = "pause",
        /// [`ChannelAction::Resume`].
        Resume = "resume",
        /// [`ChannelAction::Skip`].
        Skip = "skip",
    }
}

impl ChannelAction {
    /// Its kind.
    pub const fn kind(&self) -> ChannelActionKind {
        match self {
            Self::Pause(_) => ChannelActionKind::Pause,
            Self::Resume(_) => ChannelActionKind::Resume,
            Self::Skip(_) => ChannelActionKind::Skip,
        }
    }

    /// Why, in the operator's words.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Pause(reason) | Self::Resume(reason) => reason.as_deref(),
            Self::Skip(reason) => Some(reason),
        }
    }
}

/// A requested action, and its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelRequest {
    /// Assigned by the store.
    pub id: i64,
    /// The action.
    pub action: ChannelAction,
    /// The client's token, or the local user.
    pub origin: String,
}

/// Requests an action on a channel. Returns the action's id.
pub fn request_channel_action(
    tx: &Transaction<'_>,
    channel: &str,
    action: &ChannelAction,
    origin: &str,
    now: Timestamp,
) -> rusqlite::Result<i64> {
    tx.prepare_cached(
        "INSERT INTO channel_action (channel, action, origin, reason, acted_at) \
            VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute((
        channel,
        action.kind(),
        origin,
        action.reason(),
        now.as_micros(),
    ))?;
    Ok(tx.last_insert_rowid())
}

/// The id of the last action on any channel; 0 if there was none.
pub fn last_channel_action(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(
            "SELECT ifnull((SELECT id FROM channel_action ORDER BY id DESC LIMIT 1), 0)",
        )?
        .query_row([], |row| row.get(0))
}

/// The first action on a channel after another one.
pub fn next_channel_action(
    connection: &Connection,
    channel: &str,
    after: i64,
) -> rusqlite::Result<Option<ChannelRequest>> {
    connection
        .prepare_cached(
            "SELECT id, action, reason, origin FROM channel_action WHERE id > ?1 AND channel = ?2 \
                ORDER BY id LIMIT 1",
        )?
        .query_row((after, channel), read_channel_request)
        .optional()
}

/// The pause by which an operator has stopped a channel; `None` if it is resumed, or never was
/// paused so. A notifier that stopped may not have seen it.
pub fn pause_in_effect(
    connection: &Connection,
    channel: &str,
) -> rusqlite::Result<Option<ChannelRequest>> {
    let last = connection
        .prepare_cached(
            "SELECT id, action, reason, origin FROM channel_action WHERE id <= ?1 \
                AND channel = ?2 AND action IN ('pause', 'resume') ORDER BY id DESC LIMIT 1",
        )?
        .query_row((i64::MAX, channel), read_channel_request)
        .optional()?;
    Ok(last.filter(|last| last.action.kind() == ChannelActionKind::Pause))
}

fn read_channel_request(row: &Row<'_>) -> rusqlite::Result<ChannelRequest> {
    let action = match row.get(1)? {
        ChannelActionKind::Pause => ChannelAction::Pause(row.get(2)?),
        ChannelActionKind::Resume => ChannelAction::Resume(row.get(2)?),
        ChannelActionKind::Skip => ChannelAction::Skip(row.get(2)?),
    };
    Ok(ChannelRequest {
        id: row.get(0)?,
        action,
        origin: row.get(3)?,
    })
}

/// Records the outcome of an action.
pub fn finish_channel_action(tx: &Transaction<'_>, id: i64, outcome: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE channel_action SET outcome = ?2 WHERE id = ?1")?
        .execute((id, outcome))
        .map(drop)
}

/// The outcome of an action; `None` until the notifier has seen it.
pub fn channel_action_outcome(
    connection: &Connection,
    id: i64,
) -> rusqlite::Result<Option<String>> {
    connection.query_row(
        "SELECT outcome FROM channel_action WHERE id = ?1",
        [id],
        |row| row.get(0),
    )
}

/// Withdraws an action that no notifier has seen. Returns whether there was one.
pub fn withdraw_channel_action(tx: &Transaction<'_>, id: i64) -> rusqlite::Result<bool> {
    Ok(tx.execute(
        "DELETE FROM channel_action WHERE id = ?1 AND outcome IS NULL",
        [id],
    )? > 0)
}
