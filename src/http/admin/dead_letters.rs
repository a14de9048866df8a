//! `/admin/dead-letters`: lists them, shows one, replays or discards them.

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::super::app::App;
use super::super::auth::AuthenticatedClient;
use super::super::params::{
    PAGE, PAGE_MAX, parse_bool_param, parse_id_param, parse_page_size_param, query_params,
};
use super::super::problem::Problem;
use super::super::response::{Body, json_response};
use crate::domain::timestamp::Timestamp;
use crate::store::dead_letter::{self, DeadLetterFilter, DeadLetterView};
use crate::store::dead_letter_action::{
    self, DeadLetterAction, DeadLetterOutcome, DeadLetterRequest, Selection,
};
use crate::store::{Connection, Transaction};

/// A page of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) struct DeadLetterPage {
    /// Also closed ones.
    pub(super) filter: DeadLetterFilter,
    pub(super) after: i64,
    pub(super) limit: usize,
}

impl DeadLetterPage {
    pub(super) fn parse(query: &str) -> Result<Self, Problem> {
        let mut page = Self {
            filter: DeadLetterFilter::Open,
            after: 0,
            limit: PAGE,
        };
        for (name, value) in query_params(query) {
            match name {
                "all" => {
                    page.filter = if parse_bool_param(name, value)? {
                        DeadLetterFilter::All
                    } else {
                        DeadLetterFilter::Open
                    }
                }
                "after" => page.after = parse_id_param(name, value)?,
                "limit" => page.limit = parse_page_size_param(value)?,
                _ => {
                    let detail = "there is no such parameter; there are all, after and limit";
                    return Err(Problem::invalid_field(name, detail));
                }
            }
        }
        Ok(page)
    }
}

/// A request to replay or discard dead letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::http) struct DeadLetterResolution {
    pub(super) selection: Selection,
    pub(super) action: DeadLetterAction,
    /// Only show the outcome.
    pub(super) dry_run: bool,
}

impl DeadLetterResolution {
    /// The oldest open letters: one request resolves up to a page of them.
    pub(super) const ALL: Selection = Selection::Open {
        after: 0,
        limit: PAGE_MAX,
    };

    pub(super) fn parse(
        selection: Selection,
        action: DeadLetterAction,
        query: &str,
    ) -> Result<Self, Problem> {
        let mut resolution = Self {
            selection,
            action,
            dry_run: false,
        };
        let mut all = false;
        for (name, value) in query_params(query) {
            match (name, &mut resolution.selection) {
                ("dry_run", _) => resolution.dry_run = parse_bool_param(name, value)?,
                ("all", Selection::Open { .. }) => all = parse_bool_param(name, value)?,
                ("after", Selection::Open { after, .. }) => {
                    *after = parse_id_param(name, value)?;
                }
                _ => {
                    let detail = "there is no such parameter; there is dry_run, and for all \
                        letters all=true and after";
                    return Err(Problem::invalid_field(name, detail));
                }
            }
        }
        if matches!(resolution.selection, Selection::Open { .. }) && !all {
            return Err(Problem::invalid_field(
                "all",
                "is missing: add ?all=true to act on all open dead letters",
            ));
        }
        Ok(resolution)
    }

    /// The path of the same action on the letters after these.
    fn next_path(&self, outcomes: &[DeadLetterOutcome]) -> Option<String> {
        match (self.selection, outcomes.last()) {
            (Selection::Open { limit, .. }, Some(last)) if outcomes.len() == limit => {
                Some(format!(
                    "/admin/dead-letters/{}?all=true&after={}&dry_run={}",
                    self.action.as_str(),
                    last.id,
                    self.dry_run
                ))
            }
            _ => None,
        }
    }
}

#[derive(Serialize)]
struct DeadLetterList<'a> {
    dead_letters: &'a [DeadLetterView],
    /// The path of later ones.
    next: Option<String>,
}

#[derive(Serialize)]
struct DeadLetterResolutionView<'a> {
    dry_run: bool,
    outcomes: &'a [DeadLetterOutcome],
    /// The path of the same action on later ones.
    next: Option<String>,
}

impl App {
    pub(super) async fn list_dead_letters(
        &self,
        page: DeadLetterPage,
    ) -> Result<Response<Body>, Problem> {
        let DeadLetterPage {
            filter,
            after,
            limit,
        } = page;
        // One more row than the page shows whether there is a next page.
        let list = move |connection: &Connection| {
            dead_letter::list_dead_letters(connection, filter, after, limit + 1)
        };
        let mut letters = self.query(list).await?;
        let has_more = letters.len() > limit;
        letters.truncate(limit);
        let next = letters.last().filter(|_| has_more).map(|last| {
            format!(
                "/admin/dead-letters?all={}&after={}&limit={limit}",
                filter == DeadLetterFilter::All,
                last.id
            )
        });
        Ok(json_response(
            StatusCode::OK,
            &DeadLetterList {
                dead_letters: &letters,
                next,
            },
        ))
    }

    pub(super) async fn find_dead_letter(&self, id: i64) -> Result<Response<Body>, Problem> {
        let letter = self
            .query(move |connection| dead_letter::find_dead_letter(connection, id))
            .await?;
        let letter = letter.ok_or_else(|| no_dead_letter(id))?;
        Ok(json_response(StatusCode::OK, &letter))
    }

    pub(super) async fn resolve_dead_letters(
        &self,
        client: &AuthenticatedClient,
        resolution: DeadLetterResolution,
        reason: Option<String>,
    ) -> Result<Response<Body>, Problem> {
        let DeadLetterResolution {
            selection,
            action,
            dry_run,
        } = resolution;
        let node = self.context.store.node().clone();
        let origin = client.origin();
        let now = Timestamp::now();
        let resolve = move |tx: &Transaction<'_>| {
            let request = DeadLetterRequest {
                action,
                which: selection,
                dry_run,
                node: &node,
                origin: &origin,
                reason: reason.as_deref(),
                now,
            };
            dead_letter_action::act_on_dead_letters(tx, request)
        };
        let outcomes = self.write(resolve).await?;
        if let (Selection::Id(id), []) = (selection, outcomes.as_slice()) {
            return Err(no_dead_letter(id));
        }
        if !dry_run {
            // The sampler logs the actions, also those of commands.
            self.context.snapshots.latest();
            // Wakes the threads that deliver or publish it again.
            self.context.notifiers.wake();
            self.context.relay.wake();
        }
        Ok(json_response(
            StatusCode::OK,
            &DeadLetterResolutionView {
                dry_run,
                outcomes: &outcomes,
                next: resolution.next_path(&outcomes),
            },
        ))
    }
}

fn no_dead_letter(id: i64) -> Problem {
    Problem::not_found(format!("there is no dead letter {id}"))
}
