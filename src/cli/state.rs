//! Where a command reads the state: from a running payrelay through its socket or its URL, else
//! from the file, read-only. All give the same JSON.

use payrelay::store::local_socket::database_lock_holder;
use payrelay::store::{OfflineStore, StoreError};
use serde_json::Value;

use super::client::{Client, Target, connect_local, load_local};
use super::output::{print_note, print_open_error, print_temporary_error};

/// The source of a command's answer.
pub(super) enum State {
    /// A payrelay that serves its socket, or that of `--url`.
    Running(Client),
    /// The database alone.
    Stopped(OfflineStore),
}

impl State {
    /// Finds the source, or prints why there is none, and returns the exit code.
    pub(super) fn open(target: &Target) -> Result<Self, u8> {
        if let Some(client) = target.remote() {
            return Ok(Self::Running(client));
        }
        let config = load_local(target.file())?;
        if let Some(client) = connect_local(&config)? {
            return Ok(Self::Running(client));
        }
        if let Ok(Some(holder)) = database_lock_holder(&config.database) {
            print_note(&format!(
                "payrelay runs (process {holder}) and serves no socket that is configured here \
                    (http.socket): this is read from its database"
            ));
        }
        OfflineStore::open_to_read(&config.database)
            .map(Self::Stopped)
            .map_err(|error| print_open_error(&error))
    }

    /// The answer of a running payrelay to a GET, or that of the file. `None`: there is no such
    /// thing.
    pub(super) fn get(
        &self,
        path: &str,
        read: impl FnOnce(&OfflineStore) -> Result<Option<Value>, StoreError>,
    ) -> Result<Option<Value>, u8> {
        match self {
            Self::Running(client) => client.find(path),
            Self::Stopped(database) => read(database).map_err(print_temporary_error),
        }
    }

    /// The items of every page of a list.
    pub(super) fn list(
        &self,
        path: &str,
        items: &str,
        read: impl FnOnce(&OfflineStore) -> Result<Vec<Value>, StoreError>,
    ) -> Result<Vec<Value>, u8> {
        let client = match self {
            Self::Running(client) => client,
            Self::Stopped(database) => return read(database).map_err(print_temporary_error),
        };
        let mut all = Vec::new();
        let mut next = Some(path.to_owned());
        while let Some(path) = next {
            let mut page = client.find(&path)?.unwrap_or_default();
            if let Some(items) = page[items].as_array_mut() {
                all.append(items);
            }
            next = page["next"].as_str().map(str::to_owned);
        }
        Ok(all)
    }
}

/// A value of our own types as JSON.
pub(super) fn to_json(value: &impl serde::Serialize) -> Value {
    // Serializing our own types cannot fail.
    serde_json::to_value(value).unwrap_or_default()
}
