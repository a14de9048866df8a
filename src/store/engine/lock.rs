//! The lock file: one process for each database.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::files::{PRIVATE, resolve_database_file, sibling_file};
use super::open_error::OpenError;

/// The lock. It is held while the database is open, and ends with the process, however that ends.
#[derive(Debug)]
pub(in crate::store) struct DatabaseLock {
    _file: File,
}

/// Locks a database, by the same file whichever of its paths is given. The lock has a file of its
/// own, because closing any descriptor of the database would drop SQLite's locks
/// (<https://sqlite.org/howtocorrupt.html>, 2.2).
pub(in crate::store) fn lock_database(database: &Path) -> Result<DatabaseLock, OpenError> {
    let path = sibling_file(&resolve_database_file(database)?, ".lock");
    let io_error = |source| OpenError::Io {
        path: path.clone(),
        source,
    };
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(PRIVATE)
        .open(&path)
        .map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(OpenError::Locked {
                path: database.into(),
                holder: lock_holder(&mut file),
            });
        }
        Err(TryLockError::Error(source)) => return Err(io_error(source)),
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io_error)?;
    Ok(DatabaseLock { _file: file })
}

fn lock_holder(file: &mut File) -> String {
    let mut id = String::new();
    let _ = file.read_to_string(&mut id);
    match id.trim() {
        "" => String::new(),
        id => format!(" (process {id})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::engine::open::open_database;

    #[test]
    fn a_second_lock_is_refused_whichever_way_the_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let held = lock_database(&path).unwrap();
        drop(open_database(&path, None).unwrap());
        let link = dir.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for name in [&path, &dir.path().join(".").join("a.db"), &link] {
            let refusal = lock_database(name).unwrap_err().to_string();
            assert!(
                refusal.contains(&format!("(process {})", std::process::id())),
                "{refusal}"
            );
        }
        drop(held);
        lock_database(&path).unwrap();
        assert!(matches!(
            lock_database(&dir.path().join("nowhere").join("a.db")),
            Err(OpenError::Io { .. })
        ));
    }
}
