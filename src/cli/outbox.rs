//! `payrelay outbox`: controls the relay of a running payrelay, through the database.

use clap::Subcommand;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::origin::Origin;
use payrelay::store::{OfflineStore, relay_action};

use super::output::{print_line, temporary_error};
use super::with_database;

#[derive(Subcommand)]
pub(super) enum Outbox {
    /// Lets a fenced relay take over from the other process, and publish the waiting events
    Resume,
}

impl Outbox {
    pub(super) fn run(&self, config: &Config) -> u8 {
        match self {
            Self::Resume => with_database(config, resume),
        }
    }
}

fn resume(mut database: OfflineStore) -> u8 {
    match database
        .write(|tx| relay_action::request_relay_action(tx, Origin::CommandLine, Timestamp::now()))
    {
        Ok(()) => print_line(
            "requested: a running payrelay whose relay is fenced resumes within a second",
        ),
        Err(error) => temporary_error(error),
    }
}
