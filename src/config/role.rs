//! The defaults of keys that depend on `node.role`.

use crate::domain::node_role::NodeRole;

/// The defaults of keys that depend on the role.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoleDefaults {
    pub(super) publisher: &'static str,
    pub(super) format: &'static str,
    pub(super) key: &'static str,
    pub(super) delivery: &'static str,
    pub(super) compression: &'static str,
    pub(super) reconnect_max: &'static str,
}

impl RoleDefaults {
    pub(super) fn of(role: NodeRole) -> Self {
        match role {
            NodeRole::Single => Self {
                publisher: "application",
                format: "id",
                key: "user",
                delivery: "exactly-once",
                compression: "none",
                reconnect_max: "5s",
            },
            // A thousand nodes share a topic. None holds up the others with an open transaction.
            // They do not come back in step after an outage.
            NodeRole::Edge => Self {
                publisher: "kafka",
                format: "json",
                key: "node",
                delivery: "at-least-once",
                compression: "lz4",
                reconnect_max: "30s",
            },
        }
    }
}
