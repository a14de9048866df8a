//! `/admin/outbox`: the events that wait to be published, or that the broker rejects.

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::super::app::App;
use super::super::params::{PAGE, parse_id_param, parse_page_size_param, query_params};
use super::super::problem::Problem;
use super::super::response::{Body, json_response};
use crate::store::outbox_view::{self, OutboxEventView, OutboxFilter};

/// A page of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) struct OutboxPage {
    filter: OutboxFilter,
    after: i64,
    limit: usize,
}

impl OutboxPage {
    pub(super) fn parse(query: &str) -> Result<Self, Problem> {
        let mut page = Self {
            filter: OutboxFilter::Init,
            after: 0,
            limit: PAGE,
        };
        for (name, value) in query_params(query) {
            match (name, value) {
                ("state", "init") => page.filter = OutboxFilter::Init,
                ("state", "rejected") => page.filter = OutboxFilter::Rejected,
                ("state", _) => {
                    return Err(Problem::invalid_field(name, "must be init or rejected"));
                }
                ("after", _) => page.after = parse_id_param(name, value)?,
                ("limit", _) => page.limit = parse_page_size_param(value)?,
                _ => {
                    let detail = "there is no such parameter; there are state, after and limit";
                    return Err(Problem::invalid_field(name, detail));
                }
            }
        }
        Ok(page)
    }

    fn next_path(self, last: i64) -> String {
        let state = match self.filter {
            OutboxFilter::Init => "init",
            OutboxFilter::Rejected => "rejected",
        };
        format!(
            "/admin/outbox?state={state}&after={last}&limit={}",
            self.limit
        )
    }
}

#[derive(Serialize)]
struct OutboxList {
    events: Vec<OutboxEventView>,
    /// The path of later ones.
    next: Option<String>,
}

impl App {
    pub(super) async fn list_outbox(&self, page: OutboxPage) -> Result<Response<Body>, Problem> {
        let OutboxPage {
            filter,
            after,
            limit,
        } = page;
        let node = self.context.store.node().clone();
        // One more row than the page shows whether there is a next page.
        let mut events = self
            .query(move |connection| {
                outbox_view::list_outbox_events(connection, &node, filter, after, limit + 1)
            })
            .await?;
        let has_more = events.len() > limit;
        events.truncate(limit);
        let next = events.last().filter(|_| has_more);
        let next = next.map(|last| page.next_path(last.outbox_id));
        Ok(json_response(StatusCode::OK, &OutboxList { events, next }))
    }
}
