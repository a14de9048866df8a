//! Where a connection is from: an address of the network, or a process on this machine.

use std::fs;
use std::net::IpAddr;
use std::sync::Arc;

use super::limits::{ClientUsage, LimitedConnection};

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
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        match user_name(&users, uid) {
            Some(name) => format!("local user {name}"),
            None => format!("local user uid {uid}"),
        }
    }
}

/// The name of a user in the text of passwd(5).
fn user_name(users: &str, uid: u32) -> Option<&str> {
    let uid = uid.to_string();
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1) == Some(uid.as_str())).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_user_has_the_name_of_passwd() {
        let users = "root:x:0:0:root:/root:/bin/bash\nkim:x:1000:100::/home/kim:/bin/sh\n";
        assert_eq!(user_name(users, 1000), Some("kim"));
        assert_eq!(user_name(users, 100), None);
        assert_eq!(LocalUser(Some(0)).origin(), "local user root");
        assert_eq!(
            LocalUser(Some(u32::MAX)).origin(),
            "local user uid 4294967295"
        );
        assert_eq!(LocalUser(None).origin(), "local");
    }
}
