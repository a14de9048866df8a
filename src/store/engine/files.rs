//! The files of a database: their paths, their mode, and the sync of their folder.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::open_error::OpenError;

/// A new file is for its owner only, whatever the umask: it holds payments. SQLite gives the WAL
/// and its index the mode of the database (<https://sqlite.org/wal.html>).
pub(super) const PRIVATE: u32 = 0o600;

/// The absolute path of a database after all symbolic links, also if their target does not exist
/// yet.
pub(in crate::store) fn resolve_database_file(database: &Path) -> Result<PathBuf, OpenError> {
    follow_links_to_file(database).map_err(|source| OpenError::Io {
        path: database.into(),
        source,
    })
}

fn follow_links_to_file(database: &Path) -> io::Result<PathBuf> {
    /// As many as Linux follows (<https://man7.org/linux/man-pages/man7/path_resolution.7.html>).
    const LINKS_MAX: usize = 40;
    let mut path = database.to_owned();
    for _ in 0..LINKS_MAX {
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let folder = fs::canonicalize(folder)?;
        let name = path
            .file_name()
            .ok_or_else(|| io::Error::other("it must be a file"))?;
        let whole = folder.join(name);
        match fs::read_link(&whole) {
            Ok(target) => path = folder.join(target),
            Err(_) if whole.is_dir() => {
                return Err(io::Error::other("this is a folder; it must be a file"));
            }
            Err(_) => return Ok(whole),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

/// A file next to a database, such as its WAL.
pub(in crate::store) fn sibling_file(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// What the names of a database's files end in: the file itself, its WAL, its shared memory.
pub(in crate::store) const SUFFIXES: [&str; 3] = ["", "-wal", "-shm"];

/// Deletes the files of a database that nothing uses. What cannot be deleted stays.
pub(in crate::store) fn remove_database_files(database: &Path) {
    for suffix in SUFFIXES {
        let _ = fs::remove_file(sibling_file(database, suffix));
    }
}

/// Creates an empty file for SQLite, which would give it the mode that the umask leaves.
pub(super) fn create_private_file(path: &Path) -> Result<(), OpenError> {
    match File::options()
        .write(true)
        .create_new(true)
        .mode(PRIVATE)
        .open(path)
    {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(OpenError::Io {
            path: path.into(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Syncs a folder. Some file systems do not support that; then there is nothing to wait for.
pub(in crate::store) fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        synced => synced,
    }
}
