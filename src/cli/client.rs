//! A client of a running payrelay, on this machine or elsewhere, and what its answers mean.

use std::io;
use std::path::{Path, PathBuf};

use payrelay::config::LocalConfig;
use payrelay::store::local_socket::local_socket_path;
use serde_json::{Value, json};

use super::api::{ApiResponse, NoResponse};
use super::local_client::LocalClient;
use super::output::{print_config_error, print_error, print_open_error, print_temporary_error};
use super::remote_client::RemoteClient;
use super::{configuration, exit_code};

/// A client of a running payrelay.
#[derive(Debug)]
pub(super) enum Client {
    /// Of its socket on this machine.
    Local(LocalClient),
    /// Of its API: `--url`.
    Remote(RemoteClient),
}

impl Client {
    pub(super) fn get(&self, path: &str) -> Result<ApiResponse, NoResponse> {
        self.request("GET", path, None)
    }

    fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<ApiResponse, NoResponse> {
        match self {
            Self::Local(client) => client
                .request(method, path, body)
                .map_err(NoResponse::temporary),
            Self::Remote(client) => client.request(method, path, body),
        }
    }

    /// The body of a GET; `None`: there is no such thing.
    pub(super) fn find(&self, path: &str) -> Result<Option<Value>, u8> {
        self.judge(self.get(path))
    }

    /// Requests an action, for a reason if there is one. `None`: there is no such thing.
    pub(super) fn act(&self, path: &str, reason: Option<&str>) -> Result<Option<Value>, u8> {
        let body = reason.map(|reason| json!({ "reason": reason }));
        self.judge(self.request("POST", path, body.as_ref()))
    }

    /// The body of a response of 2xx; `None` for 404. Else it prints why, and returns the exit
    /// code.
    fn judge(&self, response: Result<ApiResponse, NoResponse>) -> Result<Option<Value>, u8> {
        let ApiResponse { status, body } = response.map_err(|error| error.print())?;
        let detail = body["detail"].as_str().unwrap_or_default();
        match (status, self) {
            (200..=299, _) => Ok(Some(body)),
            (404, _) => Ok(None),
            (401, Self::Remote(client)) => {
                print_error(client.explain_unauthorized());
                Err(exit_code::NOT_ALLOWED)
            }
            (401 | 403 | 421, _) => {
                print_error(format_args!("payrelay answered {status}: {detail}"));
                Err(exit_code::NOT_ALLOWED)
            }
            (409 | 422, _) => {
                print_error(format_args!("payrelay answered {status}: {detail}"));
                Err(exit_code::PARTIAL)
            }
            _ => Err(print_temporary_error(format_args!(
                "payrelay answered {status}: {detail}"
            ))),
        }
    }
}

/// The payrelay that a command asks.
#[derive(Debug, Default)]
pub(super) struct Target {
    /// The configuration file that the arguments name.
    pub(super) file: Option<PathBuf>,
    /// The payrelay that `--url` names.
    remote: Option<RemoteClient>,
}

impl Target {
    /// The payrelay of this machine, or that of `--url`. Prints why there is none.
    pub(super) fn new(
        file: Option<PathBuf>,
        url: Option<&str>,
        token_file: Option<&Path>,
    ) -> Result<Self, u8> {
        let remote = match url {
            None => None,
            Some(url) => Some(RemoteClient::new(url, token_file).map_err(|error| error.print())?),
        };
        Ok(Self { file, remote })
    }

    pub(super) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// A client of the payrelay of `--url`.
    pub(super) fn remote(&self) -> Option<Client> {
        self.remote.clone().map(Client::Remote)
    }

    /// A client of that payrelay; `None`: none serves the socket of this machine.
    pub(super) fn connect(&self) -> Result<Option<Client>, u8> {
        match self.remote() {
            Some(client) => Ok(Some(client)),
            None => connect_local(&load_local(self.file())?),
        }
    }
}

/// Reads where the database and the socket are.
pub(super) fn load_local(file: Option<&Path>) -> Result<LocalConfig, u8> {
    configuration::load_local_configuration(file).map_err(print_config_error)
}

/// A client of the payrelay that serves the configured socket; `None`: no process serves it.
pub(super) fn connect_local(config: &LocalConfig) -> Result<Option<Client>, u8> {
    let path = local_socket_path(&config.socket, &config.database)
        .map_err(|error| print_open_error(&error))?;
    let Some(path) = path else {
        return Ok(None);
    };
    match LocalClient::connect(&path) {
        Ok(client) => Ok(Some(Client::Local(client))),
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
