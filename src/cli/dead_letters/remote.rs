//! `payrelay dead-letters replay` and `discard` of a payrelay elsewhere, through its API.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use payrelay::store::dead_letter_action::DeadLetterAction;
use serde_json::Value;

use super::selection::DeadLetterSelection;
use crate::cli::client::Client;
use crate::cli::exit_code;
use crate::cli::output::{Output, print_error};
use crate::cli::progress::{Measure, Progress};
use crate::cli::table::{escape_controls, show_cell};

/// Replays or discards the selected letters, and prints each outcome.
pub(super) struct RemoteResolution<'a> {
    client: &'a Client,
    action: DeadLetterAction,
    selection: &'a DeadLetterSelection,
    reason: Option<&'a str>,
    output: Output,
    code: u8,
}

impl<'a> RemoteResolution<'a> {
    pub(super) fn new(
        client: &'a Client,
        action: DeadLetterAction,
        selection: &'a DeadLetterSelection,
        reason: Option<&'a str>,
    ) -> Self {
        Self {
            client,
            action,
            selection,
            reason,
            output: Output::default(),
            code: exit_code::OK,
        }
    }

    pub(super) fn run(mut self) -> u8 {
        let resolved = if self.selection.all {
            self.resolve_all()
        } else {
            self.resolve_each()
        };
        match resolved {
            Ok(()) => self.output.exit_code(self.code),
            Err(code) => code,
        }
    }

    fn resolve_each(&mut self) -> Result<(), u8> {
        let dry_run = self.selection.dry_run;
        let verb = self.action.as_str();
        for id in &self.selection.ids {
            let path = format!("/admin/dead-letters/{id}/{verb}?dry_run={dry_run}");
            if let Some(answer) = self.client.act(&path, self.reason)? {
                self.print(&answer);
            } else {
                print_error(format_args!("there is no dead letter {id}"));
                self.code = exit_code::PARTIAL;
            }
        }
        Ok(())
    }

    /// A page of letters is resolved by each request.
    fn resolve_all(&mut self) -> Result<(), u8> {
        let overview = self.client.find("/overview")?.unwrap_or_default();
        let total = overview["pending"]["dead_letters"]["count"].as_u64();
        let counter = Arc::new(AtomicU64::new(0));
        let resolved = Arc::clone(&counter);
        let _progress = Progress::show("dead letters", move || Measure::Count {
            done: resolved.load(Relaxed),
            total: total.unwrap_or(0),
        });
        let mut next = Some(format!(
            "/admin/dead-letters/{}?all=true&dry_run={}",
            self.action.as_str(),
            self.selection.dry_run
        ));
        while let Some(path) = next {
            let answer = self.client.act(&path, self.reason)?.unwrap_or_default();
            self.print(&answer);
            let count = answer["outcomes"].as_array().map_or(0, Vec::len);
            counter.fetch_add(count as u64, Relaxed);
            next = answer["next"].as_str().map(str::to_owned);
        }
        Ok(())
    }

    fn print(&mut self, answer: &Value) {
        let prefix = self.selection.outcome_prefix();
        for outcome in answer["outcomes"].as_array().into_iter().flatten() {
            let id = &outcome["id"];
            let text = escape_controls(&show_cell(&outcome["outcome"]));
            self.output.line(format_args!("{prefix}{id}: {text}"));
            if outcome["resolved"] != true {
                self.code = exit_code::PARTIAL;
            }
        }
    }
}
