//! The database file: opened and locked, written by one thread, read by a few, checkpointed, and
//! watched for a full disk and for corruption. Of the tables it reads what a start needs: the node,
//! the last ids, and whether the last rows contradict each other.

use std::time::Duration;

use r2d2_sqlite::SqliteConnectionManager;
use rusqlite::Connection;
use rusqlite::config::DbConfig;

mod abort;
pub(in crate::store) mod checkpointer;
pub(in crate::store) mod corruption;
pub(in crate::store) mod disk_space;
pub(in crate::store) mod files;
pub(in crate::store) mod ids;
pub(in crate::store) mod lock;
mod node_id;
pub(in crate::store) mod open;
pub(in crate::store) mod open_error;
pub(in crate::store) mod readers;
mod schema;
pub(in crate::store) mod transaction_clock;
mod wal;
pub(in crate::store) mod writer;

pub(in crate::store) type Pool = r2d2::Pool<SqliteConnectionManager>;

/// How long a connection waits for a lock of another one. Readers wait for a checkpoint or a
/// recovery only, and neither lasts long.
pub(in crate::store) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How many prepared statements each connection keeps: more than there are.
const STATEMENTS: usize = 64;

/// Each statement is prepared once for a connection. Without the query planner stability guarantee
/// (<https://sqlite.org/queryplanner-ng.html#qpstab>) SQLite prepares a statement again whenever
/// the parameter of its LIMIT is bound. That was a twentieth of the processor time.
pub(in crate::store) fn prepare_statements_once(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    Ok(())
}
