//! The few keys that a command needs to find a running payrelay and its database. A problem of any
//! other key must not keep an operator from the state.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::http::LocalSocket;
use super::problems::Problems;
use super::source::Source;
use super::typed_keys::TypedKeys;
use super::{database, http, kafka};

/// Where the database and the socket of a payrelay on this machine are.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// `database.path`
    pub database: PathBuf,
    /// `http.socket`
    pub socket: LocalSocket,
}

impl LocalConfig {
    /// Reads these two keys.
    pub fn load(file: &str, environment: &BTreeMap<String, String>) -> Result<Self, Problems> {
        read_some_keys(file, environment, |keys| Self {
            database: database::read_path_key(keys),
            socket: http::read_socket_key(keys),
        })
    }

    /// Reads `http.listen` alone.
    pub fn load_listen(
        file: &str,
        environment: &BTreeMap<String, String>,
    ) -> Result<SocketAddr, Problems> {
        read_some_keys(file, environment, http::read_listen_key)
    }

    /// Reads `kafka.topic` alone.
    pub fn load_topic(
        file: &str,
        environment: &BTreeMap<String, String>,
    ) -> Result<String, Problems> {
        read_some_keys(file, environment, kafka::read_topic_key)
    }
}

fn read_some_keys<T>(
    file: &str,
    environment: &BTreeMap<String, String>,
    read: impl FnOnce(&mut TypedKeys<'_>) -> T,
) -> Result<T, Problems> {
    let mut keys = TypedKeys::new(Source::parse(file, environment)?);
    let value = read(&mut keys);
    keys.into_source().finish_partly()?;
    Ok(value)
}
