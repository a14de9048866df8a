//! `payrelay dead-letters list` and `show`: read-only.

use clap::Args;
use payrelay::store::dead_letter::{self, DeadLetterFilter};
use payrelay::store::{OfflineStore, StoreError};
use serde_json::Value;

use crate::cli::client::Target;
use crate::cli::exit_code;
use crate::cli::output::{Output, print_error, print_note};
use crate::cli::payment::show_when;
use crate::cli::state::{State, to_json};
use crate::cli::table::{Align, Table, show_cell};

#[derive(Args, Default)]
pub(in crate::cli) struct DeadLettersList {
    /// Also those that were replayed or discarded
    #[arg(long)]
    all: bool,
    /// Prints a JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(in crate::cli) struct DeadLetterShow {
    /// Its id, as listed
    #[arg(value_name = "ID", value_parser = clap::value_parser!(i64).range(0..))]
    id: i64,
}

/// How many are read at a time.
const PAGE: usize = 500;

impl DeadLettersList {
    pub(in crate::cli) fn run(&self, target: &Target) -> u8 {
        self.show(target).unwrap_or_else(|code| code)
    }

    fn show(&self, target: &Target) -> Result<u8, u8> {
        let state = State::open(target)?;
        let path = format!("/admin/dead-letters?all={}&limit={PAGE}", self.all);
        let letters = state.list(&path, "dead_letters", |database| self.read(database))?;
        let mut output = Output::default();
        let mut table = Table::new(&[
            ("id", Align::Right),
            ("kind", Align::Left),
            ("payment", Align::Right),
            ("state", Align::Left),
            ("times", Align::Right),
            ("age", Align::Right),
            ("why", Align::Left),
        ]);
        for letter in &letters {
            if self.json {
                output.json(letter);
                continue;
            }
            let is_record = !letter["record"].is_null();
            table.row([
                show_cell(&letter["id"]),
                if is_record { "record" } else { "event" }.to_owned(),
                show_cell(&letter["payment_id"]),
                show_cell(&letter["state"]),
                show_cell(&letter["count"]),
                show_when(&letter["received_at"]),
                show_cell(&letter["reason"]),
            ]);
        }
        table.print(&mut output);
        if letters.is_empty() {
            print_note(if self.all {
                "there are no dead letters"
            } else {
                "there are no open dead letters"
            });
        }
        Ok(output.exit_code(exit_code::OK))
    }

    fn read(&self, database: &OfflineStore) -> Result<Vec<Value>, StoreError> {
        let filter = if self.all {
            DeadLetterFilter::All
        } else {
            DeadLetterFilter::Open
        };
        let mut all = Vec::new();
        let mut after = Some(0);
        while let Some(id) = after {
            let page = database
                .read(|connection| dead_letter::list_dead_letters(connection, filter, id, PAGE))?;
            after = page.last().map(|last| last.id);
            all.extend(page.iter().map(to_json));
        }
        Ok(all)
    }
}

impl DeadLetterShow {
    pub(in crate::cli) fn run(&self, target: &Target) -> u8 {
        self.show(target).unwrap_or_else(|code| code)
    }

    fn show(&self, target: &Target) -> Result<u8, u8> {
        let state = State::open(target)?;
        let letter = state.get(&format!("/admin/dead-letters/{}", self.id), |database| {
            let found = database.read(|tx| dead_letter::find_dead_letter(tx, self.id))?;
            Ok(found.as_ref().map(to_json))
        })?;
        let Some(letter) = letter else {
            print_error(format_args!("there is no dead letter {}", self.id));
            return Ok(exit_code::PARTIAL);
        };
        let mut output = Output::default();
        output.json(&letter);
        Ok(output.exit_code(exit_code::OK))
    }
}
