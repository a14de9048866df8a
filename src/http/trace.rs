//! `GET /payments?trace_id=`: the payments of a trace. A request reads a bounded part of the
//! outbox, and its response leads to the part before.

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::app::App;
use super::params::{parse_id_param, query_params};
use super::problem::Problem;
use super::response::{Body, json_response};
use crate::domain::payment::Payment;
use crate::domain::trace_context::TraceId;
use crate::store::trace::{self, EVENTS_READ};

/// A part of the outbox to search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TraceSearch {
    trace: TraceId,
    before: i64,
}

impl TraceSearch {
    /// Whether a query asks for a trace.
    pub(super) fn is_meant(query: &str) -> bool {
        query_params(query).any(|(name, _)| name == "trace_id")
    }

    pub(super) fn parse(query: &str) -> Result<Self, Problem> {
        let mut trace = None;
        let mut before = i64::MAX;
        for (name, value) in query_params(query) {
            match name {
                "trace_id" => trace = TraceId::parse(value),
                "before" => before = parse_id_param(name, value)?,
                _ => {
                    let detail = "there is no such parameter; there are trace_id and before";
                    return Err(Problem::invalid_field(name, detail));
                }
            }
        }
        let trace = trace.ok_or_else(|| {
            let detail = "must be 32 hexadecimal digits, not all of them zero";
            Problem::invalid_field("trace_id", detail)
        })?;
        Ok(Self { trace, before })
    }
}

#[derive(Serialize)]
struct TracePayments<'a> {
    payments: &'a [Payment],
    /// The path of the part of the outbox before this one, also if this one has no such payment.
    next: Option<String>,
}

impl App {
    pub(super) async fn payments_of_trace(
        &self,
        search: TraceSearch,
    ) -> Result<Response<Body>, Problem> {
        let TraceSearch { trace, before } = search;
        let wanted = trace.clone();
        let page = self
            .query(move |connection| {
                trace::payments_of_trace(connection, &wanted, before, EVENTS_READ)
            })
            .await?;
        let next = page
            .next_before
            .map(|before| format!("/payments?trace_id={}&before={before}", trace.as_str()));
        let view = TracePayments {
            payments: &page.payments,
            next,
        };
        Ok(json_response(StatusCode::OK, &view))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_for_a_trace_has_its_id_and_its_beginning() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let search = TraceSearch::parse(&format!("trace_id={id}&before=7")).unwrap();
        assert_eq!((search.trace.as_str(), search.before), (id, 7));
        let upper = TraceSearch::parse(&format!("trace_id={}", id.to_uppercase())).unwrap();
        assert_eq!(upper.trace, search.trace);
        let zero = "0".repeat(32);
        for query in ["trace_id=", "trace_id=7", &format!("trace_id={zero}")] {
            assert!(TraceSearch::parse(query).is_err(), "{query}");
        }
        assert!(TraceSearch::parse(&format!("trace_id={id}&limit=1")).is_err());
    }
}
