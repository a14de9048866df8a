//! What a node does with its events once they are published. Pure.

use crate::domain::text_enum::text_enum;

text_enum! {
    /// The role of a node, also in its database.
    pub enum NodeRole {
        /// It consumes its own events, and delivers them to Slack.
        Single = "single",
        /// It publishes its events, and others consume and deliver them.
        Edge = "edge",
    }
}
