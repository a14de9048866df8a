//! The path of the local socket, and whether a process has the database open. Neither needs the
//! database itself.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::engine::files;
use super::engine::open_error::OpenError;
use crate::config::LocalSocket;

/// The path of the socket; `None`: there is none. Of a database behind a symbolic link it is next
/// to the file.
pub fn local_socket_path(
    socket: &LocalSocket,
    database: &Path,
) -> Result<Option<PathBuf>, OpenError> {
    match socket {
        LocalSocket::Off => Ok(None),
        LocalSocket::At(path) => Ok(Some(path.clone())),
        LocalSocket::NextToDatabase => {
            let file = files::resolve_database_file(database)?;
            Ok(Some(files::sibling_file(&file, ".sock")))
        }
    }
}

/// The process that holds the lock of a database, as the lock's file names it; `None`: no process
/// holds it. It acquires no lock: a payrelay that starts meanwhile would be refused.
pub fn database_lock_holder(database: &Path) -> io::Result<Option<String>> {
    let not_found = |error: &OpenError| io::Error::other(error.to_string());
    let file = files::resolve_database_file(database).map_err(|error| not_found(&error))?;
    let path = files::sibling_file(&file, ".lock");
    let inode = match fs::metadata(&path) {
        Ok(metadata) => metadata.ino(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // The format is in proc(5): "1: FLOCK  ADVISORY  WRITE 812 08:01:1234 0 EOF".
    let locks = fs::read_to_string("/proc/locks")?;
    let suffix = format!(":{inode}");
    let is_held = locks.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.get(1) == Some(&"FLOCK") && words.iter().any(|word| word.ends_with(&suffix))
    });
    if !is_held {
        return Ok(None);
    }
    let id = fs::read_to_string(&path).unwrap_or_default();
    Ok(Some(id.trim().to_owned()))
}
