//! Opening the file: the lock, the pragmas, the schema's version, the node's id.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rusqlite::config::DbConfig;
use rusqlite::{
    Connection, ErrorCode, MAIN_DB, OpenFlags, OptionalExtension, Transaction, TransactionBehavior,
    ffi,
};

use super::{BUSY_TIMEOUT, STATEMENTS};
use crate::domain::event::NodeId;
use crate::domain::timestamp::Timestamp;
use crate::store::error::is_full;

/// What an empty file gets.
const SCHEMA: &str = include_str!("../../../schema.sql");

/// The version that [`SCHEMA`] makes. Until 0.2.0 a change raises it, and a file of an earlier
/// version is refused.
const VERSION: usize = 2;

/// Marks the file as ours (<https://sqlite.org/pragma.html#pragma_application_id>): "prly".
const APPLICATION_ID: i32 = 0x7072_6c79;

/// Why a database cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error(
        "database.path {path}: in use by another payrelay{holder}; one process a database: stop \
            that one, or set another path"
    )]
    Locked {
        /// The database.
        path: PathBuf,
        /// Its process id, where the lock file tells.
        holder: String,
    },
    /// The folder or a file cannot be used.
    #[error(
        "database.path {path}: {source}; {}",
        io_advice(source, "the folder must exist and be writable")
    )]
    Io {
        /// The file that failed.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// The disk does not keep what it is given.
    #[error(
        "database.path {path}: its log cannot be written to the disk: {source}; {}",
        io_advice(source, FAILS)
    )]
    Unsynced {
        /// The database.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// SQLite cannot use the file.
    #[error("database.path {path}: {source}; {advice}")]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// How.
        source: rusqlite::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The log of a database that is not there: SQLite would delete it, and begin anew.
    #[error(
        "database.path {path}: the file is missing or empty, but its log beside it ({path}-wal) \
            is not: put the file back or restore a backup; to begin anew, move the log away"
    )]
    Headless {
        /// The database.
        path: PathBuf,
    },
    /// Sound as a file, and yet not what one payrelay has written.
    #[error(
        "database.path {path}: {what}; perhaps its log (-wal) is another file's: put the right \
            one back, or restore a backup (docs/machine.md)"
    )]
    Inconsistent {
        /// The database.
        path: PathBuf,
        /// What does not agree.
        what: &'static str,
    },
    /// Some other program's file.
    #[error("database.path {0}: this SQLite file was not made by payrelay; set another path")]
    NotOurs(PathBuf),
    /// Made by a later version.
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
    /// Made by an earlier version, before the first release.
    #[error(
        "database.path {path}: its schema is version {found}, this payrelay needs {known}; the \
            format changed before the first release: set another path, or open this file with the \
            payrelay that made it"
    )]
    Older {
        /// The database.
        path: PathBuf,
        /// The version in the file.
        found: usize,
        /// The newest version known here.
        known: usize,
    },
    /// The log of another database would be taken for this one's.
    #[error(
        "database.path {path}: {log} is the log of another database, perhaps of the one that this \
            copy replaces; remove it and the file beside it that ends in -shm"
    )]
    StrayLog {
        /// The database.
        path: PathBuf,
        /// The log.
        log: PathBuf,
    },
    /// The configured id is not the one that the events in the file were published under.
    #[error(
        "node.id {configured}: the database belongs to node {stored}, which cannot change; set \
            node.id to it, or to nothing"
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
    /// Whether it may pass by itself: another process has the database.
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

/// Held for as long as the database is open. The lock ends with the process, however that ends.
#[derive(Debug)]
pub(in crate::store) struct Lock {
    _file: File,
}

/// Takes the lock file beside the database. It is a file of its own because closing any descriptor
/// of the database file would drop SQLite's own locks (<https://sqlite.org/howtocorrupt.html>,
/// 2.2).
pub(in crate::store) fn lock(database: &Path) -> Result<Lock, OpenError> {
    let path = lock_path(database).map_err(|source| OpenError::Io {
        path: database.into(),
        source,
    })?;
    let failed = |source| OpenError::Io {
        path: path.clone(),
        source,
    };
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(PRIVATE);
    let mut file = options.open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let holder = if pid.trim().is_empty() {
                String::new()
            } else {
                format!(" (process {})", pid.trim())
            };
            return Err(OpenError::Locked {
                path: database.into(),
                holder,
            });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(failed)?;
    Ok(Lock { _file: file })
}

/// The same lock file whichever way the database is named.
fn lock_path(database: &Path) -> io::Result<PathBuf> {
    Ok(beside(&resolve(database)?, ".lock"))
}

/// A new file is for its owner only, whatever the umask: it holds payments. SQLite gives the WAL
/// and its index the mode of the database (<https://sqlite.org/wal.html>).
const PRIVATE: u32 = 0o600;

/// The absolute path of a database behind all symbolic links, also where the file that they lead to
/// is not there yet.
pub(in crate::store) fn resolve(database: &Path) -> io::Result<PathBuf> {
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

/// As [`resolve`], with what to do where that fails.
pub(in crate::store) fn resolved(database: &Path) -> Result<PathBuf, OpenError> {
    resolve(database).map_err(|source| OpenError::Io {
        path: database.into(),
        source,
    })
}

/// Creates an empty file for SQLite, which would give it the mode that the umask leaves.
fn create_private(path: &Path) -> Result<(), OpenError> {
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

/// Opens the file for writing, brings its schema up to date, and tells whose it is.
pub(in crate::store) fn open(
    path: &Path,
    configured: Option<&NodeId>,
) -> Result<(Connection, NodeId), OpenError> {
    let failed = |source| refusal(path, source);
    refuse_without_head(path)?;
    refuse_stray_log(path)?;
    let before_log = node_before_log(path);
    create_private(path)?;
    let mut connection = Connection::open(path).map_err(failed)?;
    if connection.is_readonly(MAIN_DB).map_err(failed)? {
        // SQLite falls back to reading, and even begins a transaction.
        return Err(failed(rusqlite::Error::SqliteFailure(
            ffi::Error::new(ffi::SQLITE_READONLY),
            None,
        )));
    }
    // A file that is refused stays as it is, and so does its log.
    keep_log(&connection, KeepLog::Yes).map_err(failed)?;
    let version = version(&connection, path)?;
    set_pragmas(&connection).map_err(failed)?;
    settle(&mut connection, path)?;
    if version == 0 {
        create_schema(&mut connection).map_err(failed)?;
    }
    if let Some(what) = disagreement(&connection).map_err(failed)? {
        return Err(OpenError::Inconsistent {
            path: path.into(),
            what,
        });
    }
    let stored = node_id(&mut connection, configured).map_err(failed)?;
    if before_log.is_some_and(|node| node != stored.as_str()) {
        return Err(OpenError::Inconsistent {
            path: path.into(),
            what: "its log belongs to another node's database",
        });
    }
    keep_log(&connection, KeepLog::No).map_err(failed)?;
    match configured {
        Some(configured) if *configured != stored => Err(OpenError::OtherNode {
            configured: configured.clone(),
            stored,
        }),
        _ => {
            leave_backup(&mut connection).map_err(failed)?;
            Ok((connection, stored))
        }
    }
}

/// A backup never had a log, and says so in its header (<https://sqlite.org/fileformat2.html>,
/// 1.3.3). SQLite would take the one of the database that it replaces for its own, and mix the two.
/// To be called before SQLite has the file open.
fn refuse_stray_log(path: &Path) -> Result<(), OpenError> {
    const WITHOUT_LOG: [u8; 2] = [1, 1];
    let mut header = [0; 20];
    let whole = fs::canonicalize(path).unwrap_or(path.into());
    let read = File::open(&whole).and_then(|mut file| file.read_exact(&mut header));
    let log = beside(&whole, "-wal");
    let stray = read.is_ok()
        && header[18..] == WITHOUT_LOG
        && log.metadata().is_ok_and(|log| log.len() > 0);
    if stray {
        Err(OpenError::StrayLog {
            path: path.into(),
            log,
        })
    } else {
        Ok(())
    }
}

/// Ids jump to microseconds since 1970: so a database that is put back twice, from the same backup,
/// does not give what the first one gave, unless it gave a million a second. And at least to the
/// next multiple of this, should the clock be wrong.
const ID_RANGE: i64 = 1_000_000_000_000;

/// Ids beyond what a double holds exactly (RFC 8259, 6) are nobody's.
const ID_MAX: i64 = (1 << 53) - 1;

/// Those whose ids are seen outside. Idempotency keys are not, and have ids without gaps, so that
/// they can be counted.
const OUTSIDE: [&str; 4] = ["payment", "outbox", "dead_letter", "dead_letter_action"];

/// No id up to `newest`, nor any that may have been given until now, is given any more. Tells the
/// first that will be.
pub(in crate::store) fn skip_ids(
    tx: &Transaction<'_>,
    newest: i64,
    now: Timestamp,
) -> rusqlite::Result<i64> {
    let given: i64 = tx.query_row(
        "SELECT ifnull(max(seq), 0) FROM sqlite_sequence",
        [],
        |row| row.get(0),
    )?;
    let newest = if newest > ID_MAX { 0 } else { newest };
    let last = ((newest.max(given) / ID_RANGE + 1) * ID_RANGE).max(now.as_micros());
    for table in OUTSIDE {
        tx.execute("DELETE FROM sqlite_sequence WHERE name = ?1", [table])?;
        tx.execute(
            "INSERT INTO sqlite_sequence (name, seq) VALUES (?1, ?2)",
            (table, last),
        )?;
    }
    Ok(last + 1)
}

/// A backup that is put to work lacks what was stored after it, but others know those ids: the
/// topic, clients, Slack. All ids jump ahead of them, once.
fn leave_backup(connection: &mut Connection) -> rusqlite::Result<()> {
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    let (backed_up_at, given): (Option<i64>, Option<i64>) =
        tx.query_row("SELECT backed_up_at, given_before FROM node", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    let Some(backed_up_at) = backed_up_at else {
        return Ok(());
    };
    let now = Timestamp::now();
    let last = "SELECT ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'payment'), 0), \
                ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0)";
    let (payment, event): (i64, i64) =
        tx.query_row(last, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let first = skip_ids(&tx, given.unwrap_or(0), now)?;
    tx.execute(
        "INSERT INTO restored_copy \
             (copied_at, started_at, restored_by, last_payment_id, last_outbox_id, first_new_id) \
         SELECT ?1, ?2, restored_by, ?3, ?4, ?5 FROM node",
        (backed_up_at, now.as_micros(), payment, event, first),
    )?;
    tx.execute(
        "UPDATE node SET backed_up_at = NULL, restored_by = NULL, given_before = NULL",
        [],
    )?;
    tx.commit()?;
    log::warn!(
        "this database is a backup of {}: what was stored since is not in it. New ids begin at \
            {first}, so that none that was given since is used again; `payrelay audit` tells \
            which events of the topic are missing here",
        Timestamp::from_micros(backed_up_at)
    );
    Ok(())
}

/// Opens a database that some payrelay has made, which may be running. Creates nothing.
pub(in crate::store) fn open_beside(path: &Path) -> Result<(Connection, NodeId), OpenError> {
    let failed = |source| refusal(path, source);
    let (connection, node) = open_made(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection
        .pragma_update(None, "synchronous", "FULL")
        .map_err(failed)?;
    connection
        .pragma_update(None, "foreign_keys", true)
        .map_err(failed)?;
    // The log is for a payrelay to copy back: one that runs, or the next one.
    connection
        .pragma_update(None, "wal_autocheckpoint", 0)
        .map_err(failed)?;
    Ok((connection, node))
}

/// As [`open_beside`], and the file stays as it is.
pub(in crate::store) fn open_to_read(path: &Path) -> Result<(Connection, NodeId), OpenError> {
    open_made(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
}

fn open_made(path: &Path, flags: OpenFlags) -> Result<(Connection, NodeId), OpenError> {
    let failed = |source| refusal(path, source);
    // As the payrelay that serves it: these would cost the log, too.
    refuse_without_head(path)?;
    refuse_stray_log(path)?;
    let before_log = node_before_log(path);
    let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(failed)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    keep_log(&connection, KeepLog::Yes).map_err(failed)?;
    if version(&connection, path)? == 0 {
        return Err(OpenError::NotOurs(path.into()));
    }
    let node: String = connection
        .query_row("SELECT id FROM node", [], |row| row.get(0))
        .map_err(failed)?;
    let node = NodeId::parse(&node).ok_or_else(|| OpenError::NotOurs(path.into()))?;
    if before_log.is_some_and(|before| before != node.as_str()) {
        return Err(OpenError::Inconsistent {
            path: path.into(),
            what: "its log belongs to another node's database",
        });
    }
    Ok((connection, node))
}

/// The version of a file that this payrelay can use; 0 is an empty file.
fn version(connection: &Connection, path: &Path) -> Result<usize, OpenError> {
    let known = VERSION;
    match inspect(connection).map_err(|source| refusal(path, source))? {
        Found::NotOurs => Err(OpenError::NotOurs(path.into())),
        Found::Version(found) if found > known => Err(OpenError::Newer {
            path: path.into(),
            found,
            known,
        }),
        Found::Version(found) if found != 0 && found < known => Err(OpenError::Older {
            path: path.into(),
            found,
            known,
        }),
        Found::Version(found) => Ok(found),
    }
}

const MAKE_ROOM: &str = "make room on the disk";

const FAILS: &str = "the disk or its file system fails: see the kernel's log";

/// What to do about what the system says: make room, if it is that.
fn io_advice(error: &io::Error, otherwise: &'static str) -> &'static str {
    if error.kind() == io::ErrorKind::StorageFull {
        MAKE_ROOM
    } else {
        otherwise
    }
}

/// What SQLite says, with what to do about it.
pub(in crate::store) fn refusal(path: &Path, source: rusqlite::Error) -> OpenError {
    let advice = match source.sqlite_error_code() {
        _ if is_full(&source) => MAKE_ROOM,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            "the file is damaged, or no database: restore a backup or set another path \
                (docs/machine.md)"
        }
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            "it must be a file, and it and its folder must exist and be writable"
        }
        Some(ErrorCode::SystemIoFailure) => FAILS,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "another program has it: stop that"
        }
        _ => "restore a backup or set another path (docs/machine.md)",
    };
    OpenError::Sqlite {
        path: path.into(),
        source,
        advice,
    }
}

/// What stands beside a database.
pub(in crate::store) fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// SQLite makes the log after the file is on the disk, and deletes a log that it finds beside an
/// empty one (<https://sqlite.org/walformat.html>).
fn refuse_without_head(path: &Path) -> Result<(), OpenError> {
    let length = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
    let whole = fs::canonicalize(path).unwrap_or(path.into());
    if length(&whole) == 0 && length(&beside(&whole, "-wal")) > 0 {
        return Err(OpenError::Headless { path: path.into() });
    }
    Ok(())
}

/// Whose the file is without its log, where that can be told: SQLite takes any log that is beside
/// it for its own.
fn node_before_log(path: &Path) -> Option<String> {
    let whole = fs::canonicalize(path).ok()?;
    let name = whole.to_str().filter(|_| beside(&whole, "-wal").exists())?;
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

#[derive(Clone, Copy)]
enum KeepLog {
    Yes,
    No,
}

/// Whether the last connection to close leaves the log, instead of copying it into the file.
fn keep_log(connection: &Connection, keep: KeepLog) -> rusqlite::Result<()> {
    connection
        .set_db_config(
            DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE,
            matches!(keep, KeepLog::Yes),
        )
        .map(drop)
}

/// Has the log on the disk before anything is built on it.
///
/// What the last process could not sync is still seen by whoever reads the file, and counts as
/// written: Linux tells of it once (<https://lwn.net/Articles/752063/>). SQLite would go on behind
/// it, and after a power failure find its log broken there, with all that was acknowledged since
/// beyond the break. So the log is written once more, as it is; if that cannot be synced, nothing
/// is acknowledged. The folder is synced as well, of which SQLite does not say whether it could be.
fn settle(connection: &mut Connection, path: &Path) -> Result<(), OpenError> {
    // Nobody else writes the log meanwhile. Its file is there as soon as it was looked for.
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)
        .map_err(|source| refusal(path, source))?;
    let rewrite = || {
        let whole = fs::canonicalize(path)?;
        let log = File::options()
            .read(true)
            .write(true)
            .open(beside(&whole, "-wal"))?;
        let (mut chunk, mut at) = (vec![0; 1024 * 1024], 0);
        loop {
            let length = log.read_at(&mut chunk, at)?;
            if length == 0 {
                break;
            }
            log.write_all_at(&chunk[..length], at)?;
            at += length as u64;
        }
        log.sync_all()?;
        sync_folder(whole.parent().unwrap_or(Path::new("/")))
    };
    rewrite().map_err(|source| OpenError::Unsynced {
        path: path.into(),
        source,
    })?;
    drop(tx);
    Ok(())
}

/// Some file systems know no such thing; then there is nothing to wait for.
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

/// What the ends of the tables say of each other. It costs nothing, and finds most logs of other
/// databases; that the file as a whole is sound is not looked for at each start.
fn disagreement(connection: &Connection) -> rusqlite::Result<Option<&'static str>> {
    let number = |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    let payment = number("SELECT coalesce(max(id), 0) FROM payment")?;
    let given = number("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'payment'")?;
    let history = number("SELECT coalesce(max(payment_id), 0) FROM payment_history")?;
    let outbox = number("SELECT coalesce(max(payment_id), 0) FROM outbox")?;
    Ok(if given < payment {
        Some("its payments have ids that were never given")
    } else if history != payment {
        Some("its last payment and the end of the history are not the same")
    } else if outbox > payment {
        Some("it has events of payments that it does not have")
    } else {
        None
    })
}

enum Found {
    /// 0: an empty file.
    Version(usize),
    NotOurs,
}

fn inspect(connection: &Connection) -> rusqlite::Result<Found> {
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let version = usize::try_from(number("user_version")?);
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    Ok(match (number("application_id")?, tables, version) {
        (0, 0, Ok(0)) => Found::Version(0),
        (id, _, Ok(version)) if id == i64::from(APPLICATION_ID) && version > 0 => {
            Found::Version(version)
        }
        _ => Found::NotOurs,
    })
}

fn set_pragmas(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    // Readers go on while the writer commits; a commit is one sequential write and one fsync.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // NORMAL would lose the last commits with the power
    // (https://sqlite.org/pragma.html#pragma_synchronous).
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // A log that has grown while somebody read old pages is cut back to 64 MiB when it begins anew.
    connection.pragma_update(None, "journal_size_limit", 64 * 1024 * 1024)?;
    // 16 MiB of pages: the right edges of all tables and indexes under load.
    connection.pragma_update(None, "cache_size", -16_384)
}

/// Gives an empty file the schema.
fn create_schema(connection: &mut Connection) -> rusqlite::Result<()> {
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    tx.execute_batch(SCHEMA)?;
    tx.pragma_update(None, "application_id", APPLICATION_ID)?;
    tx.execute_batch(&format!("PRAGMA user_version = {VERSION}"))?;
    tx.commit()?;
    log::info!("created the database's schema, version {VERSION}");
    Ok(())
}

/// The stored id, made at the first start.
fn node_id(connection: &mut Connection, configured: Option<&NodeId>) -> rusqlite::Result<NodeId> {
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    let stored: Option<String> = tx
        .query_row("SELECT id FROM node", [], |row| row.get(0))
        .optional()?;
    let id = match (stored, configured) {
        (Some(id), _) => id,
        (None, configured) => {
            let random = || {
                tx.query_row("SELECT 'n' || lower(hex(randomblob(6)))", [], |row| {
                    row.get(0)
                })
            };
            let id: String = configured.map_or_else(random, |id| Ok(id.as_str().to_owned()))?;
            tx.execute(
                "INSERT INTO node (id, created_at) VALUES (?1, ?2)",
                (&id, Timestamp::now().as_micros()),
            )?;
            id
        }
    };
    tx.commit()?;
    NodeId::parse(&id).ok_or_else(|| {
        rusqlite::Error::FromSqlConversionFailure(
            0,
            rusqlite::types::Type::Text,
            "not a node id".into(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_gets_the_schema_and_an_id_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let (connection, first) = open(&path, None).unwrap();
        let pragma = |name| {
            connection
                .pragma_query_value(None, name, |row| row.get::<_, i64>(0))
                .unwrap()
        };
        assert_eq!(pragma("user_version"), 2);
        assert_eq!(pragma("synchronous"), 2, "2 is FULL");
        assert_eq!(pragma("foreign_keys"), 1);
        let mode: String = connection
            .pragma_query_value(None, "journal_mode", |row| row.get(0))
            .unwrap();
        assert_eq!(mode, "wal");
        drop(connection);
        assert_eq!(open(&path, None).unwrap().1, first);
        assert_eq!(open(&path, Some(&first)).unwrap().1, first);
        let other = NodeId::parse("other").unwrap();
        assert!(matches!(
            open(&path, Some(&other)),
            Err(OpenError::OtherNode { .. })
        ));
    }

    #[test]
    fn a_backup_jumps_ahead_of_every_id_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let (connection, node) = open(&path, None).unwrap();
        let pay = "INSERT INTO payment (user_id, reservation_id, amount, currency, status, executed_at) \
            VALUES (1, ?1, 1, 'KRW', 'COMPLETED', 1) RETURNING id";
        let history =
            "INSERT INTO payment_history (payment_id, user_id, recorded_at) VALUES (?1, 1, 1)";
        let id = |connection: &Connection, reservation: i64| -> i64 {
            let id = connection
                .query_row(pay, [reservation], |row| row.get(0))
                .unwrap();
            connection.execute(history, [id]).unwrap();
            id
        };
        assert_eq!(id(&connection, 1), 1);
        connection
            .execute("UPDATE node SET backed_up_at = 5", [])
            .unwrap();
        drop(connection);
        let (connection, again) = open(&path, None).unwrap();
        let jumped = id(&connection, 2);
        assert!(
            jumped > ID_RANGE && jumped <= ID_MAX && again == node,
            "{jumped}"
        );
        drop(connection);
        let (connection, _) = open(&path, None).unwrap();
        assert_eq!(id(&connection, 3), jumped + 1, "only once");
        connection
            .execute("UPDATE node SET backed_up_at = 5", [])
            .unwrap();
        drop(connection);
        let farther = id(&open(&path, None).unwrap().0, 4);
        assert!(farther > jumped + 1, "{farther}");
        let sequences: i64 = Connection::open(&path)
            .unwrap()
            .query_row(
                "SELECT count(*) FROM sqlite_sequence WHERE seq >= ?1",
                [farther - 1],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(sequences, 4, "also of tables that were empty");
    }

    #[test]
    fn every_id_that_is_seen_outside_jumps() {
        let dir = tempfile::tempdir().unwrap();
        let (connection, _) = open(&dir.path().join("a.db"), None).unwrap();
        let sql = "SELECT name FROM sqlite_schema WHERE sql LIKE '%AUTOINCREMENT%' \
            AND name NOT IN ('idempotency_key', 'channel_action')";
        let mut statement = connection.prepare(sql).unwrap();
        let mut tables: Vec<String> = statement
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        tables.sort_by_key(|table| OUTSIDE.iter().position(|name| name == table));
        assert_eq!(tables, OUTSIDE);
    }

    #[test]
    fn the_log_of_another_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("a.db"), dir.path().join("copy.db"));
        let (connection, _) = open(&path, None).unwrap();
        connection
            .execute("VACUUM INTO ?1", [copy.to_str().unwrap()])
            .unwrap();
        let log = dir.path().join("copy.db-wal");
        fs::copy(dir.path().join("a.db-wal"), &log).unwrap();
        let before = fs::read(&copy).unwrap();
        let refusal = open(&copy, None).unwrap_err();
        assert!(matches!(refusal, OpenError::StrayLog { .. }), "{refusal}");
        assert_eq!(fs::read(&copy).unwrap(), before);
        fs::remove_file(log).unwrap();
        open(&copy, None).unwrap();
        // A log of its own is read, however the process ended.
        drop(connection);
        open(&path, None).unwrap();
    }

    #[test]
    fn a_configured_id_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let id = NodeId::parse("till-3").unwrap();
        assert_eq!(open(&path, Some(&id)).unwrap().1, id);
        assert_eq!(open(&path, None).unwrap().1, id);
    }

    #[test]
    fn what_is_not_ours_is_refused_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = dir.path().join("foreign.db");
        Connection::open(&foreign)
            .unwrap()
            .execute_batch("CREATE TABLE theirs (x)")
            .unwrap();
        let before = fs::read(&foreign).unwrap();
        assert!(matches!(open(&foreign, None), Err(OpenError::NotOurs(_))));
        assert_eq!(fs::read(&foreign).unwrap(), before);

        let text = dir.path().join("text.db");
        fs::write(
            &text,
            "this is no database, and it is longer than a header of one hundred bytes, so that \
                SQLite reads it",
        )
        .unwrap();
        assert!(matches!(open(&text, None), Err(OpenError::Sqlite { .. })));

        let newer = dir.path().join("newer.db");
        drop(open(&newer, None).unwrap());
        Connection::open(&newer)
            .unwrap()
            .pragma_update(None, "user_version", 99)
            .unwrap();
        assert!(matches!(
            open(&newer, None),
            Err(OpenError::Newer { found: 99, .. })
        ));

        let older = dir.path().join("older.db");
        drop(open(&older, None).unwrap());
        Connection::open(&older)
            .unwrap()
            .pragma_update(None, "user_version", 1)
            .unwrap();
        assert!(matches!(
            open(&older, None),
            Err(OpenError::Older { found: 1, .. })
        ));
    }

    #[test]
    fn a_log_without_its_file_and_the_log_of_another_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours.db"), dir.path().join("theirs.db"));
        drop(open(&ours, None).unwrap());
        let (open_still, _) = open(&theirs, None).unwrap();
        let before = fs::read(&ours).unwrap();
        fs::copy(beside(&theirs, "-wal"), beside(&ours, "-wal")).unwrap();
        assert!(matches!(
            open(&ours, None),
            Err(OpenError::Inconsistent { .. })
        ));
        assert_eq!(fs::read(&ours).unwrap(), before);
        fs::write(&ours, "").unwrap();
        assert!(matches!(open(&ours, None), Err(OpenError::Headless { .. })));
        fs::remove_file(beside(&ours, "-wal")).unwrap();
        open(&ours, None).unwrap();
        drop(open_still);
    }

    #[test]
    fn a_full_disk_is_told_as_one_whatever_it_is_met_by() {
        let path = Path::new("a.db");
        let sqlite = |code| {
            refusal(
                path,
                rusqlite::Error::SqliteFailure(ffi::Error::new(code), None),
            )
            .to_string()
        };
        let io = |code| {
            OpenError::Io {
                path: path.into(),
                source: io::Error::from_raw_os_error(code),
            }
            .to_string()
        };
        let sync = |code| {
            OpenError::Unsynced {
                path: path.into(),
                source: io::Error::from_raw_os_error(code),
            }
            .to_string()
        };
        let (enospc, eio) = (28, 5);
        for full in [
            sqlite(ffi::SQLITE_FULL),
            sqlite(ffi::SQLITE_IOERR_SHMSIZE),
            io(enospc),
            sync(enospc),
        ] {
            assert!(full.ends_with("; make room on the disk"), "{full}");
        }
        for broken in [sqlite(ffi::SQLITE_IOERR_WRITE), sync(eio)] {
            assert!(broken.ends_with("see the kernel's log"), "{broken}");
        }
        assert!(io(eio).ends_with("the folder must exist and be writable"));
    }

    #[test]
    fn tables_whose_ends_do_not_agree_are_refused() {
        let wrong = [
            "INSERT INTO payment_history (payment_id, user_id, recorded_at) VALUES (1, 1, 1)",
            "INSERT INTO outbox (payment_id, user_id, type, created_at) \
                VALUES (1, 1, 'payment.completed', 1)",
            "INSERT INTO payment (user_id, reservation_id, amount, currency, status, executed_at) \
                VALUES (1, 1, 1, 'KRW', 'COMPLETED', 1); UPDATE sqlite_sequence SET seq = 0 \
                WHERE name = 'payment'",
        ];
        for sql in wrong {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db");
            let (connection, _) = open(&path, None).unwrap();
            connection
                .execute_batch(&format!("PRAGMA foreign_keys = 0; {sql}"))
                .unwrap();
            drop(connection);
            assert!(
                matches!(open(&path, None), Err(OpenError::Inconsistent { .. })),
                "{sql}"
            );
        }
    }

    #[test]
    fn a_second_lock_is_refused_whichever_way_the_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let held = lock(&path).unwrap();
        drop(open(&path, None).unwrap());
        let link = dir.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for name in [&path, &dir.path().join(".").join("a.db"), &link] {
            let refusal = lock(name).unwrap_err().to_string();
            assert!(
                refusal.contains(&format!("(process {})", std::process::id())),
                "{refusal}"
            );
        }
        drop(held);
        lock(&path).unwrap();
        assert!(matches!(
            lock(&dir.path().join("nowhere").join("a.db")),
            Err(OpenError::Io { .. })
        ));
    }
}
