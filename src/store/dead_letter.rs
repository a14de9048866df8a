//! Dead letters: records that could not be consumed, and events that could not be published or
//! delivered; and every action on them.

use super::row::row_limit;
use super::waiting::Waiting;
use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};
use serde::Serialize;

/// A record of the topic that is a dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadRecord {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset.
    pub offset: i64,
    /// The record's timestamp, in milliseconds since 1970. In a recreated or truncated topic
    /// another record may have the same offset.
    pub written_at_ms: i64,
    /// Why it is a dead letter.
    pub reason: String,
    /// The raw bytes.
    pub key: Option<Vec<u8>>,
    /// The raw bytes.
    pub value: Option<Vec<u8>>,
    /// Names and values; bytes that are no text are shown as replacement characters.
    pub headers: Vec<(String, Option<String>)>,
}

text_enum! {
    /// The state of a dead letter.
    pub enum DeadLetterState {
        /// It waits for an operator.
        Open = "OPEN",
        /// It was replayed.
        Replayed = "REPLAYED",
        /// It was discarded.
        Discarded = "DISCARDED",
    }
}

text_enum! {
    /// An action on a dead letter.
    pub enum DeadLetterAction {
        /// Try again: deliver it, or accept it as if it arrived from the topic now.
        Replay = "replay",
        /// Close it.
        Discard = "discard",
    }
}

impl DeadLetterState {
    /// The state of a letter that an action has closed.
    pub(super) const fn closed_by(action: DeadLetterAction) -> Self {
        match action {
            DeadLetterAction::Replay => Self::Replayed,
            DeadLetterAction::Discard => Self::Discarded,
        }
    }
}

/// The dead letters of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeadLetterFilter {
    /// Those that are open.
    Open,
    /// All.
    All,
}

/// How many records are open dead letters.
pub fn count_open_dead_records(connection: &Connection) -> rusqlite::Result<usize> {
    let count: i64 = connection
        .prepare_cached(
            "SELECT count(*) FROM dead_letter WHERE state = 'OPEN' AND outbox_id IS NULL",
        )?
        .query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(usize::MAX))
}

/// Counts records that were dropped because too many dead letters are open.
pub fn count_dropped_dead_records(tx: &Transaction<'_>, count: usize) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE node SET records_dropped = records_dropped + ?1")?
        .execute([row_limit(count)])?;
    Ok(())
}

/// Deletes at most `limit` of the dead letters that were closed before `cutoff`. Returns how many.
/// Letters of republished events stay: the audit needs them to explain the order on the topic.
pub fn purge_dead_letters(
    tx: &Transaction<'_>,
    cutoff: Timestamp,
    limit: usize,
) -> rusqlite::Result<usize> {
    let ids: Vec<i64> = tx
        .prepare_cached(
            "SELECT id FROM dead_letter WHERE closed_at < ?1 AND (outbox_id IS NULL \
                OR state = 'DISCARDED') ORDER BY closed_at LIMIT ?2",
        )?
        .query_map((cutoff.as_micros(), row_limit(limit)), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    for id in &ids {
        tx.prepare_cached("DELETE FROM dead_letter_action WHERE dead_letter_id = ?1")?
            .execute([id])?;
        tx.prepare_cached("DELETE FROM dead_letter WHERE id = ?1")?
            .execute([id])?;
    }
    Ok(ids.len())
}

/// Stores a record. Storing it again changes nothing.
pub fn insert_dead_record(
    tx: &Transaction<'_>,
    record: &DeadRecord,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let headers = serde_json::to_string(&record.headers)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
    tx.prepare_cached(
        "INSERT INTO dead_letter (topic, \"partition\", \"offset\", written_at, reason, \"key\", \
            value, headers, received_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) \
            ON CONFLICT DO NOTHING",
    )?
    .execute((
        &record.topic,
        record.partition,
        record.offset,
        record.written_at_ms,
        &record.reason,
        &record.key,
        &record.value,
        headers,
        now.as_micros(),
    ))?;
    Ok(())
}

/// Stores an event that could not be published or delivered. A replayed one that fails again is
/// counted.
pub(super) fn insert_dead_event(
    tx: &Transaction<'_>,
    outbox_id: i64,
    reason: &str,
    now: Timestamp,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO dead_letter (outbox_id, payment_id, reason, received_at) \
            VALUES (?1, (SELECT payment_id FROM outbox WHERE id = ?1), ?2, ?3) \
            ON CONFLICT (outbox_id) DO UPDATE \
            SET reason = excluded.reason, count = count + 1, state = 'OPEN', closed_at = NULL",
    )?
    .execute((outbox_id, reason, now.as_micros()))?;
    Ok(())
}

/// How many are open, and when the oldest arrived.
pub fn open_dead_letters(connection: &Connection) -> rusqlite::Result<Waiting> {
    let count = connection
        .prepare_cached("SELECT count(*) FROM dead_letter WHERE state = 'OPEN'")?
        .query_row([], |row| row.get(0))?;
    let oldest: Option<i64> = connection
        .prepare_cached(
            "SELECT received_at FROM dead_letter WHERE state = 'OPEN' ORDER BY id LIMIT 1",
        )?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(Waiting {
        count,
        oldest_at: oldest.map(Timestamp::from_micros),
    })
}

/// A dead letter, as people see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeadLetterView {
    /// Assigned by the store.
    pub id: i64,
    /// Its state.
    pub state: DeadLetterState,
    /// Why it is a dead letter.
    pub reason: String,
    /// How many times it has failed.
    pub count: i64,
    /// When it first failed.
    pub received_at: Timestamp,
    /// The record of the topic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record: Option<RecordOrigin>,
    /// The payment that could not be delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payment_id: Option<i64>,
    /// The actions on it.
    pub actions: Vec<ActionRecord>,
}

impl DeadLetterView {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        let text = |bytes: Option<Vec<u8>>| {
            bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        let record = match row.get::<_, Option<String>>(5)? {
            None => None,
            Some(topic) => Some(RecordOrigin {
                topic,
                partition: row.get(6)?,
                offset: row.get(7)?,
                key: text(row.get(8)?),
                value: text(row.get(9)?),
                headers: parse_dead_record_headers(row.get(10)?),
            }),
        };
        Ok(Self {
            id: row.get(0)?,
            state: row.get(1)?,
            reason: row.get(2)?,
            count: row.get(3)?,
            received_at: Timestamp::from_micros(row.get(4)?),
            record,
            payment_id: row.get(11)?,
            actions: Vec::new(),
        })
    }

    fn with_actions(mut self, connection: &Connection) -> rusqlite::Result<Self> {
        self.actions = connection
            .prepare_cached(
                "SELECT action, origin, outcome, acted_at, reason FROM dead_letter_action \
                    WHERE dead_letter_id = ?1 ORDER BY id",
            )?
            .query_map([self.id], |row| {
                Ok(ActionRecord {
                    action: row.get(0)?,
                    origin: row.get(1)?,
                    outcome: row.get(2)?,
                    at: Timestamp::from_micros(row.get(3)?),
                    reason: row.get(4)?,
                })
            })?
            .collect::<rusqlite::Result<_>>()?;
        Ok(self)
    }
}

/// The origin of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordOrigin {
    topic: String,
    partition: i32,
    offset: i64,
    key: Option<String>,
    value: Option<String>,
    headers: Vec<(String, Option<String>)>,
}

/// An action on a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActionRecord {
    action: DeadLetterAction,
    origin: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    outcome: String,
    at: Timestamp,
}

const SHOWN: &str = "SELECT l.id, l.state, l.reason, l.count, l.received_at, l.topic, \
    l.\"partition\", l.\"offset\", l.\"key\", l.value, l.headers, l.payment_id FROM dead_letter l";

/// Dead letters with ids larger than `after`, oldest first.
pub fn list_dead_letters(
    connection: &Connection,
    filter: DeadLetterFilter,
    after: i64,
    limit: usize,
) -> rusqlite::Result<Vec<DeadLetterView>> {
    let which = match filter {
        DeadLetterFilter::Open => "l.state = 'OPEN' AND",
        DeadLetterFilter::All => "",
    };
    let letters = connection
        .prepare_cached(&format!(
            "{SHOWN} WHERE {which} l.id > ?1 ORDER BY l.id LIMIT ?2"
        ))?
        .query_map((after, row_limit(limit)), DeadLetterView::from_row)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    letters
        .into_iter()
        .map(|letter| letter.with_actions(connection))
        .collect()
}

/// One dead letter.
pub fn find_dead_letter(
    connection: &Connection,
    id: i64,
) -> rusqlite::Result<Option<DeadLetterView>> {
    let letter = connection
        .prepare_cached(&format!("{SHOWN} WHERE l.id = ?1"))?
        .query_row([id], DeadLetterView::from_row)
        .optional()?;
    letter
        .map(|letter| letter.with_actions(connection))
        .transpose()
}

pub(super) fn parse_dead_record_headers(json: Option<String>) -> Vec<(String, Option<String>)> {
    // Written by insert_record.
    json.and_then(|json| serde_json::from_str(&json).ok())
        .unwrap_or_default()
}
