//! The command line: arguments, help, and the dispatch to a file for each command.

mod audit;
mod backup;
mod channels;
mod check_config;
mod configuration;
mod dead_letters;
mod descriptors;
mod exit_code;
mod local_user;
mod logger;
mod outbox;
mod output;
mod restore;
mod serve;
mod token;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use payrelay::config::Config;
use payrelay::store::OfflineStore;

use self::output::{print_config_error, print_open_error};

const AFTER_HELP: &str = "\
Environment:
  Each configuration key has a variable, which wins: http.listen is PAYRELAY_HTTP_LISTEN.
  PAYRELAY_CONFIG  the configuration file, as --config
  PAYRELAY_LOG     error, warn, info (default), debug, trace or off

Signals:
  SIGTERM and SIGINT stop payrelay within 10 s. A second SIGINT ends it at once.
  SIGHUP reads the configuration again, and changes the tokens ([[http.token]]).

Exit codes:
  0   done, or stopped by a signal
  1   dead-letters: some could not be replayed or do not exist; restore: the copy is damaged;
      channels: nothing was done, or there is no such channel; audit: findings
  64  wrong arguments
  70  a thread died
  71  the stop needed more than 10 s, or a second SIGINT came
  74  the output could not be written (a pipe that is closed early, as head does, is no error)
  75  it may pass: the port or the database is in use, Kafka or a running payrelay does not answer
  77  the operating system does not allow the port
  78  the configuration, the database file or the copy cannot be used";

/// A payment outbox for one small machine: HTTP, SQLite, Kafka, Slack. It loses no payment and
/// delivers none twice.
#[derive(Parser)]
#[command(version, about, after_help = AFTER_HELP)]
struct Arguments {
    /// The configuration file [default: ./config.toml, else /etc/payrelay/config.toml, else
    /// built-in defaults]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Accepts and relays payments until SIGTERM or SIGINT; the default
    Serve,
    /// Prints the effective configuration, secrets masked, and the source of each value
    CheckConfig,
    /// Writes a copy of the database; also while payrelay runs
    Backup(backup::BackupCommand),
    /// Replaces the database by a copy; payrelay must not run. The old files are moved, not deleted
    Restore(restore::RestoreCommand),
    /// Lists the channels, resumes one, or skips the oldest payment of one that is paused
    Channels {
        #[command(subcommand)]
        action: channels::ChannelsCommand,
    },
    /// Prints a new token, and its hash for the configuration
    Token,
    /// Cross-checks payments, outbox, topic and deliveries, and changes nothing; also while
    /// payrelay runs
    Audit(audit::AuditCommand),
    /// Resumes a fenced relay; also while payrelay runs
    Outbox {
        #[command(subcommand)]
        action: outbox::OutboxCommand,
    },
    /// Lists, replays or discards dead letters; also while payrelay runs
    DeadLetters {
        #[command(subcommand)]
        action: dead_letters::DeadLettersCommand,
    },
}

/// Runs the command that the arguments name, and returns its exit code.
pub(crate) fn run_command_line() -> u8 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are printed here as well; they are no errors.
            let _ = error.print();
            return if error.use_stderr() {
                exit_code::USAGE
            } else {
                exit_code::OK
            };
        }
    };
    let level = match logger::configured_log_level() {
        Ok(level) => level,
        Err(problem) => return print_config_error(problem),
    };
    let command = arguments.command.unwrap_or(Command::Serve);
    // Needs no configuration.
    if let Command::Token = command {
        return token::run_token_command();
    }
    let file = arguments.config.as_deref();
    let loaded = match configuration::load_configuration(file) {
        Ok(loaded) => loaded,
        Err(problems) => return print_config_error(problems),
    };
    let config = &loaded.config;
    match command {
        Command::Serve => serve::run_serve_command(loaded, file, level),
        Command::CheckConfig => check_config::run_check_config(&loaded),
        Command::Backup(backup) => backup.run(config),
        Command::Restore(restore) => restore.run(config),
        Command::Channels { action } => action.run(config),
        Command::Token => token::run_token_command(),
        Command::Audit(audit) => audit.run(&loaded),
        Command::Outbox { action } => action.run(config),
        Command::DeadLetters { action } => action.run(config),
    }
}

/// Opens the database, and runs `command` on it.
fn run_command_with_database(config: &Config, command: impl FnOnce(OfflineStore) -> u8) -> u8 {
    match OfflineStore::open(&config.database.path) {
        Ok(database) => command(database),
        Err(error) => print_open_error(&error),
    }
}
