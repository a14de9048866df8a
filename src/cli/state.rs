//! Where a command reads the state: from a running payrelay through its socket, else from the file,
//! read-only. Both give the same JSON.

use std::io;
use std::path::Path;

use payrelay::config::LocalConfig;
use payrelay::store::local_socket::{database_lock_holder, local_socket_path};
use payrelay::store::{OfflineStore, StoreError};
use serde_json::Value;

use super::local_client::{LocalClient, LocalResponse};
use super::output::{
    print_config_error, print_error, print_note, print_open_error, print_temporary_error,
};
use super::{configuration, exit_code};

/// The source of a command's answer.
pub(super) enum State {
    /// A payrelay that serves its socket.
    Running(LocalClient),
    /// The database alone.
    Stopped(OfflineStore),
}

impl State {
    /// Finds the source, or prints why there is none, and returns the exit code.
    pub(super) fn open(file: Option<&Path>) -> Result<Self, u8> {
        let config = load_local(file)?;
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
            Self::Running(client) => found_in_response(client.get(path)),
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
            let mut page = found_in_response(client.get(&path))?.unwrap_or_default();
            if let Some(items) = page[items].as_array_mut() {
                all.append(items);
            }
            next = page["next"].as_str().map(str::to_owned);
        }
        Ok(all)
    }
}

/// Reads where the database and the socket are.
pub(super) fn load_local(file: Option<&Path>) -> Result<LocalConfig, u8> {
    configuration::load_local_configuration(file).map_err(print_config_error)
}

/// A client of the payrelay that serves the configured socket; `None`: no process serves it.
pub(super) fn connect_local(config: &LocalConfig) -> Result<Option<LocalClient>, u8> {
    let path = local_socket_path(&config.socket, &config.database)
        .map_err(|error| print_open_error(&error))?;
    let Some(path) = path else {
        return Ok(None);
    };
    match LocalClient::connect(&path) {
        Ok(client) => Ok(Some(client)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            print_error(format_args!(
                "{}: {error}: run the command as payrelay's user, or as a member of its group",
                path.display()
            ));
            Err(exit_code::NOT_ALLOWED)
        }
        Err(_) => Ok(None),
    }
}

/// The body of a response of 2xx; `None` for 404.
pub(super) fn found_in_response(response: io::Result<LocalResponse>) -> Result<Option<Value>, u8> {
    match response {
        Ok(LocalResponse {
            status: 200..=299,
            body,
        }) => Ok(Some(body)),
        Ok(LocalResponse { status: 404, .. }) => Ok(None),
        Ok(LocalResponse { status, body }) => Err(print_temporary_error(format_args!(
            "payrelay answered {status}: {}",
            body["detail"].as_str().unwrap_or_default()
        ))),
        Err(error) => Err(print_temporary_error(format_args!(
            "payrelay does not answer: {error}"
        ))),
    }
}

/// A value of our own types as JSON.
pub(super) fn to_json(value: &impl serde::Serialize) -> Value {
    // Serializing our own types cannot fail.
    serde_json::to_value(value).unwrap_or_default()
}
