//! Which dead letters a command acts on.

use clap::Args;

#[derive(Args)]
pub(in crate::cli) struct DeadLetterSelection {
    /// Their ids, as listed
    #[arg(
        value_name = "ID",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    pub(super) ids: Vec<i64>,
    /// All open ones
    #[arg(long)]
    pub(super) all: bool,
    /// Prints the outcome that it would have, and changes nothing
    #[arg(long)]
    pub(super) dry_run: bool,
}

impl DeadLetterSelection {
    /// Before the outcome of a letter.
    pub(super) fn outcome_prefix(&self) -> &'static str {
        if self.dry_run { "would be: " } else { "" }
    }
}
