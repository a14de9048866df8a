//! The local Unix socket: a process that can open it has admin access. Its mode decides who can.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// The longest path of a socket, in bytes: `sun_path` without its last zero (unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// The owner and the group, whatever the umask.
const MODE: u32 = 0o660;

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 16;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum LocalSocketError {
    /// The operating system has no longer ones.
    #[error(
        "the path has {0} bytes, and that of a socket at most {PATH_BYTES_MAX}: set a shorter one, \
            or \"off\""
    )]
    TooLong(usize),
    /// A file that is no socket is never replaced.
    #[error("there is a file that is no socket: set another path, or \"off\"")]
    NotASocket,
    /// A process serves this socket.
    #[error("another process listens there: set another path, or \"off\"")]
    InUse,
    /// The operating system refuses it.
    #[error("{0}: set another path, or \"off\"")]
    Io(#[from] io::Error),
}

/// Refuses a path that no socket can have.
pub fn check_local_socket_path(path: &Path) -> Result<(), LocalSocketError> {
    match path.as_os_str().len() {
        0..=PATH_BYTES_MAX => Ok(()),
        bytes => Err(LocalSocketError::TooLong(bytes)),
    }
}

/// A bound socket that does not listen yet. Dropping it removes its file.
#[derive(Debug)]
pub struct LocalSocket {
    socket: Socket,
    file: LocalSocketFile,
}

impl LocalSocket {
    /// Binds a path, and replaces the socket of a process that ended. The caller holds the lock of
    /// the database.
    pub fn bind(path: &Path) -> Result<Self, LocalSocketError> {
        check_local_socket_path(path)?;
        remove_stale_socket(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        let metadata = fs::symlink_metadata(path)?;
        let file = LocalSocketFile {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        // It does not listen yet, so no connection is accepted under the mode of the umask.
        fs::set_permissions(path, Permissions::from_mode(MODE))?;
        Ok(Self { socket, file })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// From now on the kernel accepts connections.
    pub fn listen(self) -> io::Result<LocalListener> {
        self.socket.listen(BACKLOG)?;
        self.socket.set_nonblocking(true)?;
        Ok(LocalListener {
            listener: OwnedFd::from(self.socket).into(),
            file: self.file,
        })
    }
}

/// A listening socket, and its file.
#[derive(Debug)]
pub struct LocalListener {
    listener: UnixListener,
    file: LocalSocketFile,
}

impl LocalListener {
    /// The socket, and the file that dropping the second removes.
    pub(super) fn into_parts(self) -> (UnixListener, LocalSocketFile) {
        (self.listener, self.file)
    }
}

/// Dropping it removes the file, unless another one has its path by now.
#[derive(Debug)]
pub(super) struct LocalSocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for LocalSocketFile {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == (self.device, self.inode));
        if is_ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the socket of a process that ended without removing it.
fn remove_stale_socket(path: &Path) -> Result<(), LocalSocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(file) if !file.file_type().is_socket() => return Err(LocalSocketError::NotASocket),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(_) => return Err(LocalSocketError::InUse),
    }
    Ok(fs::remove_file(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_socket_replaces_only_the_socket_of_an_ended_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        fs::write(&path, "a file").unwrap();
        let refused = LocalSocket::bind(&path).unwrap_err();
        assert!(matches!(refused, LocalSocketError::NotASocket), "{refused}");
        fs::remove_file(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        let served = LocalSocket::bind(&path).unwrap().listen().unwrap();
        let refused = LocalSocket::bind(&path).unwrap_err();
        assert!(matches!(refused, LocalSocketError::InUse), "{refused}");
        drop(served);
        assert!(!path.exists());
    }

    #[test]
    fn dropping_a_local_socket_leaves_the_file_of_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let first = LocalSocket::bind(&path).unwrap();
        fs::rename(&path, dir.path().join("moved.sock")).unwrap();
        let second = LocalSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn the_path_of_a_local_socket_has_at_most_107_bytes() {
        let path = |bytes| PathBuf::from("a".repeat(bytes));
        assert!(check_local_socket_path(&path(107)).is_ok());
        assert!(matches!(
            check_local_socket_path(&path(108)),
            Err(LocalSocketError::TooLong(108))
        ));
    }
}
