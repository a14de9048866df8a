//! Replaces the database by a copy, or marks the database itself as a copy. Then its next start
//! issues no id that the replaced file has issued.
//!
//! Any copy will do: a backup of payrelay, or one by rsync, a snapshot of the machine, or
//! litestream. It is checked as a whole before anything is changed. The replaced files are moved,
//! not deleted.

use super::OfflineStore;
use super::OpenError;
use super::StoreError;
use super::audit::{AuditDatabase, Finding, UNCONSUMED_KIND};
use super::engine::BUSY_TIMEOUT;
use super::engine::{files, lock, open};
use super::operation::{self, Operation, OperationOutcome, OperationRecord};
use crate::domain::node_id::NodeId;
use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, OptionalExtension as _};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Why nothing was restored. The database is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The database or the copy cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The copy is the database itself.
    #[error("{0} is the database itself: to mark it as a copy in its place, use --adopt")]
    Same(PathBuf),
    /// The copy has another node's payments.
    #[error(
        "the copy belongs to node {copy}, and this database to node {node}: restore a copy of \
            this node, or move the database away and set node.id to {copy}"
    )]
    OtherNode {
        /// The node of the copy.
        copy: NodeId,
        /// The node of the configuration, or of the existing database.
        node: NodeId,
    },
    /// The copy has inconsistent tables.
    #[error("the copy is inconsistent, so it was not restored: {}", describe_restore_findings(.0))]
    Unsound(Vec<Finding>),
    /// The copy is a damaged file.
    #[error(
        "the copy {copy} is damaged, or no database ({reason}): restore another one; nothing was \
            changed"
    )]
    Damaged {
        /// As given.
        copy: PathBuf,
        /// The error of SQLite.
        reason: String,
    },
    /// A file cannot be read, written or moved.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// SQLite returned an error.
    #[error("the copy cannot be used: {0}")]
    Store(#[from] StoreError),
}

impl RestoreError {
    /// Names the copy instead of the temporary file in the error of a damaged copy.
    fn name_the_copy(self, copy: &Path) -> Self {
        let reason = match &self {
            Self::Open(OpenError::Sqlite { source, .. }) if StoreError::is_corruption(source) => {
                source.to_string()
            }
            Self::Store(error @ StoreError::Damaged) => error.to_string(),
            _ => return self,
        };
        let copy = copy.to_owned();
        Self::Damaged { copy, reason }
    }
}

impl From<rusqlite::Error> for RestoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

fn describe_restore_findings(findings: &[Finding]) -> String {
    findings
        .iter()
        .map(|seen| format!("{} {}", seen.count, seen.what))
        .collect::<Vec<_>>()
        .join("; ")
}

/// The result.
#[derive(Debug)]
pub struct Restored {
    /// The node of the database.
    pub node: NodeId,
    /// The number of its payments.
    pub payments: i64,
    /// The folder of the replaced files, if there were any.
    pub before: Option<PathBuf>,
}

/// A request to restore.
#[derive(Debug, Clone, Copy)]
pub struct RestoreRequest<'a> {
    /// The copy; `None`: the database itself is a copy.
    pub copy: Option<&'a Path>,
    /// The database, as configured.
    pub database: &'a Path,
    /// The configured node.
    pub node: Option<&'a NodeId>,
    /// The local user.
    pub by: &'a str,
    /// The time.
    pub now: Timestamp,
}

/// The copy of the copy until it is checked.
pub fn partial_restore_path(database: &Path) -> Result<PathBuf, OpenError> {
    let database = files::resolve_database_file(database)?;
    Ok(files::sibling_file(&database, PART))
}

const PART: &str = ".restore-part";

/// Restores a copy. No payrelay runs on the database meanwhile.
pub fn restore_database(request: &RestoreRequest<'_>) -> Result<Restored, RestoreError> {
    let database = files::resolve_database_file(request.database)?;
    let _lock = lock::lock_database(&database)?;
    let restored = match request.copy {
        None => adopt_restored_copy(&database, request),
        Some(copy) => {
            replace_by_restored_copy(&files::resolve_database_file(copy)?, &database, request)
        }
    };
    if let Err(error) = &restored {
        record_refused_restore(&database, error, request);
    }
    restored
}

/// Records in the database, which is still there, that nothing was restored. The error is the
/// answer, also where that cannot be recorded.
fn record_refused_restore(database: &Path, error: &RestoreError, request: &RestoreRequest<'_>) {
    let outcome = match error {
        RestoreError::Unsound(_) | RestoreError::Damaged { .. } => OperationOutcome::Findings,
        _ => OperationOutcome::Failed,
    };
    let record = OperationRecord {
        ended_at: request.now,
        origin: request.by.to_owned(),
    };
    // A damaged database is not written to: to mark it as a copy was the request.
    if request.copy.is_some()
        && let Ok(mut database) = OfflineStore::open(database)
    {
        let _ = database.write(|tx| {
            operation::record_operation(tx, Operation::Restore, outcome, None, &record)
        });
    }
}

/// Marks the database as a copy.
fn adopt_restored_copy(
    database: &Path,
    request: &RestoreRequest<'_>,
) -> Result<Restored, RestoreError> {
    let (node, payments) = check_restored_copy(database, request.node)?;
    mark_restored_copy(database, request, None)?;
    Ok(Restored {
        node,
        payments,
        before: None,
    })
}

fn replace_by_restored_copy(
    copy: &Path,
    database: &Path,
    request: &RestoreRequest<'_>,
) -> Result<Restored, RestoreError> {
    if copy == database {
        return Err(RestoreError::Same(copy.to_owned()));
    }
    let current = find_database_to_restore(database);
    let part = files::sibling_file(database, PART);
    let prepared = prepare_restored_copy(copy, &part, current.as_ref(), request);
    let prepared = prepared.map_err(|error| error.name_the_copy(copy));
    let restored = prepared.and_then(|(node, payments)| {
        let before = move_database_away_to_restore(database, request.now)?;
        fs::rename(&part, database).map_err(|source| RestoreError::Io {
            path: database.into(),
            source,
        })?;
        let folder = database.parent().unwrap_or(Path::new("/"));
        files::sync_folder(folder).map_err(|source| RestoreError::Io {
            path: folder.into(),
            source,
        })?;
        Ok(Restored {
            node,
            payments,
            before,
        })
    });
    // After a success there is no file under this name.
    files::remove_database_files(&part);
    restored
}

/// Copies the files next to the database, checks them, and makes one marked file of them.
fn prepare_restored_copy(
    copy: &Path,
    part: &Path,
    current: Option<&ReplacedDatabase>,
    request: &RestoreRequest<'_>,
) -> Result<(NodeId, i64), RestoreError> {
    files::remove_database_files(part);
    copy_file_to_restore(copy, part)?;
    let wal = files::sibling_file(copy, "-wal");
    if wal.exists() {
        copy_file_to_restore(&wal, &files::sibling_file(part, "-wal"))?;
    }
    let node = request.node.or(current.map(|current| &current.node));
    let checked = check_restored_copy(part, node)?;
    mark_restored_copy(part, request, current.map(|current| current.given))?;
    let synced = File::open(part).and_then(|file| file.sync_all());
    synced.map_err(|source| RestoreError::Io {
        path: part.into(),
        source,
    })?;
    Ok(checked)
}

fn copy_file_to_restore(from: &Path, to: &Path) -> Result<(), RestoreError> {
    let mut source = File::open(from).map_err(|source| RestoreError::Io {
        path: from.into(),
        source,
    })?;
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    let copied = options
        .open(to)
        .and_then(|mut target| io::copy(&mut source, &mut target));
    copied.map(drop).map_err(|source| RestoreError::Io {
        path: to.into(),
        source,
    })
}

/// Checks the file as a whole, and the consistency of its tables.
fn check_restored_copy(file: &Path, node: Option<&NodeId>) -> Result<(NodeId, i64), RestoreError> {
    // A copy of an earlier version becomes one of this version.
    open::upgrade_database(file)?;
    let checked = AuditDatabase::open(file)?;
    let copy = checked.node().clone();
    if let Some(node) = node.filter(|node| **node != copy) {
        return Err(RestoreError::OtherNode {
            copy,
            node: node.clone(),
        });
    }
    let mut checked = checked.check("", None, 3)?;
    // A copy may be from the middle of an outage: the next start backfills the deliveries of those
    // events.
    checked
        .findings
        .retain(|finding| finding.kind != UNCONSUMED_KIND);
    if !checked.findings.is_empty() {
        return Err(RestoreError::Unsound(checked.findings));
    }
    Ok((copy, checked.totals.payments.values().sum()))
}

/// Marks the file as a copy, with the user who restored it. Afterwards it has no WAL.
fn mark_restored_copy(
    file: &Path,
    request: &RestoreRequest<'_>,
    given: Option<i64>,
) -> Result<(), RestoreError> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute(
        "UPDATE node \
            SET backed_up_at = ifnull(backed_up_at, ?1), restored_by = ?2, given_before = ?3",
        (request.now.as_micros(), request.by, given),
    )?;
    let record = OperationRecord {
        ended_at: request.now,
        origin: request.by.to_owned(),
    };
    let outcome = OperationOutcome::Succeeded;
    operation::insert_operation(&connection, Operation::Restore, outcome, None, &record)?;
    // Checkpoints the WAL into the file.
    connection.close().map_err(|(_, error)| error)?;
    Ok(())
}

/// The existing database.
struct ReplacedDatabase {
    node: NodeId,
    /// The largest id that it has issued.
    given: i64,
}

/// `None` if there is none, or it cannot be read: that may be the reason to restore.
fn find_database_to_restore(database: &Path) -> Option<ReplacedDatabase> {
    let (connection, node) = open::open_any_version_to_read(database).ok()?;
    let sql = "SELECT max(seq) FROM sqlite_sequence";
    let given: Option<i64> = connection
        .query_row(sql, [], |row| row.get(0))
        .optional()
        .ok()??;
    Some(ReplacedDatabase {
        node,
        given: given.unwrap_or(0),
    })
}

/// Moves the files of the database into a folder of their own.
fn move_database_away_to_restore(
    database: &Path,
    now: Timestamp,
) -> Result<Option<PathBuf>, RestoreError> {
    let files = files::SUFFIXES.map(|suffix| files::sibling_file(database, suffix));
    if !files.iter().any(|file| file.exists()) {
        return Ok(None);
    }
    let time: String = now
        .to_string()
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .collect();
    let folder = files::sibling_file(database, &format!(".before-{time}"));
    let made = DirBuilder::new().mode(0o700).create(&folder);
    made.map_err(|source| RestoreError::Io {
        path: folder.clone(),
        source,
    })?;
    for file in files.iter().filter(|file| file.exists()) {
        let to = folder.join(file.file_name().unwrap_or_default());
        fs::rename(file, &to).map_err(|source| RestoreError::Io { path: to, source })?;
    }
    files::sync_folder(&folder).map_err(|source| RestoreError::Io {
        path: folder.clone(),
        source,
    })?;
    Ok(Some(folder))
}
