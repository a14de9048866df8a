//! `[database]`: the SQLite file and the limits of its queues.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::typed_keys::TypedKeys;

/// `[database]`: the SQLite file.
#[derive(Debug, Clone)]
pub struct Database {
    /// The file; `-wal`, `-shm` and `.lock` are next to it.
    pub path: PathBuf,
    /// While this number of payments waits for the writer, payments are refused with 503; the same
    /// number limits waiting reads.
    pub queue_max: NonZeroUsize,
    /// How many threads run reads.
    pub readers: NonZeroUsize,
    /// With less free space, payments are refused with 507; 0: never.
    pub min_free_bytes: u64,
}

pub(super) fn read_path_key(keys: &mut TypedKeys<'_>) -> PathBuf {
    keys.path("database.path", "payrelay.db")
}

pub(super) fn read_database_section(keys: &mut TypedKeys<'_>) -> Database {
    Database {
        path: read_path_key(keys),
        queue_max: keys.count("database.queue_max", 4096, 1..=1_000_000),
        readers: keys.count("database.readers", 2, 1..=64),
        min_free_bytes: keys.integer("database.min_free_bytes", 67_108_864, 0..=1 << 50),
    }
}
