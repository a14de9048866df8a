//! Why a database cannot be used. Each error says what to do.

use std::io;
use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use crate::domain::node_id::NodeId;
use crate::store::error::StoreError;

/// Why a database cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no file.
    #[error(
        "database.path {0}: there is no database; run the command in payrelay's folder, or name \
            its configuration with --config"
    )]
    NoDatabase(String),
    /// Another process uses it.
    #[error(
        "database.path {path}: in use by another payrelay{holder}; a database serves one process: \
            stop the other one, or set another path"
    )]
    Locked {
        /// The database.
        path: PathBuf,
        /// The process id of the other one, if the lock file has it.
        holder: String,
    },
    /// The folder or a file cannot be used.
    #[error(
        "database.path {path}: {source}; {}",
        open_error_io_advice(source, "the folder must exist and be writable")
    )]
    Io {
        /// The file that failed.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The disk does not keep the WAL.
    #[error(
        "database.path {path}: its WAL cannot be written to the disk: {source}; {}",
        open_error_io_advice(source, DISK_FAILS)
    )]
    WalNotSynced {
        /// The database.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// SQLite cannot use the file.
    #[error("database.path {path}: {source}; {advice}")]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// The error of SQLite.
        source: rusqlite::Error,
        /// What to do.
        advice: &'static str,
    },
    /// A WAL without its database: SQLite would delete it, and start an empty database.
    #[error(
        "database.path {path}: the file is missing or empty, but its WAL ({path}-wal) exists: put \
            the file back, or restore a backup; to start with an empty database, move the WAL away"
    )]
    WalWithoutDatabase {
        /// The database.
        path: PathBuf,
    },
    /// Sound as a file, but its tables contradict each other.
    #[error(
        "database.path {path}: {what}; perhaps the WAL (-wal) belongs to another file: put the \
            right one back, or restore a backup (docs/how-to/recover-from-corruption.md)"
    )]
    Inconsistent {
        /// The database.
        path: PathBuf,
        /// The contradiction.
        what: &'static str,
    },
    /// Another program's file.
    #[error("database.path {0}: payrelay did not create this SQLite file; set another path")]
    NotOurs(PathBuf),
    /// Created by a later version.
    #[error(
        "database.path {path}: its schema is version {found}, this payrelay knows {known}; use a \
            newer payrelay"
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// The version in the file.
        found: usize,
        /// The newest version known here.
        known: usize,
    },
    /// Created before 0.2.0, the first release.
    #[error(
        "database.path {path}: its schema is version {found}, this payrelay needs {known}; the \
            format changed before 0.2.0: set another path, or open this file with the payrelay \
            that created it"
    )]
    Older {
        /// The database.
        path: PathBuf,
        /// The version in the file.
        found: usize,
        /// The newest version known here.
        known: usize,
    },
    /// Created by an earlier version, and not yet upgraded.
    #[error(
        "database.path {path}: its schema is version {found}, and this payrelay uses {known}; \
            start `payrelay serve` once, which upgrades it"
    )]
    NotUpgraded {
        /// The database.
        path: PathBuf,
        /// The version in the file.
        found: usize,
        /// The newest version known here.
        known: usize,
    },
    /// SQLite would use the WAL of another database for this one.
    #[error(
        "database.path {path}: {wal} is the WAL of another database, perhaps of the one that this \
            copy replaces; remove it, and the file next to it that ends in -shm"
    )]
    ForeignWal {
        /// The database.
        path: PathBuf,
        /// The WAL.
        wal: PathBuf,
    },
    /// The events in the file were published under another node id.
    #[error(
        "node.id {configured}: the database belongs to node {stored}, which cannot change; set \
            node.id to it, or leave it empty"
    )]
    OtherNode {
        /// In the configuration.
        configured: NodeId,
        /// In the database.
        stored: NodeId,
    },
    /// The read-only connections cannot be opened.
    #[error("database.path: cannot be read: {0}")]
    Pool(String),
}

impl OpenError {
    /// Whether it may pass by itself: another process uses the database.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Locked { .. } => true,
            Self::Sqlite { source, .. } => {
                matches!(
                    source.sqlite_error_code(),
                    Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
                )
            }
            _ => false,
        }
    }
}

const FREE_SPACE: &str = "free space on the disk";

const DISK_FAILS: &str = "the disk or its file system fails: see the kernel's log";

/// What to do about an error of the operating system.
fn open_error_io_advice(error: &io::Error, otherwise: &'static str) -> &'static str {
    if error.kind() == io::ErrorKind::StorageFull {
        FREE_SPACE
    } else {
        otherwise
    }
}

/// An error of SQLite, and what to do about it.
pub(in crate::store) fn open_error(path: &Path, source: rusqlite::Error) -> OpenError {
    let advice = match source.sqlite_error_code() {
        _ if StoreError::is_full_disk(&source) => FREE_SPACE,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            "the file is damaged, or no database: restore a backup or set another path \
                (docs/how-to/recover-from-corruption.md)"
        }
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            "it must be a file, and it and its folder must exist and be writable"
        }
        Some(ErrorCode::SystemIoFailure) => DISK_FAILS,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "another program uses it: stop that program"
        }
        _ => "restore a backup or set another path (docs/how-to/recover-from-corruption.md)",
    };
    OpenError::Sqlite {
        path: path.into(),
        source,
        advice,
    }
}
