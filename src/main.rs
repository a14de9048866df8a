//! The program: runs the command line, and ends with its exit code.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(cli::run_command_line())
}
