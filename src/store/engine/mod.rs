//! The database file: open and locked, written by one thread, read by a few, checkpointed, and watched for a full disk and for
//! corruption. Knows no table of payments.

use std::time::Duration;

use r2d2_sqlite::SqliteConnectionManager;

pub(in crate::store) mod checkpointer;
pub(in crate::store) mod corruption;
pub(in crate::store) mod disk_space;
pub(in crate::store) mod readers;
pub(in crate::store) mod schema;
pub(in crate::store) mod writer;

pub(in crate::store) type Pool = r2d2::Pool<SqliteConnectionManager>;

/// How long a connection waits for a lock that another one holds. Only a checkpoint or a recovery
/// holds one that a reader meets, and neither takes long.
pub(in crate::store) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Prepared statements kept by each connection: more than there are.
pub(in crate::store) const STATEMENTS: usize = 64;
