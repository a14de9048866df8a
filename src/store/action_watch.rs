//! The actions of operators on dead letters, as a running payrelay sees them: an operator may also
//! act by a command, which another process executes.

use rusqlite::{Connection, Row};

use super::dead_letter::DeadLetterAction;

/// The maximum number of actions that are read at a time; the others are counted only.
const READ_MAX: i64 = 500;

/// How many actions there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ActionCounts {
    /// Replays.
    pub replays: u64,
    /// Discards.
    pub discards: u64,
}

/// An action on a dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewAction {
    /// The dead letter.
    pub dead_letter_id: i64,
    /// The action.
    pub action: DeadLetterAction,
    /// Who acted.
    pub origin: String,
    /// Why, in the operator's words.
    pub reason: Option<String>,
    /// The outcome.
    pub outcome: String,
}

/// Finds the actions since it was last asked.
#[derive(Debug, Default)]
pub struct ActionWatch {
    last_id: Option<i64>,
    counts: ActionCounts,
}

impl ActionWatch {
    /// All actions until now, and the first of the new ones. The first time there are none.
    pub fn look(
        &mut self,
        connection: &Connection,
    ) -> rusqlite::Result<(ActionCounts, Vec<NewAction>)> {
        let last_id = connection
            .prepare_cached("SELECT ifnull(max(id), 0) FROM dead_letter_action")?
            .query_row([], |row| row.get(0))?;
        let before = self.last_id.replace(last_id).unwrap_or(last_id);
        if before == last_id {
            return Ok((self.counts, Vec::new()));
        }
        let (replays, discards): (i64, i64) = connection
            .prepare_cached(
                "SELECT ifnull(sum(action = 'replay'), 0), ifnull(sum(action = 'discard'), 0) \
                    FROM dead_letter_action WHERE id > ?1 AND id <= ?2",
            )?
            .query_row([before, last_id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        self.counts.replays += replays.unsigned_abs();
        self.counts.discards += discards.unsigned_abs();
        let read = |row: &Row<'_>| {
            Ok(NewAction {
                dead_letter_id: row.get(0)?,
                action: row.get(1)?,
                origin: row.get(2)?,
                reason: row.get(3)?,
                outcome: row.get(4)?,
            })
        };
        let actions = connection
            .prepare_cached(
                "SELECT dead_letter_id, action, origin, reason, outcome FROM dead_letter_action \
                    WHERE id > ?1 AND id <= ?2 ORDER BY id LIMIT ?3",
            )?
            .query_map([before, last_id, READ_MAX], read)?
            .collect::<rusqlite::Result<_>>()?;
        Ok((self.counts, actions))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open;

    #[test]
    fn each_action_on_a_dead_letter_is_found_once() {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let tx = connection.transaction().unwrap();
        let mut watch = ActionWatch::default();
        assert_eq!(watch.look(&tx).unwrap(), (ActionCounts::default(), vec![]));
        tx.execute_batch(
            "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
                VALUES ('t', 0, 1, 'no', 1); \
             INSERT INTO dead_letter_action (dead_letter_id, action, origin, reason, outcome, \
                acted_at) VALUES (1, 'replay', 'me', NULL, 'done', 1), \
                (1, 'discard', 'you', 'old', 'closed', 1)",
        )
        .unwrap();
        let (counts, actions) = watch.look(&tx).unwrap();
        assert_eq!((counts.replays, counts.discards), (1, 1));
        assert_eq!(actions.len(), 2);
        assert_eq!(actions[1].reason.as_deref(), Some("old"));
        assert_eq!(watch.look(&tx).unwrap(), (counts, vec![]));
    }
}
