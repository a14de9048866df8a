//! The database for a command, also while payrelay is running.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, Result as SqlResult, Transaction, TransactionBehavior};

use super::engine::disk_space::FileSizes;
use super::engine::open_error::OpenError;
use super::engine::{files, open};
use super::error::StoreError;
use crate::domain::node_id::NodeId;

/// The file of a database, with links followed. A command creates none.
pub(super) fn existing_database(path: &Path) -> Result<PathBuf, OpenError> {
    let file = files::resolve_database_file(path)?;
    if file.exists() {
        Ok(file)
    } else {
        Err(OpenError::NoDatabase(file.display().to_string()))
    }
}

/// The database for a command, also while payrelay is running.
pub struct OfflineStore {
    pub(super) connection: Connection,
    node: NodeId,
}

impl OfflineStore {
    /// Opens an existing database.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file = existing_database(path)?;
        let (connection, node) = open::open_existing_database(&file)?;
        Ok(Self { connection, node })
    }

    /// Opens an existing database only to read it.
    pub fn open_to_read(path: &Path) -> Result<Self, OpenError> {
        let file = existing_database(path)?;
        let (connection, node) = open::open_database_to_read(&file)?;
        Ok(Self { connection, node })
    }

    /// The node that the database belongs to.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The sizes of its files now.
    pub fn file_sizes(&self) -> FileSizes {
        FileSizes::of_database(Path::new(self.connection.path().unwrap_or_default()))
    }

    /// Runs `query`.
    pub fn read<T>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T>,
    ) -> Result<T, StoreError> {
        Ok(query(&self.connection)?)
    }

    /// Runs `work` in a transaction of its own. The writer of a running payrelay waits for it, so
    /// it has to be short.
    pub fn write<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> SqlResult<T>,
    ) -> Result<T, StoreError> {
        let tx = Transaction::new(&mut self.connection, TransactionBehavior::Immediate)?;
        let value = work(&tx)?;
        tx.commit()?;
        Ok(value)
    }
}
