//! What could not be taken from the topic, kept as it came, and what could not be told; and what
//! was done to it since.

use rusqlite::{Connection, OptionalExtension, Row, Transaction};
use serde::Serialize;

use super::backlog::Waiting;
use super::delivery::{self, Arrival};
use super::outbox;
use super::row::sql_limit;
use crate::domain::event::{ID_HEADER, NodeId, Notice, TIME_HEADER};
use crate::domain::timestamp::Timestamp;

/// A record of the topic that is kept aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadRecord {
    /// Where it was read.
    pub topic: String,
    /// Where on the topic.
    pub partition: i32,
    /// Where in the partition.
    pub offset: i64,
    /// When it was written, in milliseconds since 1970, as it says. Where a topic is made anew, or
    /// loses its end, another record comes to its place.
    pub written_at_ms: i64,
    /// Why it was kept aside.
    pub reason: String,
    /// As it came.
    pub key: Option<Vec<u8>>,
    /// As it came.
    pub value: Option<Vec<u8>>,
    /// Names and values; what is no text is shown with replacement characters.
    pub headers: Vec<(String, Option<String>)>,
}

/// How many records are open dead letters.
pub fn open_records(tx: &Transaction<'_>) -> rusqlite::Result<usize> {
    let count: i64 = tx
        .prepare_cached(
            "SELECT count(*) FROM dead_letter WHERE state = 'OPEN' AND outbox_id IS NULL",
        )?
        .query_row([], |row| row.get(0))?;
    Ok(usize::try_from(count).unwrap_or(usize::MAX))
}

/// Counts records that are not kept.
pub fn drop_records(tx: &Transaction<'_>, count: usize) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE node SET records_dropped = records_dropped + ?1")?
        .execute([sql_limit(count)])?;
    Ok(())
}

/// Deletes at most `limit` of the dead letters that were closed before `cutoff`. Returns how many.
/// Events that were sent again stay: the audit needs to know why they are out of order on the
/// topic.
pub fn purge(tx: &Transaction<'_>, cutoff: Timestamp, limit: usize) -> rusqlite::Result<usize> {
    let ids: Vec<i64> = tx
        .prepare_cached(
            "SELECT id FROM dead_letter WHERE closed_at < ?1 AND (outbox_id IS NULL \
                OR state = 'DISCARDED') ORDER BY closed_at LIMIT ?2",
        )?
        .query_map((cutoff.as_micros(), sql_limit(limit)), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    for id in &ids {
        tx.prepare_cached("DELETE FROM dead_letter_action WHERE dead_letter_id = ?1")?
            .execute([id])?;
        tx.prepare_cached("DELETE FROM dead_letter WHERE id = ?1")?
            .execute([id])?;
    }
    Ok(ids.len())
}

/// Keeps a record. Keeping it again changes nothing.
pub fn insert_record(
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

/// Keeps an event that could not be published or told; one that was replayed and came to this again
/// is counted.
pub(super) fn insert_event(
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

/// How many are open, and since when the oldest is.
pub(super) fn open(connection: &Connection) -> rusqlite::Result<Waiting> {
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

/// What may be done to a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Try once more: tell it, or take it as if it came from the topic now.
    Replay,
    /// Leave it for good.
    Discard,
}

impl Action {
    /// As it is recorded.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Discard => "discard",
        }
    }
}

/// A dead letter, for people to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// Given by the store.
    pub id: i64,
    /// OPEN, REPLAYED or DISCARDED.
    pub state: String,
    /// Why it is one.
    pub reason: String,
    /// How often it came to this.
    pub count: i64,
    /// When it first did.
    pub received_at: Timestamp,
    /// Where a record of the topic was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record: Option<Place>,
    /// The payment that could not be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payment_id: Option<i64>,
    /// What was done to it.
    pub actions: Vec<Acted>,
}

/// Where a record of the topic was read, and what it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    topic: String,
    partition: i32,
    offset: i64,
    key: Option<String>,
    value: Option<String>,
    headers: Vec<(String, Option<String>)>,
}

/// Something that was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Acted {
    action: String,
    origin: String,
    outcome: String,
    at: Timestamp,
}

/// What came of an action on one dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Of which.
    pub id: i64,
    /// In words.
    pub outcome: String,
    /// Whether it is as it was to be.
    pub resolved: bool,
}

const SHOWN: &str = "SELECT l.id, l.state, l.reason, l.count, l.received_at, l.topic, \
    l.\"partition\", l.\"offset\", l.\"key\", l.value, l.headers, l.payment_id FROM dead_letter l";

/// Dead letters with larger ids than `after`, oldest first; only those that are open, or all.
pub fn list(
    connection: &Connection,
    open: bool,
    after: i64,
    limit: usize,
) -> rusqlite::Result<Vec<Shown>> {
    let which = if open { "l.state = 'OPEN' AND" } else { "" };
    let letters = connection
        .prepare_cached(&format!(
            "{SHOWN} WHERE {which} l.id > ?1 ORDER BY l.id LIMIT ?2"
        ))?
        .query_map((after, sql_limit(limit)), shown)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    letters
        .into_iter()
        .map(|letter| with_actions(connection, letter))
        .collect()
}

/// One dead letter.
pub fn find(connection: &Connection, id: i64) -> rusqlite::Result<Option<Shown>> {
    let letter = connection
        .prepare_cached(&format!("{SHOWN} WHERE l.id = ?1"))?
        .query_row([id], shown)
        .optional()?;
    letter
        .map(|letter| with_actions(connection, letter))
        .transpose()
}

fn shown(row: &Row<'_>) -> rusqlite::Result<Shown> {
    let text =
        |bytes: Option<Vec<u8>>| bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let record = match row.get::<_, Option<String>>(5)? {
        None => None,
        Some(topic) => Some(Place {
            topic,
            partition: row.get(6)?,
            offset: row.get(7)?,
            key: text(row.get(8)?),
            value: text(row.get(9)?),
            headers: headers(row.get(10)?),
        }),
    };
    Ok(Shown {
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

fn headers(json: Option<String>) -> Vec<(String, Option<String>)> {
    // Written by insert_record.
    json.and_then(|json| serde_json::from_str(&json).ok())
        .unwrap_or_default()
}

fn with_actions(connection: &Connection, letter: Shown) -> rusqlite::Result<Shown> {
    let actions = connection
        .prepare_cached(
            "SELECT action, origin, outcome, acted_at FROM dead_letter_action \
                WHERE dead_letter_id = ?1 ORDER BY id",
        )?
        .query_map([letter.id], |row| {
            Ok(Acted {
                action: row.get(0)?,
                origin: row.get(1)?,
                outcome: row.get(2)?,
                at: Timestamp::from_micros(row.get(3)?),
            })
        })?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Shown { actions, ..letter })
}

/// Which dead letters an action is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// One.
    Id(i64),
    /// Those that are open and have larger ids, oldest first.
    Open {
        /// Not this one, and none before it.
        after: i64,
        /// So many at most.
        limit: usize,
    },
}

/// Who does something to dead letters, for what, and when.
#[derive(Debug, Clone, Copy)]
pub struct Order<'a> {
    /// What is to be done.
    pub action: Action,
    /// To which.
    pub which: Which,
    /// Tell what would come of it, and leave everything as it is.
    pub dry_run: bool,
    /// Whose events are ours.
    pub node: &'a NodeId,
    /// `http` or `command line`.
    pub origin: &'a str,
    /// When.
    pub now: Timestamp,
}

/// Does what is ordered, and records it. One that is not open is left as it is; one that is not
/// there has no outcome.
pub fn act(tx: &Transaction<'_>, order: Order<'_>) -> rusqlite::Result<Vec<Outcome>> {
    let ids: Vec<i64> = match order.which {
        Which::Id(id) => vec![id],
        Which::Open { after, limit } => tx
            .prepare_cached(
                "SELECT id FROM dead_letter WHERE state = 'OPEN' AND id > ?1 ORDER BY id LIMIT ?2",
            )?
            .query_map((after, sql_limit(limit)), |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?,
    };
    tx.execute_batch("SAVEPOINT dead_letters")?;
    let outcomes: rusqlite::Result<Vec<_>> =
        ids.into_iter().map(|id| act_on(tx, id, order)).collect();
    // A dry run does everything, so that it knows, and then undoes it.
    if order.dry_run || outcomes.is_err() {
        tx.execute_batch("ROLLBACK TO dead_letters")?;
    }
    tx.execute_batch("RELEASE dead_letters")?;
    Ok(outcomes?.into_iter().flatten().collect())
}

fn act_on(tx: &Transaction<'_>, id: i64, order: Order<'_>) -> rusqlite::Result<Option<Outcome>> {
    let letter: Option<(String, Option<i64>)> = tx
        .prepare_cached("SELECT state, outbox_id FROM dead_letter WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((state, outbox_id)) = letter else {
        return Ok(None);
    };
    if state != "OPEN" {
        let outcome = format!("nothing was done: it is {state}");
        let resolved = match order.action {
            Action::Replay => state == "REPLAYED",
            Action::Discard => state == "DISCARDED",
        };
        return Ok(Some(Outcome {
            id,
            outcome,
            resolved,
        }));
    }
    let attempt = match (order.action, outbox_id) {
        (Action::Replay, Some(outbox_id)) => replay_event(tx, outbox_id)?,
        (Action::Replay, None) => replay_record(tx, id, order)?,
        (Action::Discard, outbox_id) => {
            if let Some(outbox_id) = outbox_id {
                delivery::discard(tx, outbox_id, order.now)?;
            }
            Ok("discarded".to_owned())
        }
    };
    let resolved = attempt.is_ok();
    let (Ok(outcome) | Err(outcome)) = attempt;
    let (state, again) = match (order.action, resolved) {
        (Action::Replay, true) => ("REPLAYED", 0),
        (Action::Replay, false) => ("OPEN", 1),
        (Action::Discard, _) => ("DISCARDED", 0),
    };
    let closed_at = resolved.then(|| order.now.as_micros());
    tx.prepare_cached(
        "UPDATE dead_letter SET state = ?2, count = count + ?3, closed_at = ?4 WHERE id = ?1",
    )?
    .execute((id, state, again, closed_at))?;
    tx.prepare_cached(
        "INSERT INTO dead_letter_action (dead_letter_id, action, origin, outcome, acted_at) \
         VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute((
        id,
        order.action.as_str(),
        order.origin,
        &outcome,
        order.now.as_micros(),
    ))?;
    Ok(Some(Outcome {
        id,
        outcome,
        resolved,
    }))
}

/// What came of it, or why it is as dead as before.
type Attempt = Result<String, String>;

fn replay_event(tx: &Transaction<'_>, outbox_id: i64) -> rusqlite::Result<Attempt> {
    if outbox::send_again(tx, outbox_id)? {
        return Ok(Ok("waits to be published again".to_owned()));
    }
    let waits = tx
        .prepare_cached(
            "UPDATE delivery SET status = 'PENDING' WHERE outbox_id = ?1 AND status = 'DEAD'",
        )?
        .execute([outbox_id])?;
    let gone = || "its delivery is not there any more: discard it".to_owned();
    Ok(if waits > 0 {
        Ok("waits to be told again".to_owned())
    } else {
        Err(gone())
    })
}

/// As if it came from the topic now: another version, or a restored database, may know what to do
/// with it.
fn replay_record(tx: &Transaction<'_>, id: i64, order: Order<'_>) -> rusqlite::Result<Attempt> {
    let (value, found): (Option<Vec<u8>>, _) = tx
        .prepare_cached("SELECT value, headers FROM dead_letter WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, headers(row.get(1)?))))?;
    let header = |name| {
        found
            .iter()
            .find(|(other, _)| other == name)
            .and_then(|(_, value)| value.as_deref())
    };
    Ok(
        match Notice::parse(order.node, header(ID_HEADER), value.as_deref()) {
            Err(foreign) => Err(format!("still: {foreign}")),
            Ok(notice) => {
                match delivery::accept(tx, notice.created_at(header(TIME_HEADER)), order.now)? {
                    Arrival::Accepted | Arrival::Duplicate => {
                        let status: String = tx
                            .prepare_cached("SELECT status FROM delivery WHERE outbox_id = ?1")?
                            .query_row([notice.outbox_id], |row| row.get(0))?;
                        Ok(format!("taken: its delivery is {status}"))
                    }
                    Arrival::Purged => Ok("its event was delivered and purged long ago".to_owned()),
                    Arrival::Unknown => {
                        Err("still: no event of this database has this id and payment".to_owned())
                    }
                }
            }
        },
    )
}
