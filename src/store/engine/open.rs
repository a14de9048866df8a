//! Opening the file: the pragmas, the checks, and the node's id.

use std::path::Path;

use rusqlite::{Connection, MAIN_DB, OpenFlags, ffi};

use super::files::create_private_file;
use super::ids::{advance_ids_of_backup, warn_of_unmarked_litestream_copy};
use super::node_id::load_or_create_node_id;
use super::open_error::{OpenError, open_error};
use super::schema::{create_schema, reject_schema_to_upgrade, schema_version, upgrade_schema};
use super::wal::{
    CheckpointOnClose, node_id_without_wal, reject_foreign_wal, reject_wal_of_another_node,
    reject_wal_without_database, rewrite_and_sync_wal, set_wal_checkpoint_on_close,
};
use super::{BUSY_TIMEOUT, prepare_statements_once};
use crate::domain::node_id::NodeId;

/// Opens the file for the writer, creates the schema in a new one, and returns the node's id.
pub(in crate::store) fn open_database(
    path: &Path,
    configured: Option<&NodeId>,
) -> Result<(Connection, NodeId), OpenError> {
    let sqlite_error = |source| open_error(path, source);
    reject_wal_without_database(path)?;
    reject_foreign_wal(path)?;
    let without_wal = node_id_without_wal(path);
    create_private_file(path)?;
    let mut connection = Connection::open(path).map_err(sqlite_error)?;
    reject_read_only_on_open(&connection).map_err(sqlite_error)?;
    // A file that is refused stays as it is, and so does its WAL.
    set_wal_checkpoint_on_close(&connection, CheckpointOnClose::No).map_err(sqlite_error)?;
    let version = schema_version(&connection, path)?;
    set_pragmas_on_open(&connection).map_err(sqlite_error)?;
    rewrite_and_sync_wal(&mut connection, path)?;
    if version == 0 {
        create_schema(&mut connection).map_err(sqlite_error)?;
    }
    // These two checks read only what the first version has.
    if let Some(what) = find_inconsistency_on_open(&connection).map_err(sqlite_error)? {
        return Err(OpenError::Inconsistent {
            path: path.into(),
            what,
        });
    }
    let stored = load_or_create_node_id(&mut connection, configured).map_err(sqlite_error)?;
    reject_wal_of_another_node(path, without_wal, &stored)?;
    set_wal_checkpoint_on_close(&connection, CheckpointOnClose::Yes).map_err(sqlite_error)?;
    if let Some(configured) = configured.filter(|configured| **configured != stored) {
        return Err(OpenError::OtherNode {
            configured: configured.clone(),
            stored,
        });
    }
    if version != 0 {
        upgrade_schema(&mut connection, version).map_err(sqlite_error)?;
    }
    let is_marked_copy = advance_ids_of_backup(&mut connection).map_err(sqlite_error)?;
    if !is_marked_copy {
        warn_of_unmarked_litestream_copy(&connection, path).map_err(sqlite_error)?;
    }
    Ok((connection, stored))
}

/// Without the right to write, SQLite opens a file for reading, and even begins a transaction.
fn reject_read_only_on_open(connection: &Connection) -> rusqlite::Result<()> {
    if connection.is_readonly(MAIN_DB)? {
        let error = ffi::Error::new(ffi::SQLITE_READONLY);
        return Err(rusqlite::Error::SqliteFailure(error, None));
    }
    Ok(())
}

/// Opens an existing database, also while payrelay is running. Creates nothing.
pub(in crate::store) fn open_existing_database(
    path: &Path,
) -> Result<(Connection, NodeId), OpenError> {
    let sqlite_error = |source| open_error(path, source);
    let found = open_checked_database(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    reject_schema_to_upgrade(found.version, path)?;
    let connection = found.connection;
    connection
        .pragma_update(None, "synchronous", "FULL")
        .map_err(sqlite_error)?;
    connection
        .pragma_update(None, "foreign_keys", true)
        .map_err(sqlite_error)?;
    // A running payrelay checkpoints the WAL, or the next one.
    connection
        .pragma_update(None, "wal_autocheckpoint", 0)
        .map_err(sqlite_error)?;
    Ok((connection, found.node))
}

/// As [`open_existing_database`], and the file stays as it is.
pub(in crate::store) fn open_database_to_read(
    path: &Path,
) -> Result<(Connection, NodeId), OpenError> {
    let found = open_checked_database(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    reject_schema_to_upgrade(found.version, path)?;
    Ok((found.connection, found.node))
}

/// As [`open_database_to_read`], also if the file is not upgraded yet.
pub(in crate::store) fn open_any_version_to_read(
    path: &Path,
) -> Result<(Connection, NodeId), OpenError> {
    let found = open_checked_database(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    Ok((found.connection, found.node))
}

/// Upgrades the schema of an existing database, on which no payrelay runs.
pub(in crate::store) fn upgrade_database(path: &Path) -> Result<(), OpenError> {
    let mut found = open_checked_database(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    upgrade_schema(&mut found.connection, found.version).map_err(|source| open_error(path, source))
}

/// An existing database.
struct CheckedDatabase {
    connection: Connection,
    node: NodeId,
    /// The version of its schema.
    version: usize,
}

fn open_checked_database(path: &Path, flags: OpenFlags) -> Result<CheckedDatabase, OpenError> {
    let sqlite_error = |source| open_error(path, source);
    // A command must not destroy a WAL either.
    reject_wal_without_database(path)?;
    reject_foreign_wal(path)?;
    let without_wal = node_id_without_wal(path);
    let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(sqlite_error)?;
    connection
        .busy_timeout(BUSY_TIMEOUT)
        .map_err(sqlite_error)?;
    set_wal_checkpoint_on_close(&connection, CheckpointOnClose::No).map_err(sqlite_error)?;
    let version = schema_version(&connection, path)?;
    if version == 0 {
        return Err(OpenError::NotOurs(path.into()));
    }
    let node: String = connection
        .query_row("SELECT id FROM node", [], |row| row.get(0))
        .map_err(sqlite_error)?;
    let node = NodeId::parse(&node).ok_or_else(|| OpenError::NotOurs(path.into()))?;
    reject_wal_of_another_node(path, without_wal, &node)?;
    Ok(CheckedDatabase {
        connection,
        node,
        version,
    })
}

fn set_pragmas_on_open(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    prepare_statements_once(connection)?;
    // Readers continue while the writer commits; a commit is one sequential write and one fsync.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // NORMAL would lose the last commits with the power
    // (https://sqlite.org/pragma.html#pragma_synchronous).
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // A WAL that grew while a reader held old pages is truncated to 64 MiB when it starts over.
    connection.pragma_update(None, "journal_size_limit", 64 * 1024 * 1024)?;
    // 16 MiB of pages: the right edges of all tables and indexes under load.
    connection.pragma_update(None, "cache_size", -16_384)
}

/// Compares the last rows of the tables. That costs nothing, and finds most foreign WALs. The start
/// does not check the whole file.
fn find_inconsistency_on_open(connection: &Connection) -> rusqlite::Result<Option<&'static str>> {
    let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    let payment = number("SELECT coalesce(max(id), 0) FROM payment")?;
    let given = number("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'payment'")?;
    let history = number(
        "SELECT coalesce((SELECT h.last_payment_id FROM user_history h JOIN (SELECT user_id \
            FROM payment ORDER BY id DESC LIMIT 1) p ON p.user_id = h.user_id), 0)",
    )?;
    let outbox =
        number("SELECT coalesce((SELECT payment_id FROM outbox ORDER BY id DESC LIMIT 1), 0)")?;
    Ok(if given < payment {
        Some("its payments have ids that were never given")
    } else if history != payment {
        Some("its last payment is not the last one of its user's history")
    } else if outbox > payment {
        Some("it has events of payments that it does not have")
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::files::sibling_file;
    use std::{fs, io};

    #[test]
    fn opening_a_new_file_creates_the_schema_and_an_id_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let (connection, first) = open_database(&path, None).unwrap();
        let pragma = |name| {
            connection
                .pragma_query_value(None, name, |row| row.get::<_, i64>(0))
                .unwrap()
        };
        assert_eq!(pragma("user_version"), 7);
        assert_eq!(pragma("synchronous"), 2, "2 is FULL");
        assert_eq!(pragma("foreign_keys"), 1);
        let mode: String = connection
            .pragma_query_value(None, "journal_mode", |row| row.get(0))
            .unwrap();
        assert_eq!(mode, "wal");
        drop(connection);
        assert_eq!(open_database(&path, None).unwrap().1, first);
        assert_eq!(open_database(&path, Some(&first)).unwrap().1, first);
        let other = NodeId::parse("other").unwrap();
        assert!(matches!(
            open_database(&path, Some(&other)),
            Err(OpenError::OtherNode { .. })
        ));
    }

    #[test]
    fn opening_with_the_wal_of_another_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let copy = dir.path().join("copy.db");
        let (connection, _) = open_database(&path, None).unwrap();
        connection
            .execute("VACUUM INTO ?1", [copy.to_str().unwrap()])
            .unwrap();
        let wal = dir.path().join("copy.db-wal");
        fs::copy(dir.path().join("a.db-wal"), &wal).unwrap();
        let before = fs::read(&copy).unwrap();
        let refusal = open_database(&copy, None).unwrap_err();
        assert!(matches!(refusal, OpenError::ForeignWal { .. }), "{refusal}");
        assert_eq!(fs::read(&copy).unwrap(), before);
        fs::remove_file(wal).unwrap();
        open_database(&copy, None).unwrap();
        // Its own WAL is read, however the process ended.
        drop(connection);
        open_database(&path, None).unwrap();
    }

    #[test]
    fn opening_with_a_configured_node_id_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let id = NodeId::parse("till-3").unwrap();
        assert_eq!(open_database(&path, Some(&id)).unwrap().1, id);
        assert_eq!(open_database(&path, None).unwrap().1, id);
    }

    #[test]
    fn opening_a_foreign_file_is_refused_and_leaves_it_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = dir.path().join("foreign.db");
        Connection::open(&foreign)
            .unwrap()
            .execute_batch("CREATE TABLE theirs (x)")
            .unwrap();
        let before = fs::read(&foreign).unwrap();
        assert!(matches!(
            open_database(&foreign, None),
            Err(OpenError::NotOurs(_))
        ));
        assert_eq!(fs::read(&foreign).unwrap(), before);

        let text = dir.path().join("text.db");
        fs::write(
            &text,
            "this is no database, and it is longer than a header of one hundred bytes, so that \
                SQLite reads it",
        )
        .unwrap();
        assert!(matches!(
            open_database(&text, None),
            Err(OpenError::Sqlite { .. })
        ));

        let newer = dir.path().join("newer.db");
        drop(open_database(&newer, None).unwrap());
        Connection::open(&newer)
            .unwrap()
            .pragma_update(None, "user_version", 99)
            .unwrap();
        assert!(matches!(
            open_database(&newer, None),
            Err(OpenError::Newer { found: 99, .. })
        ));

        let older = dir.path().join("older.db");
        drop(open_database(&older, None).unwrap());
        Connection::open(&older)
            .unwrap()
            .pragma_update(None, "user_version", 1)
            .unwrap();
        assert!(matches!(
            open_database(&older, None),
            Err(OpenError::Older { found: 1, .. })
        ));
    }

    #[test]
    fn opening_a_wal_without_its_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ours = dir.path().join("ours.db");
        let theirs = dir.path().join("theirs.db");
        drop(open_database(&ours, None).unwrap());
        let (open_still, _) = open_database(&theirs, None).unwrap();
        let before = fs::read(&ours).unwrap();
        fs::copy(sibling_file(&theirs, "-wal"), sibling_file(&ours, "-wal")).unwrap();
        assert!(matches!(
            open_database(&ours, None),
            Err(OpenError::Inconsistent { .. })
        ));
        assert_eq!(fs::read(&ours).unwrap(), before);
        fs::write(&ours, "").unwrap();
        assert!(matches!(
            open_database(&ours, None),
            Err(OpenError::WalWithoutDatabase { .. })
        ));
        fs::remove_file(sibling_file(&ours, "-wal")).unwrap();
        open_database(&ours, None).unwrap();
        drop(open_still);
    }

    #[test]
    fn every_open_error_of_a_full_disk_says_to_free_space() {
        let path = Path::new("a.db");
        let sqlite = |code| {
            open_error(
                path,
                rusqlite::Error::SqliteFailure(ffi::Error::new(code), None),
            )
            .to_string()
        };
        let io = |code| {
            OpenError::Io {
                path: path.into(),
                source: io::Error::from_raw_os_error(code),
            }
            .to_string()
        };
        let sync = |code| {
            OpenError::WalNotSynced {
                path: path.into(),
                source: io::Error::from_raw_os_error(code),
            }
            .to_string()
        };
        let enospc = 28;
        let eio = 5;
        for full in [
            sqlite(ffi::SQLITE_FULL),
            sqlite(ffi::SQLITE_IOERR_SHMSIZE),
            io(enospc),
            sync(enospc),
        ] {
            assert!(full.ends_with("; free space on the disk"), "{full}");
        }
        for broken in [sqlite(ffi::SQLITE_IOERR_WRITE), sync(eio)] {
            assert!(broken.ends_with("see the kernel's log"), "{broken}");
        }
        assert!(io(eio).ends_with("the folder must exist and be writable"));
    }

    #[test]
    fn opening_tables_that_contradict_each_other_is_refused() {
        let wrong = [
            "INSERT INTO payment (user_id, reservation_id, amount, currency, status, executed_at) \
                VALUES (1, 1, 1, 'KRW', 'COMPLETED', 1)",
            "INSERT INTO outbox (payment_id, user_id, type, created_at) \
                VALUES (1, 1, 'payment.completed', 1)",
            "INSERT INTO payment (user_id, reservation_id, amount, currency, status, executed_at) \
                VALUES (1, 1, 1, 'KRW', 'COMPLETED', 1); UPDATE sqlite_sequence SET seq = 0 \
                WHERE name = 'payment'",
        ];
        for sql in wrong {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            let (connection, _) = open_database(&path, None).unwrap();
            connection
                .execute_batch(&format!("PRAGMA foreign_keys = 0; {sql}"))
                .unwrap();
            drop(connection);
            assert!(
                matches!(
                    open_database(&path, None),
                    Err(OpenError::Inconsistent { .. })
                ),
                "{sql}"
            );
        }
    }
}
