//! Standard output, which may be closed early, and errors on standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anstream::AutoStream;
use payrelay::store::OpenError;
use serde::Serialize;

use super::exit_code;
use super::log_format::LineFormat;

/// Standard output. When its reader closes it, the command still does all of its work.
#[derive(Default)]
pub(super) struct Output {
    error: Option<io::Error>,
}

impl Output {
    /// Writes a line. Returns whether standard output is still open.
    pub(super) fn line(&mut self, line: impl Display) -> bool {
        if self.error.is_none() {
            let mut stdout = AutoStream::auto(io::stdout().lock());
            self.error = writeln!(stdout, "{line}").err();
        }
        self.error.is_none()
    }

    /// Whether its reader still reads.
    pub(super) fn is_open(&self) -> bool {
        self.error.is_none()
    }

    /// Writes a value as one line of JSON.
    pub(super) fn json(&mut self, value: &impl Serialize) -> bool {
        // Serializing our own types cannot fail.
        self.line(serde_json::to_string(value).unwrap_or_default())
    }

    /// Before the next screen of a command that watches: a terminal is cleared, a file gets an
    /// empty line.
    pub(super) fn next_screen(&mut self) -> bool {
        self.line(if io::stdout().is_terminal() {
            "\u{1b}[H\u{1b}[2J"
        } else {
            ""
        })
    }

    /// The exit code. A pipe that was closed early is no error; a full disk is one.
    pub(super) fn exit_code(self, code: u8) -> u8 {
        match self.error {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                print_error(format_args!("the output could not be written: {error}"));
                if code == exit_code::OK {
                    exit_code::OUTPUT_FAILED
                } else {
                    code
                }
            }
            _ => code,
        }
    }
}

/// Prints a single line, and returns the exit code for it.
pub(super) fn output_line(line: impl Display) -> u8 {
    let mut output = Output::default();
    output.line(line);
    output.exit_code(exit_code::OK)
}

/// Writes to standard error. Nothing can be done when that is closed.
pub(super) fn print_error(error: impl Display) {
    let _ = writeln!(io::stderr(), "payrelay: {error}");
}

/// Writes an error that ends the start of the service, as a line of its log.
pub(super) fn print_start_error(format: LineFormat, error: impl Display) {
    let _ = format.write_start_error(&mut io::stderr(), &error.to_string());
}

/// Whether nothing but errors goes to standard error: `--quiet`.
static QUIET: AtomicBool = AtomicBool::new(false);

pub(super) fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Relaxed);
}

pub(super) fn is_quiet() -> bool {
    QUIET.load(Relaxed)
}

/// Writes an explanation to standard error, so that standard output has the result alone.
pub(super) fn print_note(note: &str) {
    if is_quiet() {
        return;
    }
    let _ = writeln!(io::stderr(), "{note}");
}

/// Prints a problem of the configuration, and returns its exit code.
pub(super) fn print_config_error(problem: impl Display) -> u8 {
    print_error(problem);
    exit_code::CONFIG
}

/// Prints an error that may pass, and returns its exit code.
pub(super) fn print_temporary_error(error: impl Display) -> u8 {
    print_error(format_args!("{error}; try again"));
    exit_code::TEMPORARY
}

/// Prints the reason why a database cannot be opened, and returns its exit code.
pub(super) fn print_open_error(error: &OpenError) -> u8 {
    print_error(error);
    if error.is_temporary() {
        exit_code::TEMPORARY
    } else {
        exit_code::CONFIG
    }
}
