//! `GET /payments?since=&until=`: the payments of a time, such as those of a day.

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::app::App;
use super::params::{PAGE, parse_id_param, parse_page_size_param, query_params};
use super::problem::Problem;
use super::response::{Body, json_response};
use crate::domain::payment::{Payment, Status};
use crate::domain::timestamp::Timestamp;
use crate::store::takings::{self, TakingsFilter};

/// A page of the payments of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TakingsPage {
    filter: TakingsFilter,
    after: i64,
    limit: usize,
}

impl TakingsPage {
    /// Whether a query asks for a time, and not for a reservation.
    pub(super) fn is_meant(query: &str) -> bool {
        query_params(query).any(|(name, _)| ["since", "until"].contains(&name))
    }

    pub(super) fn parse(query: &str) -> Result<Self, Problem> {
        let mut since = None;
        let mut until = None;
        let mut status = None;
        let mut after = 0;
        let mut limit = PAGE;
        for (name, value) in query_params(query) {
            match name {
                "since" => since = Some(parse_time_param(name, value)?),
                "until" => until = Some(parse_time_param(name, value)?),
                "status" => {
                    let known = Status::parse(value);
                    status = Some(known.ok_or_else(|| {
                        Problem::invalid_field(name, "must be COMPLETED or FAILED")
                    })?);
                }
                "after" => after = parse_id_param(name, value)?,
                "limit" => limit = parse_page_size_param(value)?,
                _ => {
                    return Err(Problem::invalid_field(
                        name,
                        "there is no such parameter; there are since, until, status, after and \
                            limit",
                    ));
                }
            }
        }
        let missing = |name: &str| Problem::invalid_field(name, "is missing: since and until");
        let filter = TakingsFilter {
            since: since.ok_or_else(|| missing("since"))?,
            until: until.ok_or_else(|| missing("until"))?,
            status,
        };
        Ok(Self {
            filter,
            after,
            limit,
        })
    }

    fn next_path(self, last: i64) -> String {
        let TakingsFilter {
            since,
            until,
            status,
        } = self.filter;
        let status =
            status.map_or_else(String::new, |status| format!("&status={}", status.as_str()));
        let limit = self.limit;
        format!("/payments?since={since}&until={until}{status}&after={last}&limit={limit}")
    }
}

/// RFC 3339. Clients may encode the colons and the plus.
fn parse_time_param(name: &str, value: &str) -> Result<Timestamp, Problem> {
    let mut text = value.to_owned();
    for (code, sign) in [("%3A", ":"), ("%3a", ":"), ("%2B", "+"), ("%2b", "+")] {
        text = text.replace(code, sign);
    }
    Timestamp::parse(&text).ok_or_else(|| {
        Problem::invalid_field(
            name,
            "must be a time such as 2026-11-27T00:00:00Z (RFC 3339)",
        )
    })
}

#[derive(Serialize)]
struct Takings<'a> {
    payments: &'a [Payment],
    /// The path of later payments.
    next: Option<String>,
}

impl App {
    pub(super) async fn payments_of_time(
        &self,
        page: TakingsPage,
    ) -> Result<Response<Body>, Problem> {
        let TakingsPage {
            filter,
            after,
            limit,
        } = page;
        // One more row than the page shows whether there is a next page.
        let mut payments = self
            .query(move |connection| {
                takings::payments_of_time(connection, filter, after, limit + 1)
            })
            .await?;
        let has_more = payments.len() > limit;
        payments.truncate(limit);
        let next = payments.last().filter(|_| has_more);
        let next = next.map(|last| page.next_path(last.id));
        let view = Takings {
            payments: &payments,
            next,
        };
        Ok(json_response(StatusCode::OK, &view))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_a_time_leads_to_the_next_one() {
        let query = "since=2026-11-27T00%3A00:00Z&until=2026-11-28T00:00:00%2b09:00&status=FAILED";
        let page = TakingsPage::parse(query).unwrap();
        let next = page.next_path(7);
        let (path, query) = next.split_once('?').unwrap();
        let following = TakingsPage { after: 7, ..page };
        assert_eq!(path, "/payments");
        assert_eq!(TakingsPage::parse(query), Ok(following));
        for query in [
            "since=2026-11-27T00:00:00Z",
            "since=today&until=today",
            "until=",
        ] {
            assert!(TakingsPage::parse(query).is_err(), "{query}");
        }
    }
}
