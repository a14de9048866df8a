//! Where a connection is from: an address of the network, or a process on this machine.

use std::net::IpAddr;
use std::sync::Arc;

use super::limits::{ClientUsage, LimitedConnection};
use crate::runtime::local_user::local_user_name;

/// The other side of a connection.
#[derive(Debug)]
pub(super) enum Peer {
    /// It is limited with its address.
    Network(LimitedConnection),
    /// A process that can open the local socket.
    Local(LocalPeer),
}

/// A process on this machine.
#[derive(Debug)]
pub(super) struct LocalPeer {
    pub(super) usage: Arc<ClientUsage>,
    pub(super) user: LocalUser,
}

/// The user of a local process, by its number; `None` if the kernel does not know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LocalUser(pub(super) Option<u32>);

impl Peer {
    pub(super) fn usage(&self) -> &Arc<ClientUsage> {
        match self {
            Self::Network(connection) => &connection.usage,
            Self::Local(local) => &local.usage,
        }
    }

    /// Its address; a local process has none.
    pub(super) fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Network(connection) => Some(connection.address),
            Self::Local(_) => None,
        }
    }
}

impl LocalUser {
    /// The origin of an action, for its record: `local user NAME`.
    pub(super) fn origin(self) -> String {
        let Self(Some(uid)) = self else {
            return "local".to_owned();
        };
        format!("local user {}", local_user_name(uid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_origin_of_a_local_process_is_its_user() {
        assert_eq!(LocalUser(Some(0)).origin(), "local user root");
        assert_eq!(
            LocalUser(Some(u32::MAX)).origin(),
            "local user uid 4294967295"
        );
        assert_eq!(LocalUser(None).origin(), "local");
    }
}
