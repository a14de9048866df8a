//! The actions of operators on dead letters: replays and discards.

use rusqlite::{OptionalExtension, Transaction};
use serde::Serialize;

use super::arrival::{self, AcceptOutcome};
pub use super::dead_letter::DeadLetterAction;
use super::dead_letter::{DeadLetterState, parse_dead_record_headers};
use super::delivery::DeliveryStatus;
use super::row::row_limit;
use super::{delivery, node_role, outbox, unconsumed};
use crate::domain::event::{EventRef, ID_HEADER, TIME_HEADER};
use crate::domain::node_id::NodeId;
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

impl Selection {
    fn dead_letter_ids(self, tx: &Transaction<'_>) -> rusqlite::Result<Vec<i64>> {
        match self {
            Self::Id(id) => Ok(vec![id]),
            Self::Open { after, limit } => tx
                .prepare_cached(
                    "SELECT id FROM dead_letter WHERE state = 'OPEN' AND id > ?1 \
                        ORDER BY id LIMIT ?2",
                )?
                .query_map((after, row_limit(limit)), |row| row.get(0))?
                .collect(),
        }
    }
}

/// A request to act on dead letters.
#[derive(Debug, Clone, Copy)]
pub struct DeadLetterRequest<'a> {
    /// The action.
    pub action: DeadLetterAction,
    /// The letters.
    pub which: Selection,
    /// Return the outcomes, and change nothing.
    pub dry_run: bool,
    /// The node of our events.
    pub node: &'a NodeId,
    /// The origin of the request.
    pub origin: &'a str,
    /// Why, in the operator's words.
    pub reason: Option<&'a str>,
    /// The time of the action.
    pub now: Timestamp,
}

/// The outcome of an action on one dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeadLetterOutcome {
    /// The letter.
    pub id: i64,
    /// In words.
    pub outcome: String,
    /// Whether the action succeeded.
    pub resolved: bool,
}

/// In words: the outcome, or why the letter stays as it is.
type Attempt = Result<String, String>;

/// Acts on dead letters, and records the actions. A letter that is not open stays as it is. A
/// missing one has no outcome.
pub fn act_on_dead_letters(
    tx: &Transaction<'_>,
    request: DeadLetterRequest<'_>,
) -> rusqlite::Result<Vec<DeadLetterOutcome>> {
    let ids = request.which.dead_letter_ids(tx)?;
    tx.execute_batch("SAVEPOINT dead_letters")?;
    let outcomes: rusqlite::Result<Vec<_>> = ids
        .into_iter()
        .map(|id| request.act_on_dead_letter(tx, id))
        .collect();
    // A dry run executes everything, to find the outcomes, and then rolls it back.
    if request.dry_run || outcomes.is_err() {
        tx.execute_batch("ROLLBACK TO dead_letters")?;
    }
    tx.execute_batch("RELEASE dead_letters")?;
    Ok(outcomes?.into_iter().flatten().collect())
}

impl DeadLetterRequest<'_> {
    fn act_on_dead_letter(
        self,
        tx: &Transaction<'_>,
        id: i64,
    ) -> rusqlite::Result<Option<DeadLetterOutcome>> {
        let letter: Option<(DeadLetterState, Option<i64>)> = tx
            .prepare_cached("SELECT state, outbox_id FROM dead_letter WHERE id = ?1")?
            .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        let Some((state, outbox_id)) = letter else {
            return Ok(None);
        };
        if state != DeadLetterState::Open {
            return Ok(Some(self.already_closed(id, state)));
        }
        let attempt = match (self.action, outbox_id) {
            (DeadLetterAction::Replay, Some(outbox_id)) => replay_dead_event(tx, outbox_id)?,
            (DeadLetterAction::Replay, None) => self.replay_dead_record(tx, id)?,
            (DeadLetterAction::Discard, outbox_id) => {
                if let Some(outbox_id) = outbox_id {
                    delivery::discard_delivery(tx, outbox_id, self.now)?;
                }
                Ok("discarded".to_owned())
            }
        };
        let resolved = attempt.is_ok();
        let (Ok(outcome) | Err(outcome)) = attempt;
        let outcome = DeadLetterOutcome {
            id,
            outcome,
            resolved,
        };
        self.close_or_count(tx, &outcome)?;
        self.record_action(tx, &outcome)?;
        Ok(Some(outcome))
    }

    /// A closed letter stays as it is. The action has succeeded if it is the one that closed it.
    fn already_closed(self, id: i64, state: DeadLetterState) -> DeadLetterOutcome {
        DeadLetterOutcome {
            id,
            outcome: format!("nothing was done: it is {}", state.as_str()),
            resolved: state == DeadLetterState::closed_by(self.action),
        }
    }

    /// Accepts a record as if it arrived from the topic now: a newer version, or a restored
    /// database, may recognize it.
    fn replay_dead_record(self, tx: &Transaction<'_>, id: i64) -> rusqlite::Result<Attempt> {
        let (value, headers): (Option<Vec<u8>>, _) = tx
            .prepare_cached("SELECT value, headers FROM dead_letter WHERE id = ?1")?
            .query_row([id], |row| {
                Ok((row.get(0)?, parse_dead_record_headers(row.get(1)?)))
            })?;
        let header = |name| {
            headers
                .iter()
                .find(|(other, _)| other == name)
                .and_then(|(_, value)| value.as_deref())
        };
        let event = match EventRef::parse(self.node, header(ID_HEADER), value.as_deref()) {
            Ok(event) => event.created_at(header(TIME_HEADER)),
            Err(foreign) => return Ok(Err(format!("still: {foreign}"))),
        };
        Ok(match arrival::accept_arrival(tx, event, self.now)? {
            AcceptOutcome::Accepted | AcceptOutcome::Duplicate => {
                let status: DeliveryStatus = tx
                    .prepare_cached("SELECT status FROM delivery WHERE outbox_id = ?1")?
                    .query_row([event.outbox_id], |row| row.get(0))?;
                Ok(format!("accepted: its delivery is {}", status.as_str()))
            }
            AcceptOutcome::Purged => Ok("its event was delivered and purged long ago".to_owned()),
            AcceptOutcome::Unknown => {
                Err("still: no event of this database has this id and payment".to_owned())
            }
        })
    }

    /// Closes the letter, or counts the replay that failed.
    fn close_or_count(
        self,
        tx: &Transaction<'_>,
        outcome: &DeadLetterOutcome,
    ) -> rusqlite::Result<()> {
        if outcome.resolved {
            tx.prepare_cached("UPDATE dead_letter SET state = ?2, closed_at = ?3 WHERE id = ?1")?
                .execute((
                    outcome.id,
                    DeadLetterState::closed_by(self.action),
                    self.now.as_micros(),
                ))?;
        } else {
            tx.prepare_cached("UPDATE dead_letter SET count = count + 1 WHERE id = ?1")?
                .execute([outcome.id])?;
        }
        Ok(())
    }

    fn record_action(
        self,
        tx: &Transaction<'_>,
        outcome: &DeadLetterOutcome,
    ) -> rusqlite::Result<()> {
        tx.prepare_cached(
            "INSERT INTO dead_letter_action (dead_letter_id, action, origin, reason, outcome, \
                acted_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute((
            outcome.id,
            self.action,
            self.origin,
            self.reason,
            &outcome.outcome,
            self.now.as_micros(),
        ))?;
        Ok(())
    }
}

fn replay_dead_event(tx: &Transaction<'_>, outbox_id: i64) -> rusqlite::Result<Attempt> {
    if replay_rejected_event(tx, outbox_id)? {
        return Ok(Ok("waits to be published again".to_owned()));
    }
    let requeued = tx
        .prepare_cached(
            "UPDATE delivery SET status = 'PENDING' WHERE outbox_id = ?1 AND status = 'DEAD'",
        )?
        .execute([outbox_id])?;
    Ok(if requeued > 0 {
        Ok("waits to be delivered again".to_owned())
    } else {
        Err("its delivery no longer exists: discard it".to_owned())
    })
}

/// Requeues an event that was rejected. Returns whether it was.
///
/// An event of an edge gets a new id, because later events are on the topic already. Readers drop
/// an id below the largest that they know of the node.
pub(super) fn replay_rejected_event(
    tx: &Transaction<'_>,
    outbox_id: i64,
) -> rusqlite::Result<bool> {
    let was_rejected = tx
        .prepare_cached(
            "UPDATE outbox SET status = 'INIT', rejection = NULL WHERE id = ?1 \
                AND status = 'REJECTED'",
        )?
        .execute([outbox_id])?
        > 0;
    if was_rejected {
        if node_role::is_edge_event(tx, outbox_id)? {
            outbox::move_outbox_events(tx, &[outbox_id])?;
        } else {
            unconsumed::move_unconsumed_mark_back(tx, outbox_id)?;
        }
    }
    Ok(was_rejected)
}
