//! The WAL at the start: whether it belongs to the file, and whether it is on the disk.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use super::files::{sibling_file, sync_folder};
use super::open_error::{OpenError, open_error};
use crate::domain::node_id::NodeId;

/// Refuses a WAL without its database. SQLite creates the WAL after the file is on the disk, and
/// deletes a WAL that it finds next to an empty file (<https://sqlite.org/walformat.html>).
pub(super) fn reject_wal_without_database(path: &Path) -> Result<(), OpenError> {
    let length = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
    let whole = fs::canonicalize(path).unwrap_or(path.into());
    if length(&whole) == 0 && length(&sibling_file(&whole, "-wal")) > 0 {
        return Err(OpenError::WalWithoutDatabase { path: path.into() });
    }
    Ok(())
}

/// Refuses the WAL of a database that a backup replaces: SQLite would use it, and mix the two. A
/// backup never had a WAL, and its header says so (<https://sqlite.org/fileformat2.html>, 1.3.3).
/// Call it before SQLite opens the file.
pub(super) fn reject_foreign_wal(path: &Path) -> Result<(), OpenError> {
    const WITHOUT_WAL: [u8; 2] = [1, 1];
    let mut header = [0; 20];
    let whole = fs::canonicalize(path).unwrap_or(path.into());
    let read = File::open(&whole).and_then(|mut file| file.read_exact(&mut header));
    let wal = sibling_file(&whole, "-wal");
    let is_foreign = read.is_ok()
        && header[18..] == WITHOUT_WAL
        && wal.metadata().is_ok_and(|wal| wal.len() > 0);
    if is_foreign {
        Err(OpenError::ForeignWal {
            path: path.into(),
            wal,
        })
    } else {
        Ok(())
    }
}

/// The node id in the file alone, without its WAL, if it can be read: SQLite uses any WAL that is
/// next to the file.
pub(super) fn node_id_without_wal(path: &Path) -> Option<String> {
    let whole = fs::canonicalize(path).ok()?;
    let name = whole
        .to_str()
        .filter(|_| sibling_file(&whole, "-wal").exists())?;
    let escaped = name
        .replace('%', "%25")
        .replace('?', "%3f")
        .replace('#', "%23");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let connection =
        Connection::open_with_flags(format!("file:{escaped}?immutable=1"), flags).ok()?;
    connection
        .query_row("SELECT id FROM node", [], |row| row.get(0))
        .ok()
}

/// Refuses a WAL that belongs to another node's database. `without_wal` is the node id in the file
/// alone, and `node` the one that SQLite reads with the WAL.
pub(super) fn reject_wal_of_another_node(
    path: &Path,
    without_wal: Option<String>,
    node: &NodeId,
) -> Result<(), OpenError> {
    if without_wal.is_some_and(|id| id != node.as_str()) {
        return Err(OpenError::Inconsistent {
            path: path.into(),
            what: "its WAL belongs to another node's database",
        });
    }
    Ok(())
}

/// Whether the last connection to close checkpoints the WAL into the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CheckpointOnClose {
    Yes,
    No,
}

pub(super) fn set_wal_checkpoint_on_close(
    connection: &Connection,
    checkpoint: CheckpointOnClose,
) -> rusqlite::Result<()> {
    let config = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
    connection
        .set_db_config(config, checkpoint == CheckpointOnClose::No)
        .map(drop)
}

/// Makes sure that the WAL is on the disk, before anything is built on it.
///
/// Pages that the last process could not sync are still visible to every reader of the file. They
/// count as written: Linux reports a failed write-back once (<https://lwn.net/Articles/752063/>).
/// SQLite would append to them. After a power failure it would find the WAL broken there, and lose
/// every transaction after that place, though it was acknowledged. So the WAL is written once more,
/// as it is; if it cannot be synced, nothing is acknowledged. The folder is synced as well, because
/// SQLite does not report whether its own sync of the folder failed.
pub(super) fn rewrite_and_sync_wal(
    connection: &mut Connection,
    path: &Path,
) -> Result<(), OpenError> {
    // No other process writes the WAL meanwhile. Its file exists once SQLite has looked for it.
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)
        .map_err(|source| open_error(path, source))?;
    rewrite_wal(path).map_err(|source| OpenError::WalNotSynced {
        path: path.into(),
        source,
    })?;
    drop(tx);
    Ok(())
}

fn rewrite_wal(path: &Path) -> io::Result<()> {
    let whole = fs::canonicalize(path)?;
    let wal = File::options()
        .read(true)
        .write(true)
        .open(sibling_file(&whole, "-wal"))?;
    let mut chunk = vec![0; 1024 * 1024];
    let mut at = 0;
    loop {
        let length = wal.read_at(&mut chunk, at)?;
        if length == 0 {
            break;
        }
        wal.write_all_at(&chunk[..length], at)?;
        at += length as u64;
    }
    wal.sync_all()?;
    sync_folder(whole.parent().unwrap_or(Path::new("/")))
}
