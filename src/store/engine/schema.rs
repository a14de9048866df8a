//! The schema and its version.

use std::path::Path;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::open_error::{OpenError, open_error};

/// The schema of an empty file.
const SCHEMA: &str = include_str!("../../../schema.sql");

/// The version that payrelay 0.2.0 created. A file of an earlier version is refused.
const FIRST_VERSION: usize = 6;

/// Each step brings a file from one version to the next, from [`FIRST_VERSION`] on. A step never
/// changes after its release. It may add to the schema, and removes nothing within a minor version.
const STEPS: &[&str] = &[include_str!("upgrades/7.sql")];

/// The version of [`SCHEMA`].
const VERSION: usize = FIRST_VERSION + STEPS.len();

/// Marks the file as ours (<https://sqlite.org/pragma.html#pragma_application_id>): "prly".
const APPLICATION_ID: i32 = 0x7072_6c79;

enum FileKind {
    /// The schema version of the file; 0 is an empty file.
    Version(usize),
    NotOurs,
}

/// The version of a file that this payrelay can use, perhaps after an upgrade; 0 is an empty file.
pub(super) fn schema_version(connection: &Connection, path: &Path) -> Result<usize, OpenError> {
    let known = VERSION;
    match inspect_schema(connection).map_err(|source| open_error(path, source))? {
        FileKind::NotOurs => Err(OpenError::NotOurs(path.into())),
        FileKind::Version(found) if found > known => Err(OpenError::Newer {
            path: path.into(),
            found,
            known,
        }),
        FileKind::Version(found @ 1..FIRST_VERSION) => Err(OpenError::Older {
            path: path.into(),
            found,
            known,
        }),
        FileKind::Version(found) => Ok(found),
    }
}

fn inspect_schema(connection: &Connection) -> rusqlite::Result<FileKind> {
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let version = usize::try_from(number("user_version")?);
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    Ok(match (number("application_id")?, tables, version) {
        (0, 0, Ok(0)) => FileKind::Version(0),
        (id, _, Ok(version)) if id == i64::from(APPLICATION_ID) && version > 0 => {
            FileKind::Version(version)
        }
        _ => FileKind::NotOurs,
    })
}

/// Creates the schema in an empty file.
pub(super) fn create_schema(connection: &mut Connection) -> rusqlite::Result<()> {
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    tx.execute_batch(SCHEMA)?;
    tx.pragma_update(None, "application_id", APPLICATION_ID)?;
    tx.execute_batch(&format!("PRAGMA user_version = {VERSION}"))?;
    tx.commit()?;
    log::info!(
        event = "schema_created", version = VERSION;
        "created the database's schema, version {VERSION}"
    );
    Ok(())
}

/// Refuses a file that only `payrelay serve` and `payrelay restore` may upgrade.
pub(super) fn reject_schema_to_upgrade(found: usize, path: &Path) -> Result<(), OpenError> {
    if found == VERSION {
        return Ok(());
    }
    Err(OpenError::NotUpgraded {
        path: path.into(),
        found,
        known: VERSION,
    })
}

/// Brings the schema from `version` to the newest one.
pub(super) fn upgrade_schema(connection: &mut Connection, version: usize) -> rusqlite::Result<()> {
    upgrade_schema_by(STEPS, connection, version)
}

/// A step and its version number are one transaction: after a crash, the next start continues.
fn upgrade_schema_by(
    steps: &[&str],
    connection: &mut Connection,
    version: usize,
) -> rusqlite::Result<()> {
    for (from, step) in (FIRST_VERSION..).zip(steps) {
        if from < version {
            continue;
        }
        let to = from + 1;
        let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
        tx.execute_batch(step)?;
        tx.execute_batch(&format!("PRAGMA user_version = {to}"))?;
        tx.commit()?;
        log::info!(
            event = "schema_upgraded", from = from, version = to;
            "upgraded the database's schema from version {from} to {to}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open::{open_database, open_database_to_read, upgrade_database};
    use std::fs;

    /// A file that payrelay 0.2.0 wrote: payments, events, deliveries, dead letters, actions.
    const FIRST_RELEASE: &[u8] = include_bytes!("../../../tests/data/payrelay-0.2.0.db");

    /// Tables, indexes and columns, in the order of their names.
    fn describe_schema(connection: &Connection) -> Vec<String> {
        let sql = "SELECT s.type || ' ' || s.name || ' ' || coalesce(c.name || ' ' || c.type, '') \
            FROM sqlite_schema s LEFT JOIN pragma_table_xinfo(s.name) c ORDER BY 1";
        let mut statement = connection.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    }

    #[test]
    fn the_database_of_the_first_release_has_the_schema_of_a_new_one_after_its_upgrade() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new] = ["old.db", "new.db"].map(|name| dir.path().join(name));
        fs::write(&old, FIRST_RELEASE).unwrap();
        let (mut upgraded, _) = open_database(&old, None).unwrap();
        let (created, _) = open_database(&new, None).unwrap();
        assert_eq!(describe_schema(&upgraded), describe_schema(&created));
        let count = |table: &str| {
            let sql = format!("SELECT count(*) FROM {table}");
            upgraded.query_row(&sql, [], |row| row.get::<_, i64>(0))
        };
        let tables = ["payment", "outbox", "delivery", "dead_letter_action"];
        for table in tables {
            assert!(count(table).unwrap() > 0, "{table} keeps its rows");
        }
        upgrade_schema(&mut upgraded, VERSION).unwrap();
    }

    #[test]
    fn each_upgrade_step_of_the_schema_runs_once_and_a_failed_one_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        fs::write(&path, FIRST_RELEASE).unwrap();
        let mut connection = Connection::open(&path).unwrap();
        let version = |connection: &Connection| -> usize {
            let pragma = "user_version";
            let number: i64 = connection
                .pragma_query_value(None, pragma, |row| row.get(0))
                .unwrap();
            usize::try_from(number).unwrap()
        };
        let steps = [
            "ALTER TABLE node ADD COLUMN first TEXT",
            "ALTER TABLE node ADD COLUMN second TEXT; SELECT * FROM missing",
        ];
        upgrade_schema_by(&steps, &mut connection, FIRST_VERSION).unwrap_err();
        assert_eq!(version(&connection), FIRST_VERSION + 1);
        let columns = describe_schema(&connection);
        assert!(columns.contains(&"table node first TEXT".to_owned()));
        assert!(!columns.contains(&"table node second TEXT".to_owned()));

        let mended = [steps[0], "ALTER TABLE node ADD COLUMN second TEXT"];
        upgrade_schema_by(&mended, &mut connection, FIRST_VERSION + 1).unwrap();
        assert_eq!(version(&connection), FIRST_VERSION + 2);
    }

    #[test]
    fn a_command_refuses_a_database_that_serve_has_to_upgrade() {
        let path = Path::new("a.db");
        let refusal = reject_schema_to_upgrade(VERSION - 1, path).unwrap_err();
        assert!(
            refusal.to_string().contains("start `payrelay serve` once"),
            "{refusal}"
        );
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("old.db");
        fs::write(&old, FIRST_RELEASE).unwrap();
        upgrade_database(&old).unwrap();
        open_database_to_read(&old).unwrap();
    }
}
