//! `payrelay restore`: replaces the database by a copy, or marks the database as a copy.

use std::path::{Path, PathBuf};

use clap::Args;
use payrelay::config::Config;
use payrelay::domain::node_role::NodeRole;
use payrelay::domain::timestamp::Timestamp;
use payrelay::rebuild::{RebuildError, rebuild_from_topic};
use payrelay::runtime::plural::counted;
use payrelay::store::rebuild::remove_rebuilt;
use payrelay::store::restore::{
    RestoreError, RestoreRequest, Restored, partial_restore_path, restore_database,
};

use super::confirmation::Confirmation;
use super::exit_code;
use super::local_user::local_user_origin;
use super::output::{
    output_line, print_config_error, print_error, print_note, print_open_error,
    print_temporary_error,
};
use super::progress::{Measure, Progress};

#[derive(Args)]
pub(super) struct RestoreCommand {
    /// The copy: a backup, or a file of rsync, a snapshot or litestream, with its -wal file if it
    /// has one
    #[arg(
        value_name = "COPY",
        required_unless_present_any = ["adopt", "from_topic"],
        conflicts_with = "adopt"
    )]
    copy: Option<PathBuf>,
    /// Marks the file at database.path as a restored copy, without replacing it
    #[arg(long)]
    adopt: bool,
    /// Builds the database of a lost edge again, from its records on the topic
    #[arg(long, conflicts_with_all = ["copy", "adopt"])]
    from_topic: bool,
    #[command(flatten)]
    confirmation: Confirmation,
}

impl RestoreCommand {
    pub(super) fn run(&self, config: &Config) -> u8 {
        let consequence = if self.adopt {
            "restore marks the database as a restored copy"
        } else {
            "restore replaces the database"
        };
        if let Err(code) = self.confirmation.check(consequence) {
            return code;
        }
        let built = match self.from_topic.then(|| rebuild(config)).transpose() {
            Ok(built) => built,
            Err(code) => return code,
        };
        let by = local_user_origin();
        let copy = built.as_deref().or(self.copy.as_deref());
        let request = RestoreRequest {
            copy,
            database: &config.database.path,
            node: config.node.id.as_ref(),
            by: &by,
            now: Timestamp::now(),
        };
        let progress = self.show_progress(&config.database.path);
        let restored = restore_database(&request);
        drop(progress);
        if self.from_topic {
            remove_rebuilt(&config.database.path);
        }
        match restored {
            Ok(restored) => output_line(describe_restored(&restored)),
            Err(error) => {
                print_error(&error);
                match error {
                    RestoreError::Unsound(_) | RestoreError::Damaged { .. } => exit_code::PARTIAL,
                    RestoreError::Open(error) if error.is_temporary() => exit_code::TEMPORARY,
                    RestoreError::Store(_) => exit_code::TEMPORARY,
                    _ => exit_code::CONFIG,
                }
            }
        }
    }

    /// The copy is checked after it was read, for as long again.
    fn show_progress(&self, database: &Path) -> Progress {
        let copy = self.copy.as_deref();
        let total = copy.and_then(|copy| copy.metadata().ok());
        let total = total.map(|file| file.len());
        let part = partial_restore_path(database).ok();
        Progress::show("restore", move || {
            let done = part.as_ref().and_then(|part| part.metadata().ok());
            match (done, total) {
                (Some(done), Some(total)) if done.len() < total => Measure::Bytes {
                    done: done.len(),
                    total,
                },
                _ => Measure::Time,
            }
        })
    }
}

/// Builds the file, and says what it has.
fn rebuild(config: &Config) -> Result<PathBuf, u8> {
    if config.node.role != NodeRole::Edge {
        return Err(print_config_error(
            "restore --from-topic needs node.role = \"edge\": the topic of a single node does not \
                have its payments, and knows nothing of their deliveries",
        ));
    }
    let Some(node) = &config.node.id else {
        return Err(print_config_error(
            "restore --from-topic needs node.id: the id of the lost node, which `payrelay fleet` \
                shows",
        ));
    };
    let progress = Progress::show("topic", || Measure::Time);
    let built = rebuild_from_topic(config, node);
    drop(progress);
    let built = built.map_err(|error| match error {
        RebuildError::Open(error) => print_open_error(&error),
        RebuildError::Empty { .. } => {
            print_error(&error);
            exit_code::PARTIAL
        }
        error => print_temporary_error(error),
    })?;
    print_note(&format!(
        "the topic has {} of node {node}",
        counted(built.events, "event")
    ));
    if built.of_earlier_databases > 0 {
        print_note(&format!(
            "{} of earlier databases of this node were left out",
            counted(built.of_earlier_databases, "record")
        ));
    }
    if built.unusable > 0 {
        print_note(&format!(
            "{} of this node cannot be used: they are no payments as JSON",
            counted(built.unusable, "record")
        ));
    }
    Ok(built.path)
}

fn describe_restored(restored: &Restored) -> String {
    let Restored {
        node,
        payments,
        before,
    } = restored;
    let moved = match before {
        Some(folder) => format!("; the files before it are in {}", folder.display()),
        None => String::new(),
    };
    format!(
        "restored {} of node {node}{moved}. The next start gives new ids, beyond \
            all that were given",
        counted(*payments, "payment")
    )
}
