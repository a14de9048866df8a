//! Why the service did not start, and whether that may pass.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::config::Problems;
use crate::http::LocalSocketError;
use crate::runtime::plural::counted;
use crate::slack::webhook::SlackConfigError;
use crate::store::{OpenError, StoreError};

/// Why the service did not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServiceStartError {
    /// The database cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The address cannot be used.
    #[error("http.listen {address}: {source}; {}", listen_advice(source))]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The local socket cannot be used.
    #[error("http.socket {path}: {source}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The reason.
        source: LocalSocketError,
    },
    /// A channel's configuration cannot be used.
    #[error(transparent)]
    Slack(#[from] SlackConfigError),
    /// Keys of the configuration cannot be used.
    #[error(transparent)]
    Config(#[from] Problems),
    /// A channel had a webhook, and has none now.
    #[error(
        "slack: {} waiting for the channel {channel}, which had a webhook and has none \
            now: set its webhook_url again, or set slack.sink = \"log\" to have them written to \
            the log",
        counted(*count, "payment")
    )]
    WebhookGone {
        /// The channel.
        channel: String,
        /// How many payments wait.
        count: i64,
    },
    /// The database has deliveries, and an edge makes none.
    #[error(
        "node.role = \"edge\": {} waiting to be delivered by this node, and an edge delivers none. \
            Run it once more with node.role = \"single\" until `payrelay status` shows that \
            nothing waits, and replay or discard its dead letters",
        counted(*count, "payment")
    )]
    DeliveriesWait {
        /// How many payments wait.
        count: i64,
    },
    /// The database has events that only an edge may publish.
    #[error(
        "node.role = \"single\": {} of this edge waiting to be published to the shared topic. \
            Run it once more with node.role = \"edge\" until `payrelay status` shows that nothing \
            waits",
        counted(*count, "event")
    )]
    EdgeEventsWait {
        /// How many events wait.
        count: i64,
    },
    /// The database opened, and then failed.
    #[error("database.path: {0}")]
    Store(#[from] StoreError),
    /// A thread or a runtime could not be started.
    #[error("the operating system starts no further thread: {0}")]
    Spawn(#[from] io::Error),
}

/// What kind of reason there is for a start that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It may pass by itself: a port or a database that is in use, too many threads.
    Temporary,
    /// The operating system does not allow it.
    NotAllowed,
    /// An operator has to change something.
    Configuration,
}

fn listen_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need a right of their own: set a port from 1024 on"
        }
        io::ErrorKind::AddrNotAvailable => "this machine does not have the address: set another",
        _ => "is another process listening there? Set another address",
    }
}

impl ServiceStartError {
    /// Names the file of the configuration, if the error is about its keys.
    #[must_use]
    pub fn in_file(self, file: Option<&Path>) -> Self {
        match self {
            Self::Config(problems) => Self::Config(problems.in_file(file)),
            // Not a matter of the configuration.
            Self::Slack(SlackConfigError::Thread(_)) => self,
            Self::Slack(error) => Self::Config(Problems::single(error.to_string()).in_file(file)),
            other => other,
        }
    }

    /// Whether it may pass.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Open(error) if error.is_temporary() => Cause::Temporary,
            Self::Listen { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable => Cause::Temporary,
                io::ErrorKind::PermissionDenied => Cause::NotAllowed,
                _ => Cause::Configuration,
            },
            Self::Socket {
                source: LocalSocketError::InUse,
                ..
            }
            | Self::Store(StoreError::Busy | StoreError::Closed | StoreError::Failed(_))
            | Self::Spawn(_) => Cause::Temporary,
            _ => Cause::Configuration,
        }
    }
}
