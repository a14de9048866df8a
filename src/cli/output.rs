//! Standard output, which may be closed early, and errors on standard error.

use std::fmt::Display;
use std::io::{self, Write as _};

use payrelay::store::OpenError;

use super::exit_code;

/// Standard output. When its reader closes it, the command still does all of its work.
#[derive(Default)]
pub(super) struct Output {
    error: Option<io::Error>,
}

impl Output {
    /// Writes a line. Returns whether standard output is still open.
    pub(super) fn line(&mut self, line: impl Display) -> bool {
        if self.error.is_none() {
            self.error = writeln!(io::stdout().lock(), "{line}").err();
        }
        self.error.is_none()
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

/// Writes an explanation to standard error, so that standard output has the result alone.
pub(super) fn print_note(note: &str) {
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
