//! Puts a copy in the place of the database, or marks the database itself as one: then its next
//! start gives no id again that the file which it replaces has given.
//!
//! Any copy will do: our own backup, and one by rsync, a snapshot of the machine, or litestream. It
//! is checked as a whole before anything is changed, and the files that it replaces are moved, not
//! deleted.

use super::OpenError;
use super::StoreError;
use super::audit::{AuditDatabase, Finding, UNCONSUMED_KIND};
use super::engine::BUSY_TIMEOUT;
use super::engine::{files, lock, open};
use super::error::is_corruption;
use crate::domain::event::NodeId;
use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, OptionalExtension as _};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Why nothing was restored. The database is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The database, or the copy, cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The copy is the database itself.
    #[error("{0} is the database itself: to mark it as a copy in its place, use --adopt")]
    Same(PathBuf),
    /// Another node's payments are in the copy.
    #[error(
        "the copy belongs to node {copy}, and this database to node {node}: restore a copy of \
            this node, or move the database away and set node.id to {copy}"
    )]
    OtherNode {
        /// Of the copy.
        copy: NodeId,
        /// Of the configuration, or of the database that is there.
        node: NodeId,
    },
    /// The copy is not sound.
    #[error("the copy is not sound, so it was not restored: {}", show(.0))]
    Unsound(Vec<Finding>),
    /// The copy is no sound file.
    #[error(
        "the copy {copy} is damaged, or no database ({reason}): restore another one; nothing was \
            changed"
    )]
    Damaged {
        /// As it was named.
        copy: PathBuf,
        /// As SQLite says.
        reason: String,
    },
    /// A file cannot be read, written or moved.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// SQLite refuses.
    #[error("the copy cannot be used: {0}")]
    Store(#[from] StoreError),
}

impl RestoreError {
    /// The same, with the name of the copy instead of the temporary file's where it is damaged.
    fn of_copy(self, copy: &Path) -> Self {
        let reason = match &self {
            Self::Open(OpenError::Sqlite { source, .. }) if is_corruption(source) => {
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

fn show(findings: &[Finding]) -> String {
    findings
        .iter()
        .map(|seen| format!("{} {}", seen.count, seen.what))
        .collect::<Vec<_>>()
        .join("; ")
}

/// What was done.
#[derive(Debug)]
pub struct Restored {
    /// Whose database it is.
    pub node: NodeId,
    /// How many payments it has.
    pub payments: i64,
    /// Where the files are that were replaced, if there were any.
    pub before: Option<PathBuf>,
}

/// Who restores what.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The copy; `None`: the database itself is one.
    pub copy: Option<&'a Path>,
    /// The database, as it is configured.
    pub database: &'a Path,
    /// The configured node.
    pub node: Option<&'a NodeId>,
    /// The user who asks.
    pub by: &'a str,
    /// When.
    pub now: Timestamp,
}

/// Restores a copy. No payrelay runs on the database meanwhile.
pub fn restore(request: &Request<'_>) -> Result<Restored, RestoreError> {
    let database = files::resolve(request.database)?;
    let _lock = lock::lock(&database)?;
    match request.copy {
        None => adopt(&database, request),
        Some(copy) => replace(&files::resolve(copy)?, &database, request),
    }
}

/// Marks the database in its place.
fn adopt(database: &Path, request: &Request<'_>) -> Result<Restored, RestoreError> {
    let (node, payments) = check(database, request.node)?;
    mark(database, request, None)?;
    Ok(Restored {
        node,
        payments,
        before: None,
    })
}

fn replace(copy: &Path, database: &Path, request: &Request<'_>) -> Result<Restored, RestoreError> {
    if copy == database {
        return Err(RestoreError::Same(copy.to_owned()));
    }
    let current = current(database);
    let part = files::sibling(database, ".restore-part");
    let prepared = prepare(copy, &part, current.as_ref(), request);
    let prepared = prepared.map_err(|error| error.of_copy(copy));
    let restored = prepared.and_then(|(node, payments)| {
        let before = move_away(database, request.now)?;
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
    // After a success there is nothing left under this name.
    for suffix in SUFFIXES {
        let _ = fs::remove_file(files::sibling(&part, suffix));
    }
    restored
}

const SUFFIXES: [&str; 3] = ["", "-wal", "-shm"];

/// Copies the files next to the database, and makes one sound, marked file of them.
fn prepare(
    copy: &Path,
    part: &Path,
    current: Option<&Current>,
    request: &Request<'_>,
) -> Result<(NodeId, i64), RestoreError> {
    for suffix in SUFFIXES {
        let _ = fs::remove_file(files::sibling(part, suffix));
    }
    copy_file(copy, part)?;
    let wal = files::sibling(copy, "-wal");
    if wal.exists() {
        copy_file(&wal, &files::sibling(part, "-wal"))?;
    }
    let node = request.node.or(current.map(|current| &current.node));
    let checked = check(part, node)?;
    mark(part, request, current.map(|current| current.given))?;
    let synced = File::open(part).and_then(|file| file.sync_all());
    synced.map_err(|source| RestoreError::Io {
        path: part.into(),
        source,
    })?;
    Ok(checked)
}

fn copy_file(from: &Path, to: &Path) -> Result<(), RestoreError> {
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

/// The file as a whole, and what must hold between its tables.
fn check(file: &Path, node: Option<&NodeId>) -> Result<(NodeId, i64), RestoreError> {
    let checked = AuditDatabase::open(file)?;
    let copy = checked.node().clone();
    if let Some(node) = node.filter(|node| **node != copy) {
        return Err(RestoreError::OtherNode {
            copy,
            node: node.clone(),
        });
    }
    let mut checked = checked.check("", None, 3)?;
    // A copy may be from the middle of an outage: its next start gives those events their
    // deliveries.
    checked
        .findings
        .retain(|finding| finding.kind != UNCONSUMED_KIND);
    if !checked.findings.is_empty() {
        return Err(RestoreError::Unsound(checked.findings));
    }
    Ok((copy, checked.totals.payments.values().sum()))
}

/// Says in the file that it is a copy, and who restored it. Afterwards it has no WAL.
fn mark(file: &Path, request: &Request<'_>, given: Option<i64>) -> Result<(), RestoreError> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute(
        "UPDATE node \
            SET backed_up_at = ifnull(backed_up_at, ?1), restored_by = ?2, given_before = ?3",
        (request.now.as_micros(), request.by, given),
    )?;
    // Folds the WAL into the file.
    connection.close().map_err(|(_, error)| error)?;
    Ok(())
}

/// The database that is there now.
struct Current {
    node: NodeId,
    /// The largest id that it has given.
    given: i64,
}

/// `None` where there is none, or it cannot be read: that may be why a copy is restored.
fn current(database: &Path) -> Option<Current> {
    let (connection, node) = open::open_to_read(database).ok()?;
    let sql = "SELECT max(seq) FROM sqlite_sequence";
    let given: Option<i64> = connection
        .query_row(sql, [], |row| row.get(0))
        .optional()
        .ok()??;
    Some(Current {
        node,
        given: given.unwrap_or(0),
    })
}

/// Moves the files of the database into a folder of their own.
fn move_away(database: &Path, now: Timestamp) -> Result<Option<PathBuf>, RestoreError> {
    let files = SUFFIXES.map(|suffix| files::sibling(database, suffix));
    if !files.iter().any(|file| file.exists()) {
        return Ok(None);
    }
    let time: String = now
        .to_string()
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .collect();
    let folder = files::sibling(database, &format!(".before-{time}"));
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
