//! A copy of the database, also while payrelay is running: whole, consistent, and marked as a copy.
//!
//! `VACUUM INTO` reads one snapshot (<https://sqlite.org/lang_vacuum.html>): the writer continues,
//! and the WAL grows until the copy is complete. Because of the mark, a restored node issues no id
//! twice (see `engine::ids`).

use super::OfflineStore;
use super::engine::{BUSY_TIMEOUT, files};
use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, ErrorCode};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Why there is no copy. A failed backup leaves no file behind.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A copy never replaces a file.
    #[error("{0} exists: a backup never replaces a file; name another file")]
    Exists(PathBuf),
    /// Another process is writing the same copy.
    #[error("{0} is being written by another backup")]
    InProgress(PathBuf),
    /// The copy cannot be written there.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// SQLite could not read the database, or write the copy.
    #[error("the database could not be copied: {0}")]
    Sqlite(rusqlite::Error),
}

impl BackupError {
    /// Whether another attempt may succeed.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::InProgress(_) => true,
            Self::Sqlite(error) => {
                matches!(
                    error.sqlite_error_code(),
                    Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
                )
            }
            Self::Exists(_) | Self::Io { .. } => false,
        }
    }
}

/// The copy while it is written. Dropping it removes the file.
struct PartialBackup {
    path: PathBuf,
    file: File,
}

impl PartialBackup {
    /// Replaces the partial file of a killed backup.
    fn create(path: PathBuf) -> Result<Self, BackupError> {
        let failed = |source| BackupError::Io {
            path: path.clone(),
            source,
        };
        // For its owner only: it holds payments.
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(BackupError::InProgress(path)),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let part = Self { path, file };
        remove_backup_journal(&part.path);
        part.file.set_len(0).map_err(|source| BackupError::Io {
            path: part.path.clone(),
            source,
        })?;
        Ok(part)
    }

    /// Gives the copy its final name, durably.
    fn finish(self, to: &Path) -> Result<u64, BackupError> {
        let failed = |source| BackupError::Io {
            path: to.into(),
            source,
        };
        if to.exists() {
            return Err(BackupError::Exists(to.into()));
        }
        self.file.sync_all().map_err(failed)?;
        let bytes = self.file.metadata().map_err(failed)?.len();
        rename_finished_backup(&self.path, to).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => BackupError::Exists(to.into()),
            _ => failed(source),
        })?;
        files::sync_folder(backup_folder(to)).map_err(|source| {
            // Without this sync the name may be lost in a power failure.
            let _ = fs::remove_file(to);
            failed(source)
        })?;
        Ok(bytes)
    }
}

/// Renames a file, unless the name exists by now: another backup may have created it.
fn rename_finished_backup(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some file systems, NFS among them, cannot do that in one step. A hard link never replaces
        // a file either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        renamed => Ok(renamed?),
    }
}

impl Drop for PartialBackup {
    /// A copy with its final name has no file under this name.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        remove_backup_journal(&self.path);
    }
}

fn remove_backup_journal(path: &Path) {
    let _ = fs::remove_file(files::sibling_file(path, "-journal"));
}

fn backup_folder(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// The file of a copy until it is complete.
pub fn partial_backup_path(to: &Path) -> PathBuf {
    files::sibling_file(to, ".part")
}

/// Writes a copy of the database to the file `to`, and returns its size in bytes.
pub fn write_backup(
    database: &OfflineStore,
    to: &Path,
    now: Timestamp,
) -> Result<u64, BackupError> {
    if to.symlink_metadata().is_ok() {
        return Err(BackupError::Exists(to.into()));
    }
    let not_utf8 = || io::Error::other("the file's name is not UTF-8");
    let part = PartialBackup::create(partial_backup_path(to))?;
    let name = part.path.to_str().ok_or_else(|| BackupError::Io {
        path: to.into(),
        source: not_utf8(),
    })?;
    database
        .connection
        .execute("VACUUM INTO ?1", [name])
        .map_err(BackupError::Sqlite)?;
    mark_backup(&part.path, now).map_err(BackupError::Sqlite)?;
    part.finish(to)
}

/// Marks the copy as a copy.
fn mark_backup(copy: &Path, now: Timestamp) -> rusqlite::Result<()> {
    let connection = Connection::open(copy)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute("UPDATE node SET backed_up_at = ?1", [now.as_micros()])?;
    connection.close().map_err(|(_, error)| error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open;

    fn store_to_back_up(dir: &Path) -> OfflineStore {
        let path = dir.join("a.db");
        drop(open::open_database(&path, None).unwrap());
        OfflineStore::open(&path).unwrap()
    }

    fn names_of_backup_files(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_backup_is_one_file_that_is_marked_as_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let target = tempfile::tempdir().unwrap();
        let copy = target.path().join("copy.db");
        let bytes = write_backup(
            &store_to_back_up(dir.path()),
            &copy,
            Timestamp::from_micros(77),
        )
        .unwrap();
        assert_eq!(
            (
                names_of_backup_files(target.path()),
                copy.metadata().unwrap().len()
            ),
            (vec!["copy.db".to_owned()], bytes)
        );
        let connection = Connection::open(&copy).unwrap();
        let at: i64 = connection
            .query_row("SELECT backed_up_at FROM node", [], |row| row.get(0))
            .unwrap();
        let mode: String = connection
            .pragma_query_value(None, "journal_mode", |row| row.get(0))
            .unwrap();
        assert_eq!((at, mode.as_str()), (77, "delete"));
    }

    #[test]
    fn a_backup_does_not_replace_an_existing_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = tempfile::tempdir().unwrap();
        let copy = target.path().join("copy.db");
        let offline = store_to_back_up(dir.path());
        fs::write(&copy, "precious").unwrap();
        assert!(matches!(
            write_backup(&offline, &copy, Timestamp::now()),
            Err(BackupError::Exists(_))
        ));
        assert_eq!(
            (
                fs::read(&copy).unwrap().as_slice(),
                names_of_backup_files(target.path()).len()
            ),
            (b"precious".as_slice(), 1)
        );
    }

    #[test]
    fn a_backup_does_not_replace_a_file_that_appears_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("part");
        let to = dir.path().join("copy.db");
        fs::write(&part, "new").unwrap();
        fs::write(&to, "old").unwrap();
        let refused = rename_finished_backup(&part, &to).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(
            (fs::read(&part).unwrap(), fs::read(&to).unwrap()),
            (b"new".to_vec(), b"old".to_vec())
        );
        fs::remove_file(&to).unwrap();
        rename_finished_backup(&part, &to).unwrap();
        assert_eq!(
            (part.exists(), fs::read(&to).unwrap()),
            (false, b"new".to_vec())
        );
    }

    #[test]
    fn a_failed_backup_leaves_no_file_behind() {
        let dir = tempfile::tempdir().unwrap();
        let target = tempfile::tempdir().unwrap();
        let offline = store_to_back_up(dir.path());
        let nowhere = target.path().join("nowhere").join("copy.db");
        assert!(matches!(
            write_backup(&offline, &nowhere, Timestamp::now()),
            Err(BackupError::Io { .. })
        ));
        offline.connection.execute_batch("DROP TABLE node").unwrap();
        let copy = target.path().join("copy.db");
        assert!(matches!(
            write_backup(&offline, &copy, Timestamp::now()),
            Err(BackupError::Sqlite(_))
        ));
        assert_eq!(names_of_backup_files(target.path()), [""; 0]);
    }

    #[test]
    fn the_partial_file_of_a_killed_backup_is_replaced_and_that_of_a_running_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let target = tempfile::tempdir().unwrap();
        let copy = target.path().join("copy.db");
        let offline = store_to_back_up(dir.path());
        let part = target.path().join("copy.db.part");
        fs::write(&part, "half of a copy").unwrap();
        fs::write(
            target.path().join("copy.db.part-journal"),
            "half of a journal",
        )
        .unwrap();
        let held = File::open(&part).unwrap();
        held.lock().unwrap();
        let refused = write_backup(&offline, &copy, Timestamp::now()).unwrap_err();
        assert!(refused.is_temporary() && part.exists(), "{refused}");
        drop(held);
        write_backup(&offline, &copy, Timestamp::now()).unwrap();
        assert_eq!(names_of_backup_files(target.path()), ["copy.db"]);
    }
}
