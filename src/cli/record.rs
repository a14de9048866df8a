//! `payrelay record`: the records of the topic, for applications that read it.

use clap::Subcommand;
use payrelay::domain::payment_record::PAYMENT_SCHEMA;

use super::output::output_line;

#[derive(Subcommand)]
pub(super) enum RecordCommand {
    /// Prints the JSON Schema of a record's value with kafka.format = "json"
    Schema,
}

impl RecordCommand {
    /// Needs no configuration.
    pub(super) fn run(&self) -> u8 {
        match self {
            Self::Schema => output_line(PAYMENT_SCHEMA.trim_end()),
        }
    }
}
