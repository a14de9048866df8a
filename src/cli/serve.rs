//! `payrelay serve`: the service, from its start to the signal that stops it.

use std::path::{self, Path};
use std::{io, process, thread};

use crossbeam_channel::{Receiver, bounded, select};
use log::LevelFilter;
use payrelay::config::LoadedConfig;
use payrelay::service::{Cause, Service, ServiceStartError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::log_format::LineFormat;
use super::output::print_start_error;
use super::supervisor::Supervisor;
use super::{configuration, descriptors, exit_code, logger};

/// Runs until a signal, or until a thread dies.
pub(super) fn run_serve_command(
    loaded: LoadedConfig,
    file: Option<&Path>,
    level: LevelFilter,
) -> u8 {
    let format = LineFormat::new(loaded.config.log.format);
    if let Err(error) = logger::start_logger(level, format) {
        return report_serve_error(&ServiceStartError::Spawn(error), format);
    }
    let code = serve_until_stopped(loaded, file, format);
    log::logger().flush();
    code
}

fn serve_until_stopped(mut loaded: LoadedConfig, file: Option<&Path>, format: LineFormat) -> u8 {
    let configuration = loaded.file.as_deref().map_or_else(
        || "without a configuration file".to_owned(),
        |file| {
            let absolute = path::absolute(file).unwrap_or_else(|_| file.to_owned());
            format!("configuration {}", absolute.display())
        },
    );
    log::info!(
        event = "starting", version = env!("CARGO_PKG_VERSION");
        "payrelay {}, {configuration}", env!("CARGO_PKG_VERSION")
    );
    for name in loaded.ignored_variables() {
        log::warn!(
            event = "variable_ignored", variable = name;
            "ignoring the environment variable {name}: it names no configuration key"
        );
    }
    for warning in loaded.warnings() {
        log::warn!(event = "configuration_warning"; "{warning}");
    }
    descriptors::raise_descriptor_limit(&mut loaded.config);
    let signals = match ServeSignals::open() {
        Ok(signals) => signals,
        Err(error) => return report_serve_error(&ServiceStartError::Spawn(error), format),
    };
    let supervisor = Supervisor::detect();
    let starting = match supervisor.begin_start() {
        Ok(starting) => starting,
        Err(error) => return report_serve_error(&ServiceStartError::Spawn(error), format),
    };
    let service = match Service::start(&loaded.config) {
        Ok(service) => service,
        Err(error) => {
            return report_serve_error(&error.in_file(loaded.file.as_deref()), format);
        }
    };
    drop(starting);
    let serving = Serving {
        service,
        signals,
        supervisor,
        loaded,
        file,
    };
    let code = serving.wait_until_stopped();
    serving.supervisor.stopping();
    stop_serving(serving.service, code)
}

/// A running service, and those that it listens to.
struct Serving<'a> {
    service: Service,
    signals: ServeSignals,
    supervisor: Supervisor,
    loaded: LoadedConfig,
    file: Option<&'a Path>,
}

impl Serving<'_> {
    /// Waits for a reason to stop, and returns the exit code for it.
    fn wait_until_stopped(&self) -> u8 {
        self.supervisor.ready();
        let ticks = self.supervisor.ticks();
        loop {
            select! {
                recv(self.signals.stop) -> signal => {
                    let name = if signal == Ok(SIGTERM) { "SIGTERM" } else { "SIGINT" };
                    log::info!(event = "stopping", signal = name; "stopping: {name}");
                    return exit_code::OK;
                }
                recv(self.signals.reload) -> _ => {
                    self.supervisor.reloading();
                    reload_while_serving(&self.loaded, self.file, &self.service);
                    self.supervisor.ready();
                }
                recv(self.service.exits()) -> name => {
                    let name = name.unwrap_or("unknown");
                    log::error!(
                        event = "thread_exited", exited = name;
                        "stopping: thread {name} exited unexpectedly"
                    );
                    return exit_code::THREAD_DIED;
                }
                recv(ticks) -> _ => {
                    let status = self.service.status_line();
                    self.supervisor.report(&status, self.service.answers_requests());
                }
            }
        }
    }
}

fn stop_serving(service: Service, code: u8) -> u8 {
    match service.stop() {
        Ok(()) => {
            log::info!(event = "stopped"; "stopped");
            code
        }
        Err(timeouts) => {
            for timeout in timeouts {
                log::error!(event = "stop_timeout"; "{timeout}");
            }
            if code == exit_code::OK {
                exit_code::STOP_TIMEOUT
            } else {
                code
            }
        }
    }
}

/// A supervisor may start payrelay again after an error that may pass; an operator has to mend the
/// others.
fn report_serve_error(error: &ServiceStartError, format: LineFormat) -> u8 {
    log::logger().flush();
    print_start_error(format, error);
    match error.cause() {
        Cause::Temporary => exit_code::TEMPORARY,
        Cause::NotAllowed => exit_code::NOT_ALLOWED,
        Cause::Configuration => exit_code::CONFIG,
    }
}

/// Reads the configuration again, and replaces the tokens. When it has a problem, nothing changes.
fn reload_while_serving(running: &LoadedConfig, file: Option<&Path>, service: &Service) {
    let loaded = match configuration::load_configuration(file) {
        Ok(loaded) => loaded,
        Err(problems) => {
            service.metrics().reloaded(false);
            return log::error!(event = "reload_refused"; "SIGHUP: nothing is changed: {problems}");
        }
    };
    match service.replace_tokens(&loaded.config) {
        Ok(change) => log::info!(event = "tokens_reloaded"; "SIGHUP: tokens: {change}"),
        Err(exposed) => {
            service.metrics().reloaded(false);
            return log::error!(event = "reload_refused"; "SIGHUP: nothing is changed: {exposed}");
        }
    }
    service.metrics().reloaded(true);
    let changed = Vec::from_iter(running.changed_keys(&loaded));
    if !changed.is_empty() {
        log::warn!(
            event = "restart_needed";
            "SIGHUP: only tokens change while payrelay runs; restart it for: {}",
            changed.join(", ")
        );
    }
}

/// Signals as messages. Stop and reload have a channel each, so that a stop never waits behind a
/// reload. A channel holds one message: two requests are one.
struct ServeSignals {
    stop: Receiver<i32>,
    reload: Receiver<i32>,
}

impl ServeSignals {
    /// Starts the thread that receives signals. It lives as long as the process.
    fn open() -> io::Result<Self> {
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
        let (send_stop, stop) = bounded(1);
        let (send_reload, reload) = bounded(1);
        let receive = move || {
            let mut interrupted = false;
            for signal in signals.forever() {
                // The operator does not want to wait.
                if signal == SIGINT && interrupted {
                    log::logger().flush();
                    process::exit(i32::from(exit_code::STOP_TIMEOUT));
                }
                interrupted |= signal == SIGINT;
                let channel = if signal == SIGHUP {
                    &send_reload
                } else {
                    &send_stop
                };
                let _ = channel.try_send(signal);
            }
        };
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(receive)?;
        Ok(Self { stop, reload })
    }
}
