//! Ids after a copy was restored: they continue after every id that was ever issued.

use std::path::Path;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::domain::node_id::ID_MAX;
use crate::domain::timestamp::Timestamp;

/// Ids advance to microseconds since 1970. So two databases from the same backup issue no id twice,
/// unless one issues a million ids a second. They advance at least to the next multiple of this, in
/// case the clock is wrong.
pub(super) const ID_RANGE: i64 = 1_000_000_000_000;

/// Tables whose ids are seen outside of the database. The ids of idempotency keys are not. They
/// have no gaps, so that the keys can be counted.
pub(super) const TABLES_WITH_PUBLIC_IDS: [&str; 4] =
    ["payment", "outbox", "dead_letter", "dead_letter_action"];

/// Advances the ids past `newest`, and past every id that may have been issued until now. Returns
/// the first new id.
pub(in crate::store) fn advance_id_sequences(
    tx: &Transaction<'_>,
    newest: i64,
    now: Timestamp,
) -> rusqlite::Result<i64> {
    let given: i64 = tx.query_row(
        "SELECT ifnull(max(seq), 0) FROM sqlite_sequence",
        [],
        |row| row.get(0),
    )?;
    let newest = if newest > ID_MAX { 0 } else { newest };
    let last = ((newest.max(given) / ID_RANGE + 1) * ID_RANGE).max(now.as_micros());
    for table in TABLES_WITH_PUBLIC_IDS {
        tx.execute("DELETE FROM sqlite_sequence WHERE name = ?1", [table])?;
        tx.execute(
            "INSERT INTO sqlite_sequence (name, seq) VALUES (?1, ?2)",
            (table, last),
        )?;
    }
    Ok(last + 1)
}

/// Makes a restored backup ready for use. It lacks the payments that were stored after it, but the
/// topic, clients and Slack know their ids: all ids advance past them, once. Returns whether it is
/// a backup.
pub(super) fn advance_ids_of_backup(connection: &mut Connection) -> rusqlite::Result<bool> {
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    let (backed_up_at, given): (Option<i64>, Option<i64>) =
        tx.query_row("SELECT backed_up_at, given_before FROM node", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    let Some(backed_up_at) = backed_up_at else {
        return Ok(false);
    };
    let now = Timestamp::now();
    let last = "SELECT ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'payment'), 0), \
                ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0)";
    let (payment, event): (i64, i64) =
        tx.query_row(last, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let first = advance_id_sequences(&tx, given.unwrap_or(0), now)?;
    tx.execute(
        "INSERT INTO restored_copy \
             (copied_at, started_at, restored_by, last_payment_id, last_outbox_id, first_new_id) \
         SELECT ?1, ?2, restored_by, ?3, ?4, ?5 FROM node",
        (backed_up_at, now.as_micros(), payment, event, first),
    )?;
    tx.execute(
        "UPDATE node SET backed_up_at = NULL, restored_by = NULL, given_before = NULL",
        [],
    )?;
    tx.commit()?;
    log::warn!(
        event = "copy_started", first_new_id = first;
        "this database is a backup of {}: it lacks everything that was stored after that. New ids \
            begin at {first}, so that no id is given twice; `payrelay audit` lists the events of \
            the topic that are missing here",
        Timestamp::from_micros(backed_up_at)
    );
    Ok(true)
}

/// litestream restores the tables that it keeps in a database, and not the folder that it keeps
/// next to it. Such a copy looks like a database that was never copied, so it may give ids again.
pub(super) fn warn_of_unmarked_litestream_copy(
    connection: &Connection,
    path: &Path,
) -> rusqlite::Result<()> {
    let name = path.file_name().unwrap_or_default().display();
    let folder = path.with_file_name(format!(".{name}-litestream"));
    if connection.table_exists(None, "_litestream_seq")? && !folder.exists() {
        log::warn!(
            event = "unmarked_copy";
            "litestream has replicated this database, but its folder {} does not exist. If \
                litestream has restored the file, stop, and run `payrelay restore --adopt`: \
                otherwise ids are given twice",
            folder.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open::open_database;

    #[test]
    fn the_ids_of_a_backup_advance_once_past_every_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let (connection, node) = open_database(&path, None).unwrap();
        let pay = "INSERT INTO payment \
            (user_id, reservation_id, amount, currency, status, executed_at) \
            VALUES (1, ?1, 1, 'KRW', 'COMPLETED', 1) RETURNING id";
        let history = "INSERT INTO user_history VALUES (1, ?1) \
            ON CONFLICT DO UPDATE SET last_payment_id = excluded.last_payment_id";
        let id = |connection: &Connection, reservation: i64| -> i64 {
            let id = connection
                .query_row(pay, [reservation], |row| row.get(0))
                .unwrap();
            connection.execute(history, [id]).unwrap();
            id
        };
        assert_eq!(id(&connection, 1), 1);
        connection
            .execute("UPDATE node SET backed_up_at = 5", [])
            .unwrap();
        drop(connection);
        let (connection, again) = open_database(&path, None).unwrap();
        let jumped = id(&connection, 2);
        assert!(
            jumped > ID_RANGE && jumped <= ID_MAX && again == node,
            "{jumped}"
        );
        drop(connection);
        let (connection, _) = open_database(&path, None).unwrap();
        assert_eq!(id(&connection, 3), jumped + 1, "only once");
        connection
            .execute("UPDATE node SET backed_up_at = 5", [])
            .unwrap();
        drop(connection);
        let farther = id(&open_database(&path, None).unwrap().0, 4);
        assert!(farther > jumped + 1, "{farther}");
        let sequences: i64 = Connection::open(&path)
            .unwrap()
            .query_row(
                "SELECT count(*) FROM sqlite_sequence WHERE seq >= ?1",
                [farther - 1],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(sequences, 4, "also of tables that were empty");
    }

    #[test]
    fn the_ids_of_every_table_with_public_ids_advance() {
        let dir = tempfile::tempdir().unwrap();
        let (connection, _) = open_database(&dir.path().join("a.db"), None).unwrap();
        let sql = "SELECT name FROM sqlite_schema WHERE sql LIKE '%AUTOINCREMENT%' \
            AND name NOT IN ('idempotency_key', 'channel_action')";
        let mut statement = connection.prepare(sql).unwrap();
        let mut tables: Vec<String> = statement
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        tables.sort_by_key(|table| TABLES_WITH_PUBLIC_IDS.iter().position(|name| name == table));
        assert_eq!(tables, TABLES_WITH_PUBLIC_IDS);
    }
}
