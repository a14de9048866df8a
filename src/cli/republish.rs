//! `payrelay republish`: an edge publishes events again that the topic has lost.

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::node_role::NodeRole;
use payrelay::runtime::plural::counted;
use payrelay::store::outbox::{self, Republished};
use payrelay::store::{OfflineStore, StoreError, node_role};

use super::confirmation::Confirmation;
use super::exit_code;
use super::output::{Output, print_config_error, print_open_error, print_temporary_error};

/// How many events one transaction moves: the writer of a running payrelay waits for it.
const PART: usize = 500;

#[derive(Args)]
pub(super) struct RepublishCommand {
    /// The first event id that the topic lacks
    #[arg(long, value_name = "ID")]
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    from: i64,
    /// The last one; without it all later ones
    #[arg(long, value_name = "ID")]
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    through: Option<i64>,
    #[command(flatten)]
    confirmation: Confirmation,
}

impl RepublishCommand {
    /// Works while payrelay runs, and otherwise: its next start publishes them.
    pub(super) fn run(&self, config: &Config) -> u8 {
        if config.node.role != NodeRole::Edge {
            return print_config_error(
                "republish needs node.role = \"edge\": a single node backfills what its topic lost",
            );
        }
        let consequence = "republish publishes events a second time, under new ids";
        if let Err(code) = self.confirmation.check(consequence) {
            return code;
        }
        let mut database = match OfflineStore::open(&config.database.path) {
            Ok(database) => database,
            Err(error) => return print_open_error(&error),
        };
        match database.read(node_role::node_role) {
            Ok(NodeRole::Edge) => {}
            Ok(NodeRole::Single) => {
                return print_config_error(
                    "this database was last served as a single node: start it as an edge first",
                );
            }
            Err(error) => return print_temporary_error(error),
        }
        let mut output = Output::default();
        match self.republish(&mut database) {
            Ok(count) => {
                output.line(format_args!(
                    "{} wait to be published again, under new ids",
                    counted(count, "event")
                ));
                output.exit_code(exit_code::OK)
            }
            Err(error) => print_temporary_error(error),
        }
    }

    fn republish(&self, database: &mut OfflineStore) -> Result<usize, StoreError> {
        // Events that are given new ids, or published meanwhile, are not looked for.
        let last = database.read(outbox::last_published_event)?;
        let through = self.through.unwrap_or(last).min(last);
        let mut from = self.from;
        let mut total = 0;
        loop {
            let part =
                database.write(move |tx| outbox::republish_outbox(tx, from, through, PART))?;
            let Republished { count, next } = part;
            total += count;
            match next {
                Some(next) => from = next,
                None => return Ok(total),
            }
        }
    }
}
