//! The program: arguments, configuration, logger, signals, service, exit code. The only file that
//! prints or exits.

mod cli;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use std::{env, fs, io, panic, thread};

use clap::{Args, Parser, Subcommand};
use crossbeam_channel::{Receiver, bounded, select};
use log::LevelFilter;
use payrelay::audit::{self, AuditError, AuditOptions};
use payrelay::config::{Config, Loaded, Problems};
use payrelay::domain::access::{self, TokenHash};
use payrelay::domain::timestamp::Timestamp;
use payrelay::service::{self, Cause, Service, StartError};
use payrelay::store::dead_letter;
use payrelay::store::replay::{self, Action, Outcome, ResolveRequest, Selection};
use payrelay::store::{OfflineStore, OpenError, StoreError, relay_action};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::cli::channels::Channels;
use self::cli::restore::Restore;

/// Stopped when asked.
const OK: u8 = 0;
/// Wrong arguments (`EX_USAGE` of sysexits.h, as the others).
const USAGE: u8 = 64;
/// A thread died.
const DIED: u8 = 70;
/// The stop took too long.
const OVERDUE: u8 = 71;
/// `dead-letters`: something is as it was before, or is not there; `audit`, `restore`: something is
/// as it must not be.
const LEFT: u8 = 1;
/// What a command had to say could not be written (`EX_IOERR`).
const UNWRITTEN: u8 = 74;
/// It may pass: the port or the database is in use, or did not answer (`EX_TEMPFAIL`).
const TEMPORARY: u8 = 75;
/// The operating system does not allow it (`EX_NOPERM`).
const NOT_ALLOWED: u8 = 77;
/// The configuration cannot be used.
const CONFIG: u8 = 78;

const EXIT_CODES: &str = "\
Environment:
  Each key of the configuration has a variable, which wins: http.listen is PAYRELAY_HTTP_LISTEN.
  PAYRELAY_CONFIG  the configuration file, as --config
  PAYRELAY_LOG     error, warn, info (default), debug or trace

Signals:
  SIGTERM and SIGINT stop it within 10 s; a second SIGINT ends it at once. SIGHUP reads the configuration again, and
  changes the tokens ([[http.token]])

Exit codes:
  0 stopped when asked, 64 wrong arguments, 70 a thread died, 71 the stop took too long or a second SIGINT, 75 the port or
  the database is in use, 77 the port is not allowed, 78 configuration
  dead-letters: 0 all done, 1 some could not be replayed or are not there, 75 the database is busy
  restore: 0 restored, 1 the copy is not sound, 75 payrelay runs on the database, 78 the copy cannot be used
  channels: 0 done, 1 nothing was done or no such channel, 75 payrelay does not run
  audit: 0 nothing found, 1 findings, 75 the database or Kafka does not answer
  outbox: 0 the order is given, 75 the database is busy
  backup: 0 the copy is on the disk, 75 the database is busy, 78 the copy cannot be written there
  All commands: 74 the output could not be written. A pipe that is closed early, as head does, is no error: what a command
  does, it does to the end";

/// A payment outbox for one small machine: HTTP in, SQLite, Kafka, Slack; nothing lost, nothing
/// told twice.
#[derive(Parser)]
#[command(version, about, after_help = EXIT_CODES)]
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
    /// Takes and relays payments until SIGTERM or SIGINT; the default
    Serve,
    /// Prints the configuration that is in force, secrets masked, and where each value comes from
    CheckConfig,
    /// Writes a copy of the database; also while payrelay runs
    Backup {
        /// The copy: a file that is not there yet
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Puts a copy in the place of the database; payrelay must not run. The old files are moved,
    /// not deleted
    Restore(Restore),
    /// Resumes a channel, or skips the oldest payment of one that is paused; payrelay must run
    Channels {
        #[command(subcommand)]
        order: Channels,
    },
    /// Prints a new token, and its hash for the configuration
    Token,
    /// Holds payments, outbox, topic and deliveries against each other, and changes nothing; also
    /// while payrelay runs
    Audit(Audit),
    /// Gives the relay an order; also while payrelay runs
    Outbox {
        #[command(subcommand)]
        order: Outbox,
    },
    /// Lists, replays or discards what was set aside; also while payrelay runs
    DeadLetters {
        #[command(subcommand)]
        order: DeadLetters,
    },
}

#[derive(Args)]
struct Audit {
    /// Looks at the database alone: nothing is asked of Kafka
    #[arg(long)]
    file_only: bool,
    /// How many examples of each finding are shown
    #[arg(long, value_name = "N", default_value_t = 10)]
    limit: usize,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Outbox {
    /// Has a relay that is fenced take over from the other process, and publish what waits
    Resume,
}

#[derive(Subcommand)]
enum DeadLetters {
    /// Prints those that are open, oldest first
    List {
        /// Also those that were replayed or discarded
        #[arg(long)]
        all: bool,
    },
    /// Tries once more: tells a payment again, or takes a record as if it came from the topic now
    Replay(Chosen),
    /// Leaves them for good: they are not told, and not listed any more
    Discard(Chosen),
}

#[derive(Args)]
struct Chosen {
    /// Their ids, as listed
    #[arg(
        value_name = "ID",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    ids: Vec<i64>,
    /// All that are open
    #[arg(long)]
    all: bool,
    /// Says what would come of it, and changes nothing
    #[arg(long)]
    dry_run: bool,
}

fn main() -> ExitCode {
    ExitCode::from(run())
}

fn run() -> u8 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are answers, not errors.
            let _ = error.print();
            return if error.use_stderr() { USAGE } else { OK };
        }
    };
    let level = match log_level() {
        Ok(level) => level,
        Err(problem) => return refuse(&problem),
    };
    if let Some(Command::Token) = arguments.command {
        return print_token();
    }
    let loaded = match load(arguments.config.as_deref()) {
        Ok(loaded) => loaded,
        Err(problems) => return refuse(&problems),
    };
    match arguments.command {
        Some(Command::CheckConfig) => {
            let mut output = Output::default();
            output.say(loaded.effective().trim_end());
            for name in loaded.ignored_variables() {
                output.say(format_args!(
                    "# ignored: the environment variable {name} names no key"
                ));
            }
            output.code(
                service::check(&loaded.config).map_or_else(|problem| refuse(&problem), |()| OK),
            )
        }
        Some(Command::DeadLetters { order }) => {
            match OfflineStore::open(&loaded.config.database.path) {
                Ok(database) => dead_letters(database, &order).unwrap_or_else(|error| {
                    complain(format_args!("{error}; try again"));
                    TEMPORARY
                }),
                Err(problem) => cannot_open(&problem),
            }
        }
        Some(Command::Outbox {
            order: Outbox::Resume,
        }) => match OfflineStore::open(&loaded.config.database.path) {
            Ok(database) => resume_relay(database),
            Err(problem) => cannot_open(&problem),
        },
        Some(Command::Channels { order }) => order.run(&loaded.config),
        Some(Command::Restore(restore)) => restore.run(&loaded.config),
        Some(Command::Backup { file }) => match OfflineStore::open(&loaded.config.database.path) {
            Ok(database) => backup(&database, &file),
            Err(problem) => cannot_open(&problem),
        },
        Some(Command::Audit(order)) => audit(&loaded.config, &order),
        // A token was printed before the configuration was looked at.
        Some(Command::Serve | Command::Token) | None => {
            if let Err(error) = start_logger(level) {
                return cannot_start(&StartError::Spawn(error));
            }
            let code = serve(loaded, arguments.config.as_deref());
            log::logger().flush();
            code
        }
    }
}

fn refuse(reason: &dyn Display) -> u8 {
    complain(reason);
    CONFIG
}

fn cannot_open(problem: &OpenError) -> u8 {
    complain(problem);
    if problem.is_temporary() {
        TEMPORARY
    } else {
        CONFIG
    }
}

/// Says what is wrong, if standard error is read.
fn complain(what: impl Display) {
    let _ = writeln!(io::stderr(), "payrelay: {what}");
}

/// Standard output. It may end before all is said, and that stops nobody: not a panic, and not work
/// half done.
#[derive(Default)]
struct Output {
    ended: Option<io::Error>,
}

impl Output {
    /// Says a line; tells whether anybody listens still.
    fn say(&mut self, line: impl Display) -> bool {
        if self.ended.is_none() {
            self.ended = writeln!(io::stdout().lock(), "{line}").err();
        }
        self.ended.is_none()
    }

    /// The exit code. Who closes a pipe has read enough; on a full disk something is missing.
    fn code(self, code: u8) -> u8 {
        match self.ended {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                complain(format_args!("the output could not be written: {error}"));
                if code == OK { UNWRITTEN } else { code }
            }
            _ => code,
        }
    }
}

/// The token goes to the client and nowhere else; payrelay keeps the hash.
fn print_token() -> u8 {
    match access::new_token() {
        Ok(token) => {
            let mut output = Output::default();
            output.say(format_args!(
                "{token}\nhash = \"{}\"",
                TokenHash::of(&token).expose()
            ));
            let _ = writeln!(
                io::stderr(),
                "The first line is the token, for the client; the second belongs into an \
                    [[http.token]]."
            );
            output.code(OK)
        }
        Err(error) => {
            complain(format_args!(
                "the operating system has no randomness: {error}"
            ));
            DIED
        }
    }
}

fn load(argument: Option<&Path>) -> Result<Loaded, Problems> {
    let variable = || {
        env::var_os("PAYRELAY_CONFIG")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    };
    let named = argument
        .map(|path| ("--config", path.to_owned()))
        .or_else(|| Some(("PAYRELAY_CONFIG", variable()?)));
    let text = match &named {
        Some((from, path)) => fs::read_to_string(path).map_err(|error| {
            Problems::one(format!(
                "{from} {}: cannot be read: {error}",
                path.display()
            ))
        })?,
        None => default_file()?,
    };
    let mut environment = BTreeMap::new();
    for (name, value) in env::vars_os() {
        let Ok(name) = name.into_string() else {
            continue;
        };
        if name.starts_with("PAYRELAY_") {
            let text = value
                .into_string()
                .map_err(|_| Problems::one(format!("{name}: is not UTF-8")))?;
            environment.insert(name, text);
        }
    }
    Config::load(&text, &environment)
}

/// The first of the usual files that is there.
fn default_file() -> Result<String, Problems> {
    for path in ["config.toml", "/etc/payrelay/config.toml"] {
        match fs::read_to_string(path) {
            Ok(text) => return Ok(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Problems::one(format!("{path}: cannot be read: {error}"))),
        }
    }
    Ok(String::new())
}

/// Works on the database itself, so that it also helps where payrelay does not run. One that runs
/// sees what was replayed at the next payment, or when its scheduler wakes those who tell (at each
/// round) and the relay (when that has tried nothing for `scheduler.retry_after`).
fn dead_letters(mut database: OfflineStore, order: &DeadLetters) -> Result<u8, StoreError> {
    let (action, chosen) = match order {
        DeadLetters::List { all } => return list_dead_letters(&database, !all),
        DeadLetters::Replay(chosen) => (Action::Replay, chosen),
        DeadLetters::Discard(chosen) => (Action::Discard, chosen),
    };
    let mut act = |which| {
        let node = database.node().clone();
        database.write(|tx| {
            let (dry_run, now) = (chosen.dry_run, Timestamp::now());
            replay::resolve(
                tx,
                ResolveRequest {
                    action,
                    which,
                    dry_run,
                    node: &node,
                    origin: "command line",
                    now,
                },
            )
        })
    };
    let (mut code, mut output) = (OK, Output::default());
    let mut show = |outcomes: &[Outcome]| {
        for Outcome {
            id,
            outcome,
            resolved,
        } in outcomes
        {
            output.say(format_args!(
                "{}{id}: {outcome}",
                if chosen.dry_run { "would be: " } else { "" }
            ));
            if !resolved {
                code = LEFT;
            }
        }
    };
    let mut missing = false;
    for id in &chosen.ids {
        let outcomes = act(Selection::Id(*id))?;
        if outcomes.is_empty() {
            complain(format_args!("there is no dead letter {id}"));
            missing = true;
        }
        show(&outcomes);
    }
    let mut after = chosen.all.then_some(0);
    while let Some(id) = after {
        let outcomes = act(Selection::Open {
            after: id,
            limit: SLICE,
        })?;
        show(&outcomes);
        after = outcomes.last().map(|last| last.id);
        // The writer of a payrelay that runs has its turn between two slices.
        let _ = crossbeam_channel::after(BETWEEN_SLICES).recv();
    }
    Ok(output.code(if missing { LEFT } else { code }))
}

/// How many dead letters are read, or worked on in one transaction, at a time.
const SLICE: usize = 100;

/// Longer than SQLite waits between two tries for a lock, for most of its tries.
const BETWEEN_SLICES: Duration = Duration::from_millis(30);

fn list_dead_letters(database: &OfflineStore, open: bool) -> Result<u8, StoreError> {
    let (mut after, mut output) = (Some(0), Output::default());
    while let Some(id) = after {
        let letters = database.read(|connection| dead_letter::list(connection, open, id, SLICE))?;
        // Our own types in memory cannot fail to be shown.
        let heard = letters
            .iter()
            .all(|letter| output.say(serde_json::to_string(letter).unwrap_or_default()));
        after = letters.last().map(|last| last.id).filter(|_| heard);
    }
    Ok(output.code(OK))
}

fn resume_relay(mut database: OfflineStore) -> u8 {
    match database.write(|tx| relay_action::resume(tx, "command line", Timestamp::now())) {
        Ok(()) => {
            let mut output = Output::default();
            output.say("a relay that is fenced resumes within a second");
            output.code(OK)
        }
        Err(error) => {
            complain(format_args!("{error}; try again"));
            TEMPORARY
        }
    }
}

fn backup(database: &OfflineStore, file: &Path) -> u8 {
    match database.backup(file, Timestamp::now()) {
        Ok(bytes) => {
            let mut output = Output::default();
            output.say(format_args!("{}: {bytes} bytes", file.display()));
            output.code(OK)
        }
        Err(error) if error.is_temporary() => {
            complain(format_args!("{error}; try again"));
            TEMPORARY
        }
        Err(error) => refuse(&error),
    }
}

fn audit(config: &Config, order: &Audit) -> u8 {
    let scope = AuditOptions {
        file_only: order.file_only,
        limit: order.limit,
    };
    match audit::audit(config, scope) {
        Ok(report) => {
            let mut output = Output::default();
            if order.json {
                // Our own types in memory cannot fail to be shown.
                output.say(serde_json::to_string(&report).unwrap_or_default());
            } else {
                output.say(&report);
            }
            output.code(if report.is_clean() { OK } else { LEFT })
        }
        Err(AuditError::Open(problem)) => cannot_open(&problem),
        Err(AuditError::Config(problems)) => refuse(&problems),
        Err(error) => {
            complain(error);
            TEMPORARY
        }
    }
}

fn log_level() -> Result<LevelFilter, Problems> {
    let text = env::var("PAYRELAY_LOG")
        .ok()
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| "info".to_owned());
    text.parse().map_err(|_| {
        Problems::one(format!(
            "PAYRELAY_LOG = {text:?}: allowed is error, warn, info, debug, trace or off"
        ))
    })
}

fn start_logger(level: LevelFilter) -> io::Result<()> {
    cli::logger::start(level)?;
    panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        log::error!(
            "panic in thread {}: {panic}",
            thread.name().unwrap_or("without a name")
        );
    }));
    Ok(())
}

fn serve(mut loaded: Loaded, file: Option<&Path>) -> u8 {
    log::info!("payrelay {}", env!("CARGO_PKG_VERSION"));
    for name in loaded.ignored_variables() {
        log::warn!("the environment variable {name} names no key of the configuration: ignored");
    }
    fit_connections(&mut loaded.config);
    let signals = match signals() {
        Ok(signals) => signals,
        Err(error) => return cannot_start(&StartError::Spawn(error)),
    };
    let service = match Service::start(&loaded.config) {
        Ok(service) => service,
        Err(error) => return cannot_start(&error),
    };
    let code = loop {
        select! {
            recv(signals.stop) -> signal => {
                log::info!("stopping: {}", if signal == Ok(SIGTERM) { "SIGTERM" } else { "SIGINT" });
                break OK;
            }
            recv(signals.reload) -> _ => reload(&loaded, file, &service),
            recv(service.exits()) -> name => {
                log::error!("stopping: thread {} ended by itself", name.unwrap_or("unknown"));
                break DIED;
            }
        }
    };
    match service.stop() {
        Ok(()) => {
            log::info!("stopped");
            code
        }
        Err(late) => {
            for overdue in late {
                log::error!("{overdue}");
            }
            if code == OK { OVERDUE } else { code }
        }
    }
}

/// A supervisor may start it again for what may pass; the rest is for a person to change.
fn cannot_start(error: &StartError) -> u8 {
    log::logger().flush();
    complain(error);
    match error.cause() {
        Cause::Temporary => TEMPORARY,
        Cause::NotAllowed => NOT_ALLOWED,
        Cause::Configuration => CONFIG,
    }
}

/// Puts the tokens of the configuration as it is now in force. Whatever is wrong with it, what was
/// in force stays.
fn reload(running: &Loaded, file: Option<&Path>, service: &Service) {
    let loaded = match load(file) {
        Ok(loaded) => loaded,
        Err(problems) => return log::error!("SIGHUP: nothing is changed: {problems}"),
    };
    match service.replace_tokens(&loaded.config) {
        Ok(change) => log::info!("SIGHUP: tokens: {change}"),
        Err(exposed) => return log::error!("SIGHUP: nothing is changed: {exposed}"),
    }
    let differing = Vec::from_iter(running.differing(&loaded));
    if !differing.is_empty() {
        log::warn!(
            "SIGHUP: only tokens change while payrelay runs; restart it for: {}",
            differing.join(", ")
        );
    }
}

/// Each connection takes a descriptor, and the usual limit is 1,024: raises it as far as is
/// allowed, and serves fewer connections where that is not enough, so that the database, Kafka and
/// Slack always find one.
fn fit_connections(config: &mut Config) {
    /// For what does not grow with the configuration: 28 are open from the start, the rest is for
    /// Kafka's brokers.
    const RESERVED: usize = 94;
    // A reader has the file and its log open; a channel a connection, and one to ask for a name.
    let reserved = RESERVED + 2 * (config.database.readers.get() + 1 + config.slack.routes.len());
    let http = &mut config.http;
    let wanted = http.connections_max.get() + reserved;
    let limit = getrlimit(Resource::Nofile);
    let fits = |limit: Option<u64>| limit.is_none_or(|limit| limit >= wanted as u64);
    if fits(limit.current) {
        return;
    }
    let current = if fits(limit.maximum) {
        Some(wanted as u64)
    } else {
        limit.maximum
    };
    let raised = setrlimit(
        Resource::Nofile,
        Rlimit {
            current,
            maximum: limit.maximum,
        },
    );
    let current = if raised.is_ok() {
        current
    } else {
        limit.current
    };
    if fits(current) {
        return;
    }
    let room = usize::try_from(current.unwrap_or(u64::MAX))
        .unwrap_or(usize::MAX)
        .saturating_sub(reserved);
    http.serve_fewer(NonZeroUsize::new(room).unwrap_or(NonZeroUsize::MIN));
    log::warn!(
        "only {} connections are served at a time, at most {} of one address: {wanted} \
            descriptors are needed for more (ulimit -n)",
        http.connections_max,
        http.client_connections_max
    );
}

/// What was asked for from outside. Apart, so that a stop never waits behind a reload; asking twice
/// is asking once.
struct Asked {
    stop: Receiver<i32>,
    reload: Receiver<i32>,
}

/// Signals as messages. The thread lives as long as the process. A second SIGINT is from somebody
/// who does not want to wait.
fn signals() -> io::Result<Asked> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let ((to_stop, stop), (to_reload, reload)) = (bounded(1), bounded(1));
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let mut interrupted = false;
            for signal in signals.forever() {
                if signal == SIGINT && std::mem::replace(&mut interrupted, true) {
                    log::logger().flush();
                    std::process::exit(i32::from(OVERDUE));
                }
                let _ = if signal == SIGHUP {
                    &to_reload
                } else {
                    &to_stop
                }
                .try_send(signal);
            }
        })?;
    Ok(Asked { stop, reload })
}
