//! `payrelay outbox`: controls the relay of a running payrelay, through the database.

use clap::Subcommand;
use payrelay::config::Config;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::{OfflineStore, relay_action};

use super::local_user::local_user_origin;
use super::output::{output_line, print_temporary_error};
use super::run_command_with_database;

#[derive(Subcommand)]
pub(super) enum OutboxCommand {
    /// Lets a fenced relay take over from the other process, and publish the waiting events
    Resume,
}

impl OutboxCommand {
    pub(super) fn run(&self, config: &Config) -> u8 {
        match self {
            Self::Resume => run_command_with_database(config, resume_outbox),
        }
    }
}

fn resume_outbox(mut database: OfflineStore) -> u8 {
    let origin = local_user_origin();
    match database.write(|tx| relay_action::request_relay_action(tx, &origin, Timestamp::now())) {
        Ok(()) => output_line(
            "requested: a running payrelay whose relay is fenced resumes within a second",
        ),
        Err(error) => print_temporary_error(error),
    }
}
