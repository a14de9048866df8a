//! The command line: arguments, help, and the dispatch to a file for each command.

mod api;
mod audit;
mod backup;
mod channels;
mod client;
mod completions;
mod config;
mod configuration;
mod confirmation;
mod dead_letters;
mod demo;
mod descriptors;
mod doctor;
mod exit_code;
mod explain;
mod fleet;
mod health;
mod local_client;
mod local_user;
mod log_format;
mod logger;
mod outbox;
mod output;
mod payment;
mod payments;
mod progress;
mod record;
mod remote_client;
mod republish;
mod restore;
mod scratch;
mod selftest;
mod serve;
mod state;
mod status;
mod supervisor;
mod support_bundle;
mod table;
mod token;
mod topic;
mod watch;

use std::path::{Path, PathBuf};

use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use payrelay::config::{LoadedConfig, Problems};

use self::client::Target;
use self::log_format::LineFormat;
use self::output::{print_config_error, print_error, print_start_error};

const AFTER_HELP: &str = "\
Environment:
  Each configuration key has a variable, which wins: http.listen is PAYRELAY_HTTP_LISTEN.
  PAYRELAY_CONFIG  the configuration file, as --config
  PAYRELAY_TOKEN   the token for --url
  PAYRELAY_LOG     error, warn, info (default), debug, trace or off
  NO_COLOR         no colours, as --color never; CLICOLOR_FORCE=1 as --color always

Signals:
  SIGTERM and SIGINT stop payrelay within 10 s. A second SIGINT ends it at once.
  SIGHUP reads the configuration again, and changes the tokens ([[http.token]]).

Exit codes:
  0   done, or stopped by a signal; status: ready; health: yes
  1   there is an answer, and it is not good. audit, doctor, selftest: findings. status: degraded,
      or something waits for a person. payment, dead-letters, channels, explain: it does not exist,
      or nothing was done. restore: the copy is damaged. health: no
  64  wrong arguments
  70  a thread died
  71  the stop needed more than 10 s, or a second SIGINT came
  74  the output could not be written (a pipe that is closed early, as head does, is no error)
  75  it may pass: the port or the database is in use, Kafka or a running payrelay does not answer,
      or payrelay is not ready
  77  the operating system does not allow the port or the local socket, or the token is missing,
      unknown or not enough
  78  the configuration, the database file or the copy cannot be used";

const URL_HELP: &str = "Asks the payrelay at this address, such as https://payrelay.example, not \
    that of this machine; with the token of PAYRELAY_TOKEN";

/// A payment outbox for one small machine: HTTP, SQLite, Kafka, Slack. It loses no payment and
/// delivers none twice.
#[derive(Parser)]
#[command(version, about, after_help = AFTER_HELP)]
struct Arguments {
    /// The configuration file [default: ./config.toml, else /etc/payrelay/config.toml, else
    /// built-in defaults]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Whether the output has colours
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_default_value = true
    )]
    color: Color,
    #[arg(long, global = true, value_name = "URL", help = URL_HELP)]
    url: Option<String>,
    /// The file that has the token for --url
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Prints nothing but the result, and errors
    #[arg(long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Subcommand)]
enum Command {
    /// Accepts and relays payments until SIGTERM or SIGINT; the default
    Serve,
    /// Is it healthy? Was there a backup? What waits, and for how long
    Status(status::StatusCommand),
    /// Where is a payment? Its timeline
    Payment(payment::PaymentCommand),
    /// What was paid today, or in another time, and its sums
    Payments(payments::PaymentsCommand),
    /// How old is the oldest event? Lists what waits for Kafka; wakes or resumes the relay
    Outbox {
        #[command(subcommand)]
        action: Option<outbox::OutboxCommand>,
    },
    /// Why is nothing at Slack? Lists channels; resumes one, or skips a payment
    Channels {
        #[command(subcommand)]
        action: Option<channels::ChannelsCommand>,
    },
    /// Lists, shows, replays or discards dead letters
    DeadLetters {
        #[command(subcommand)]
        action: Option<dead_letters::DeadLettersCommand>,
    },
    /// Prints how far the topic is published and consumed
    Topic(topic::TopicCommand),
    /// Exits with 0 if payrelay accepts payments, for a supervisor
    Health(health::HealthCommand),
    /// Is the disk good enough? Checks machine, configuration and network
    Doctor(doctor::DoctorCommand),
    /// Explains an alert, a problem type, an exit code or a finding
    Explain(explain::ExplainCommand),
    /// Writes a copy of the database; also while payrelay runs
    Backup(backup::BackupCommand),
    /// Replaces the database by a copy; payrelay must not run
    Restore(restore::RestoreCommand),
    /// Publishes events of an edge again that the topic has lost
    Republish(republish::RepublishCommand),
    /// Cross-checks payments, outbox, topic and deliveries
    Audit(audit::AuditCommand),
    /// Checks the configuration, or prints its schema
    Config {
        #[command(subcommand)]
        action: config::ConfigCommand,
    },
    /// The same as config check
    CheckConfig,
    /// Shows the edges of a topic, or creates the topics of a fleet
    Fleet(fleet::FleetCommand),
    /// Prints the schema of the topic's records
    Record {
        #[command(subcommand)]
        action: record::RecordCommand,
    },
    /// Kills a scratch payrelay repeatedly, and looks for lost payments
    Selftest(selftest::SelftestCommand),
    /// Pays a scratch payrelay for a while, to look at
    Demo(demo::DemoCommand),
    /// Writes a tar file for a person who helps: no payments, no secrets
    SupportBundle(support_bundle::SupportBundleCommand),
    /// Prints a new token, and its hash for the configuration
    Token,
    /// Prints the completions for a shell
    Completions(completions::CompletionsCommand),
    /// Writes the manual pages, one for each command
    Man(completions::ManCommand),
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
    arguments.run()
}

impl Arguments {
    fn run(self) -> u8 {
        self.color.choose();
        output::set_quiet(self.quiet);
        let command = self.command.unwrap_or(Command::Serve);
        if self.url.is_some() && !command.can_ask_remote() {
            print_error("--url: this command works on this machine alone");
            return exit_code::USAGE;
        }
        if self.url.is_none() && self.token_file.is_some() {
            print_error("--token-file is for --url");
            return exit_code::USAGE;
        }
        match Target::new(self.config, self.url.as_deref(), self.token_file.as_deref()) {
            Ok(target) => command.run(&target),
            Err(code) => code,
        }
    }
}

impl Color {
    /// Without this option, the environment and the terminal decide.
    fn choose(self) {
        match self {
            Self::Auto => {}
            Self::Always => anstream::ColorChoice::Always.write_global(),
            Self::Never => anstream::ColorChoice::Never.write_global(),
        }
    }
}

impl Command {
    /// Whether `--url` may name the payrelay that it asks.
    fn can_ask_remote(&self) -> bool {
        matches!(
            self,
            Self::Status(_)
                | Self::Payment(_)
                | Self::Payments(_)
                | Self::Outbox { .. }
                | Self::Channels { .. }
                | Self::DeadLetters { .. }
                | Self::Topic(_)
                | Self::Health(_)
        )
    }

    /// Each command reads no more of the configuration than it needs.
    fn run(self, target: &Target) -> u8 {
        let file = target.file();
        match self {
            Self::Serve => run_serve(file),
            Self::Status(status) => status.run(target),
            Self::Payment(payment) => payment.run(target),
            Self::Payments(payments) => payments.run(target),
            Self::Outbox { action: None } => outbox::OutboxList::default().run(target),
            Self::Outbox {
                action: Some(action),
            } => action.run(target),
            Self::Channels { action: None } => channels::ChannelsList::default().run(target),
            Self::Channels {
                action: Some(action),
            } => action.run(target),
            Self::DeadLetters { action: None } => {
                dead_letters::DeadLettersList::default().run(target)
            }
            Self::DeadLetters {
                action: Some(action),
            } => action.run(target),
            Self::Topic(topic) => topic.run(target),
            Self::Health(health) => health.run(target),
            Self::Doctor(doctor) => doctor.run(file),
            Self::Explain(explain) => explain.run(),
            Self::Backup(backup) => backup.run(file),
            Self::Restore(restore) => with_configuration(file, |it| restore.run(&it.config)),
            Self::Republish(republish) => with_configuration(file, |it| republish.run(&it.config)),
            Self::Audit(audit) => with_configuration(file, |it| audit.run(&it)),
            Self::Config {
                action: config::ConfigCommand::Schema,
            } => config::run_config_schema(),
            Self::Config {
                action: config::ConfigCommand::Check,
            }
            | Self::CheckConfig => with_configuration(file, |it| config::run_check_config(&it)),
            Self::Fleet(fleet) => with_configuration(file, |it| fleet.run(&it)),
            Self::Record { action } => action.run(),
            Self::Selftest(selftest) => selftest.run(),
            Self::Demo(demo) => demo.run(),
            Self::SupportBundle(bundle) => bundle.run(target),
            Self::Token => token::run_token_command(),
            Self::Completions(completions) => completions.run(&mut Arguments::command()),
            Self::Man(man) => man.run(Arguments::command()),
        }
    }
}

fn run_serve(file: Option<&Path>) -> u8 {
    let refused = |problems: Problems| {
        print_start_error(LineFormat::of_environment(), problems);
        exit_code::CONFIG
    };
    let level = match logger::configured_log_level() {
        Ok(level) if output::is_quiet() => level.min(log::LevelFilter::Error),
        Ok(level) => level,
        Err(problem) => return refused(problem),
    };
    match configuration::load_configuration(file) {
        Ok(loaded) => serve::run_serve_command(loaded, file, level),
        Err(problems) => refused(problems),
    }
}

/// Reads the whole configuration, and runs `command` with it.
fn with_configuration(file: Option<&Path>, command: impl FnOnce(LoadedConfig) -> u8) -> u8 {
    match configuration::load_configuration(file) {
        Ok(loaded) => command(loaded),
        Err(problems) => print_config_error(problems),
    }
}
