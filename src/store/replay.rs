//! Replays and discards dead letters.

use rusqlite::{OptionalExtension, Transaction};
use serde::Serialize;

use super::arrival::{self, AcceptOutcome};
use super::dead_letter::headers;
use super::row::sql_limit;
use super::{delivery, unconsumed};
use crate::domain::event::{EventRef, ID_HEADER, NodeId, TIME_HEADER};
use crate::domain::timestamp::Timestamp;

/// The dead letters that an action is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// A single one.
    Id(i64),
    /// Open ones with larger ids, oldest first.
    Open {
        /// Exclusive.
        after: i64,
        /// The maximum number of letters.
        limit: usize,
    },
}

/// An action on dead letters.
#[derive(Debug, Clone, Copy)]
pub struct ResolveRequest<'a> {
    /// The action.
    pub action: Action,
    /// The letters.
    pub which: Selection,
    /// Return the outcomes, and change nothing.
    pub dry_run: bool,
    /// The node of our events.
    pub node: &'a NodeId,
    /// The origin of the request: `http, token NAME` or `local user NAME`.
    pub origin: &'a str,
    /// The time of the action.
    pub now: Timestamp,
}

/// Resolves dead letters, and records the actions. A letter that is not open stays as it is; a
/// missing one has no outcome.
pub fn resolve(tx: &Transaction<'_>, order: ResolveRequest<'_>) -> rusqlite::Result<Vec<Outcome>> {
    let ids: Vec<i64> = match order.which {
        Selection::Id(id) => vec![id],
        Selection::Open { after, limit } => tx
            .prepare_cached(
                "SELECT id FROM dead_letter WHERE state = 'OPEN' AND id > ?1 ORDER BY id LIMIT ?2",
            )?
            .query_map((after, sql_limit(limit)), |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?,
    };
    tx.execute_batch("SAVEPOINT dead_letters")?;
    let outcomes: rusqlite::Result<Vec<_>> = ids
        .into_iter()
        .map(|id| resolve_one(tx, id, order))
        .collect();
    // A dry run executes everything, to find the outcomes, and then rolls it back.
    if order.dry_run || outcomes.is_err() {
        tx.execute_batch("ROLLBACK TO dead_letters")?;
    }
    tx.execute_batch("RELEASE dead_letters")?;
    Ok(outcomes?.into_iter().flatten().collect())
}

fn resolve_one(
    tx: &Transaction<'_>,
    id: i64,
    order: ResolveRequest<'_>,
) -> rusqlite::Result<Option<Outcome>> {
    let letter: Option<(String, Option<i64>)> = tx
        .prepare_cached("SELECT state, outbox_id FROM dead_letter WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((state, outbox_id)) = letter else {
        return Ok(None);
    };
    if state != "OPEN" {
        return Ok(Some(already_closed(id, &state, order.action)));
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
    let outcome = Outcome {
        id,
        outcome,
        resolved,
    };
    update_letter(tx, &outcome, order)?;
    record_action(tx, &outcome, order)?;
    Ok(Some(outcome))
}

/// A closed letter stays as it is. The action has succeeded if it is the one that closed it.
fn already_closed(id: i64, state: &str, action: Action) -> Outcome {
    Outcome {
        id,
        outcome: format!("nothing was done: it is {state}"),
        resolved: state == action.closed_state(),
    }
}

/// Closes the letter, or counts the replay that failed.
fn update_letter(
    tx: &Transaction<'_>,
    outcome: &Outcome,
    order: ResolveRequest<'_>,
) -> rusqlite::Result<()> {
    if outcome.resolved {
        tx.prepare_cached("UPDATE dead_letter SET state = ?2, closed_at = ?3 WHERE id = ?1")?
            .execute((
                outcome.id,
                order.action.closed_state(),
                order.now.as_micros(),
            ))?;
    } else {
        tx.prepare_cached("UPDATE dead_letter SET count = count + 1 WHERE id = ?1")?
            .execute([outcome.id])?;
    }
    Ok(())
}

fn record_action(
    tx: &Transaction<'_>,
    outcome: &Outcome,
    order: ResolveRequest<'_>,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO dead_letter_action (dead_letter_id, action, origin, outcome, acted_at) \
         VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute((
        outcome.id,
        order.action.as_str(),
        order.origin,
        &outcome.outcome,
        order.now.as_micros(),
    ))?;
    Ok(())
}

fn replay_event(tx: &Transaction<'_>, outbox_id: i64) -> rusqlite::Result<Attempt> {
    if send_again(tx, outbox_id)? {
        return Ok(Ok("waits to be published again".to_owned()));
    }
    let waits = tx
        .prepare_cached(
            "UPDATE delivery SET status = 'PENDING' WHERE outbox_id = ?1 AND status = 'DEAD'",
        )?
        .execute([outbox_id])?;
    let missing = || "its delivery no longer exists: discard it".to_owned();
    Ok(if waits > 0 {
        Ok("waits to be delivered again".to_owned())
    } else {
        Err(missing())
    })
}

/// Accepts a record as if it arrived from the topic now: a newer version, or a restored database,
/// may recognize it.
fn replay_record(
    tx: &Transaction<'_>,
    id: i64,
    order: ResolveRequest<'_>,
) -> rusqlite::Result<Attempt> {
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
        match EventRef::parse(order.node, header(ID_HEADER), value.as_deref()) {
            Err(foreign) => Err(format!("still: {foreign}")),
            Ok(notice) => {
                match arrival::accept(tx, notice.created_at(header(TIME_HEADER)), order.now)? {
                    AcceptOutcome::Accepted | AcceptOutcome::Duplicate => {
                        let status: String = tx
                            .prepare_cached("SELECT status FROM delivery WHERE outbox_id = ?1")?
                            .query_row([notice.outbox_id], |row| row.get(0))?;
                        Ok(format!("accepted: its delivery is {status}"))
                    }
                    AcceptOutcome::Purged => {
                        Ok("its event was delivered and purged long ago".to_owned())
                    }
                    AcceptOutcome::Unknown => {
                        Err("still: no event of this database has this id and payment".to_owned())
                    }
                }
            }
        },
    )
}

/// An action on a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Try again: deliver it, or accept it as if it arrived from the topic now.
    Replay,
    /// Close it.
    Discard,
}

/// The outcome of an action on one dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// The letter.
    pub id: i64,
    /// In words.
    pub outcome: String,
    /// Whether the action succeeded.
    pub resolved: bool,
}

/// Requeues an event that was rejected; false if it was not.
pub(super) fn send_again(tx: &Transaction<'_>, outbox_id: i64) -> rusqlite::Result<bool> {
    let sql =
        "UPDATE outbox SET status = 'INIT', rejection = NULL WHERE id = ?1 AND status = 'REJECTED'";
    let sent_again = tx.prepare_cached(sql)?.execute([outbox_id])? > 0;
    if sent_again {
        unconsumed::reopen(tx, outbox_id)?;
    }
    Ok(sent_again)
}

impl Action {
    /// The state of a letter that this action has closed.
    const fn closed_state(self) -> &'static str {
        match self {
            Self::Replay => "REPLAYED",
            Self::Discard => "DISCARDED",
        }
    }

    /// As it is recorded.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Discard => "discard",
        }
    }
}

/// The outcome, or why the letter stays as it is.
type Attempt = Result<String, String>;
