//! The schema and its version.

use std::path::Path;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::open_error::{OpenError, open_error};

/// The schema of an empty file.
const SCHEMA: &str = include_str!("../../../schema.sql");

/// The version of [`SCHEMA`]. Until 0.2.0 each change raises it, and a file of an earlier version
/// is refused.
const VERSION: usize = 6;

/// Marks the file as ours (<https://sqlite.org/pragma.html#pragma_application_id>): "prly".
const APPLICATION_ID: i32 = 0x7072_6c79;

enum FileKind {
    /// The schema version of the file; 0 is an empty file.
    Version(usize),
    NotOurs,
}

/// The version of a file that this payrelay can use; 0 is an empty file.
pub(super) fn schema_version(connection: &Connection, path: &Path) -> Result<usize, OpenError> {
    let known = VERSION;
    match inspect_schema(connection).map_err(|source| open_error(path, source))? {
        FileKind::NotOurs => Err(OpenError::NotOurs(path.into())),
        FileKind::Version(found) if found > known => Err(OpenError::Newer {
            path: path.into(),
            found,
            known,
        }),
        FileKind::Version(found) if found != 0 && found < known => Err(OpenError::Older {
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
