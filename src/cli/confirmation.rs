//! `--yes`: what destroys something needs it, unless a person sits at a terminal. No command asks.

use std::io::{self, IsTerminal as _};

use clap::Args;

use super::exit_code;
use super::output::print_error;

#[derive(Args)]
pub(super) struct Confirmation {
    /// Confirms. Needed unless standard input and standard error are terminals
    #[arg(long)]
    yes: bool,
}

impl Confirmation {
    /// Whether the command may do this. Otherwise it says what to add, and returns the exit code.
    pub(super) fn check(&self, consequence: &str) -> Result<(), u8> {
        if self.yes || io::stdin().is_terminal() && io::stderr().is_terminal() {
            return Ok(());
        }
        print_error(format_args!("{consequence}: add --yes"));
        Err(exit_code::USAGE)
    }
}
