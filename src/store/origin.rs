//! The origin of an operator's action on the relay or on dead letters.

use crate::domain::text_enum::text_enum;

text_enum! {
    /// From where an operator acted.
    pub enum Origin {
        /// The administrative part of the HTTP API.
        Http = "http",
        /// A command of payrelay on this machine.
        CommandLine = "command line",
    }
}
