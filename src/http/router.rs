//! The router: finds the endpoint of a request. Everything that needs no store is decided in pure
//! functions.

use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{EXPECT, HeaderMap, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};

use super::admin::{AdminRoute, route_admin_request};
use super::app::App;
use super::auth::AuthenticatedClient;
use super::body::IncomingBody;
use super::host::check_host_header;
use super::openapi;
use super::page::{self, PageFile};
use super::params::{
    parse_id_param, parse_page_params, parse_path_param, query_params, reject_duplicate_params,
    reject_params,
};
use super::peer::Peer;
use super::problem::Problem;
use super::response::{Body, json_response};
use super::route_pattern::RoutePattern;
use super::takings::TakingsPage;
use super::trace::TraceSearch;
use crate::domain::access::Access;

/// A small body arrives together with its head: a refusal waits this long for it, so that the
/// connection can stay open.
const ARRIVED: Duration = Duration::from_millis(5);

/// The endpoints, for people.
pub(super) const ROUTES: [&str; 28] = [
    "GET /",
    "GET /ui/",
    "GET /openapi.json",
    "POST /payments",
    "GET /payments/{id}",
    "GET /payments?reservation_id={id}",
    "GET /payments?since={time}&until={time}",
    "GET /payments?trace_id={trace_id}",
    "GET /users/{id}/payment-history",
    "GET /health/live",
    "GET /health/ready",
    "GET /metrics",
    "GET /overview",
    "GET /overview/history",
    "GET /admin/channels",
    "POST /admin/channels/{name}/pause",
    "POST /admin/channels/{name}/resume",
    "POST /admin/channels/{name}/skip",
    "GET /admin/dead-letters",
    "GET /admin/dead-letters/{id}",
    "POST /admin/dead-letters/{id}/replay",
    "POST /admin/dead-letters/{id}/discard",
    "POST /admin/dead-letters/replay?all=true",
    "POST /admin/dead-letters/discard?all=true",
    "GET /admin/outbox",
    "GET /admin/topic",
    "POST /admin/relay/resume",
    "POST /admin/relay/wake",
];

/// A request for an existing endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
enum HttpRoute {
    About,
    Page(&'static PageFile),
    /// To the page.
    ToPage,
    OpenApi,
    Pay,
    Paid {
        reservation_id: i64,
    },
    Payment {
        id: i64,
    },
    Takings(TakingsPage),
    Trace(TraceSearch),
    History {
        user_id: i64,
        before: Option<i64>,
        limit: usize,
    },
    Live,
    Ready,
    Metrics,
    Overview,
    OverviewHistory,
    Admin(AdminRoute),
}

impl HttpRoute {
    /// The access that it needs.
    fn needed_access(&self) -> Access {
        match self {
            Self::Live | Self::Ready | Self::Metrics => Access::Metrics,
            Self::About
            | Self::Page(_)
            | Self::ToPage
            | Self::OpenApi
            | Self::Paid { .. }
            | Self::Payment { .. }
            | Self::Takings(_)
            | Self::Trace(_)
            | Self::History { .. }
            | Self::Overview
            | Self::OverviewHistory => Access::ReadOnly,
            Self::Pay => Access::Full,
            Self::Admin(_) => Access::Admin,
        }
    }

    fn expects_body(&self) -> bool {
        match self {
            Self::Pay => true,
            Self::Admin(route) => route.expects_body(),
            _ => false,
        }
    }
}

/// Finds the endpoint for a method, a path and a query.
fn route_request(method: &Method, path: &str, query: Option<&str>) -> Result<HttpRoute, Problem> {
    let segments: Vec<&str> = path.strip_prefix('/').unwrap_or(path).split('/').collect();
    let reading = || match *method {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Problem::method_not_allowed("GET, HEAD")),
    };
    let plain = |route| {
        reading()
            .and_then(|()| reject_params(reject_duplicate_params(query)?))
            .map(|()| route)
    };
    match *segments.as_slice() {
        [""] if path == "/" => plain(HttpRoute::About),
        ["openapi.json"] => plain(HttpRoute::OpenApi),
        ["ui"] => plain(HttpRoute::ToPage),
        ["ui", name] => match PageFile::find(name) {
            Some(file) => plain(HttpRoute::Page(file)),
            None => Err(Problem::not_found(format!(
                "there is no resource at {path}"
            ))),
        },
        ["payments"] => match *method {
            Method::POST => reject_params(reject_duplicate_params(query)?).map(|()| HttpRoute::Pay),
            Method::GET | Method::HEAD => {
                let query = reject_duplicate_params(query)?;
                if TakingsPage::is_meant(query) {
                    TakingsPage::parse(query).map(HttpRoute::Takings)
                } else if TraceSearch::is_meant(query) {
                    TraceSearch::parse(query).map(HttpRoute::Trace)
                } else {
                    route_reservation_query(query)
                }
            }
            _ => Err(Problem::method_not_allowed("GET, HEAD, POST")),
        },
        ["payments", id] => plain(HttpRoute::Payment {
            id: parse_path_param(path, id)?,
        }),
        ["users", id, "payment-history"] => {
            reading()?;
            let user_id = parse_path_param(path, id)?;
            let (before, limit) = parse_page_params(reject_duplicate_params(query)?)?;
            Ok(HttpRoute::History {
                user_id,
                before,
                limit,
            })
        }
        ["health", "live"] => plain(HttpRoute::Live),
        ["health", "ready"] => plain(HttpRoute::Ready),
        ["metrics"] => plain(HttpRoute::Metrics),
        ["overview"] => plain(HttpRoute::Overview),
        ["overview", "history"] => plain(HttpRoute::OverviewHistory),
        ["admin", ref rest @ ..] => {
            route_admin_request(method, path, rest, reject_duplicate_params(query)?)
                .map(HttpRoute::Admin)
        }
        _ => Err(Problem::not_found(format!(
            "there is no resource at {path}"
        ))),
    }
}

fn route_reservation_query(query: &str) -> Result<HttpRoute, Problem> {
    let mut reservation_id = None;
    for (name, value) in query_params(query) {
        if name != "reservation_id" {
            return Err(Problem::invalid_field(
                name,
                "there is no such parameter; there is reservation_id, trace_id, or since and until",
            ));
        }
        reservation_id = Some(parse_id_param(name, value)?);
    }
    let missing = || {
        Problem::invalid_field(
            "reservation_id",
            "is missing: GET /payments?reservation_id=1001",
        )
    };
    reservation_id
        .map(|reservation_id| HttpRoute::Paid { reservation_id })
        .ok_or_else(missing)
}

/// Routes requests to the handlers of an [`App`].
pub(super) struct Router<'a> {
    app: &'a App,
}

impl<'a> Router<'a> {
    pub(super) fn new(app: &'a App) -> Self {
        Self { app }
    }

    /// Responds to a request. A refusal is sent at once, also while the body still arrives; then
    /// the connection closes.
    pub(super) async fn respond(&self, peer: &Peer, request: Request<Incoming>) -> Response<Body> {
        let started = Instant::now();
        let (head, body) = request.into_parts();
        let response = self.respond_or_refuse(peer, &head, body).await;
        let pattern = RoutePattern::of_path(head.uri.path());
        self.app.route_metrics(pattern).answered(
            head.method.as_str(),
            response.status().as_u16(),
            started.elapsed(),
        );
        response
    }

    async fn respond_or_refuse(&self, peer: &Peer, head: &Parts, body: Incoming) -> Response<Body> {
        let mut body = IncomingBody::new(body);
        match self.try_respond(peer, head, &mut body).await {
            Ok(response) => response,
            Err(problem) => {
                if let Some(address) = peer.address() {
                    self.app.refusals.request(problem.status(), address);
                }
                let coming = body.may_have_more(&head.headers);
                let limit = self.app.context.settings.body_bytes_max;
                if coming {
                    body.drain(limit, ARRIVED).await;
                }
                if body.is_read() {
                    return problem.into_response();
                }
                // Another client may write before it reads: its body is read meanwhile, or it would
                // lose the refusal with the connection.
                if coming {
                    let timeout = self.app.context.settings.body_timeout;
                    tokio::spawn(async move { body.drain(limit, timeout).await });
                }
                problem.closing().into_response()
            }
        }
    }

    async fn try_respond(
        &self,
        peer: &Peer,
        head: &Parts,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        check_host_header(head)?;
        Self::check_transfer_coding(&head.headers)?;
        let found = route_request(&head.method, head.uri.path(), head.uri.query());
        if found == Ok(HttpRoute::Live) {
            Self::reject_body(body, &head.headers).await?;
            // A supervisor must not mistake a limit for a dead process, and this endpoint reveals
            // nothing else.
            return Ok(json_response(
                StatusCode::OK,
                &serde_json::json!({ "status": "live" }),
            ));
        }
        if let Some(response) = self.respond_publicly(peer, head, &found)? {
            Self::reject_body(body, &head.headers).await?;
            return Ok(response);
        }
        let is_scrape = found == Ok(HttpRoute::Metrics);
        let Some(client) = self.authenticate(peer, head, is_scrape)? else {
            // A client without a token learns nothing of this payrelay.
            return if found == Ok(HttpRoute::Ready) {
                Self::reject_body(body, &head.headers).await?;
                Ok(self.app.health_ready_status_only().await)
            } else {
                Err(Problem::no_token())
            };
        };
        let found = found?;
        client.require(found.needed_access())?;
        if !found.expects_body() {
            Self::reject_body(body, &head.headers).await?;
        }
        match found {
            HttpRoute::About | HttpRoute::Page(_) | HttpRoute::ToPage | HttpRoute::OpenApi => {
                Ok(Self::about())
            }
            HttpRoute::Paid { reservation_id } => {
                self.app.payment_of_reservation(reservation_id).await
            }
            HttpRoute::Pay => self.app.post_payments(&client, &head.headers, body).await,
            HttpRoute::Payment { id } => self.app.payment_by_id(id).await,
            HttpRoute::Takings(page) => self.app.payments_of_time(page).await,
            HttpRoute::Trace(search) => self.app.payments_of_trace(search).await,
            HttpRoute::History {
                user_id,
                before,
                limit,
            } => self.app.payment_history(user_id, before, limit).await,
            HttpRoute::Live | HttpRoute::Ready => Ok(self.app.health_ready().await),
            HttpRoute::Metrics => Ok(self.app.metrics_scrape(&head.headers)),
            HttpRoute::Overview => Ok(self.app.overview(client.access).await),
            HttpRoute::OverviewHistory => Ok(self.app.overview_history()),
            HttpRoute::Admin(route) => self.app.dispatch_admin(&client, route, body).await,
        }
    }

    /// The page and the description of the API hold no data, so they need no token.
    fn respond_publicly(
        &self,
        peer: &Peer,
        head: &Parts,
        found: &Result<HttpRoute, Problem>,
    ) -> Result<Option<Response<Body>>, Problem> {
        let response = match found {
            Ok(HttpRoute::Page(file)) => file.respond(&head.headers),
            Ok(HttpRoute::ToPage) => page::redirect_to_page(),
            Ok(HttpRoute::OpenApi) => openapi::serve_openapi(),
            Ok(HttpRoute::About) if page::is_browser(&head.headers) => page::redirect_to_page(),
            _ => return Ok(None),
        };
        if peer.address().is_some() {
            self.app.limits.request(peer.usage())?;
        }
        Ok(Some(response))
    }

    /// Authenticates a client, and counts its request. A local one has no limit: an operator gets
    /// in while others use up theirs. A scrape has none: it shows what uses up the limits.
    fn authenticate(
        &self,
        peer: &Peer,
        head: &Parts,
        is_scrape: bool,
    ) -> Result<Option<AuthenticatedClient>, Problem> {
        if let Peer::Local(local) = peer {
            return Ok(Some(AuthenticatedClient::local(local)));
        }
        let authenticator = &self.app.context.authenticator;
        let client = authenticator.authenticate(head, peer.usage());
        let usage = if let Ok(Some(client)) = &client {
            &client.usage
        } else {
            peer.usage()
        };
        if !(is_scrape && matches!(client, Ok(Some(_)))) {
            self.app.limits.request(usage)?;
        }
        client
    }

    /// Refuses a body where none is expected. A client that waits for 100 Continue is not asked for
    /// its body.
    async fn reject_body(body: &mut IncomingBody, headers: &HeaderMap) -> Result<(), Problem> {
        let is_empty = if headers.contains_key(EXPECT) {
            body.is_read()
        } else {
            body.is_empty_within(ARRIVED).await
        };
        if is_empty {
            Ok(())
        } else {
            Err(Problem::unexpected_body())
        }
    }

    /// A list of the endpoints, for a person who opens the address.
    fn about() -> Response<Body> {
        json_response(
            StatusCode::OK,
            &serde_json::json!({
                "name": "payrelay",
                "version": env!("CARGO_PKG_VERSION"),
                "description": env!("CARGO_PKG_DESCRIPTION"),
                "documentation": "README.md and docs/ of payrelay's source; `payrelay --help` \
                    lists the commands",
                "routes": ROUTES,
            }),
        )
    }

    /// Only chunked is supported (RFC 9112, 6.1). hyper rejects a body whose last coding is another
    /// one.
    fn check_transfer_coding(headers: &HeaderMap) -> Result<(), Problem> {
        let mut codings = headers.get_all(TRANSFER_ENCODING).iter().flat_map(|value| {
            let text = value.to_str().unwrap_or("?");
            text.split(',')
                .map(str::trim)
                .filter(|coding| !coding.is_empty())
        });
        let known = codings.all(|coding| coding.eq_ignore_ascii_case("chunked"));
        if known {
            Ok(())
        } else {
            Err(Problem::unknown_transfer_coding())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::params::{PAGE, PAGE_MAX};
    use super::*;

    fn route_get(path: &str, query: Option<&str>) -> Result<HttpRoute, Problem> {
        route_request(&Method::GET, path, query)
    }

    #[test]
    fn the_router_finds_each_route() {
        assert_eq!(
            route_request(&Method::POST, "/payments", None),
            Ok(HttpRoute::Pay)
        );
        assert_eq!(
            route_get("/payments/7", None),
            Ok(HttpRoute::Payment { id: 7 })
        );
        assert_eq!(
            route_get("/payments", Some("reservation_id=7")),
            Ok(HttpRoute::Paid { reservation_id: 7 })
        );
        assert_eq!(route_get("/", None), Ok(HttpRoute::About));
        assert_eq!(
            route_request(&Method::HEAD, "/health/live", None),
            Ok(HttpRoute::Live)
        );
        assert_eq!(route_get("/health/ready", None), Ok(HttpRoute::Ready));
        let history = |before, limit| {
            Ok(HttpRoute::History {
                user_id: 42,
                before,
                limit,
            })
        };
        assert_eq!(
            route_get("/users/42/payment-history", None),
            history(None, PAGE)
        );
        assert_eq!(
            route_get("/users/42/payment-history", Some("limit=2&before=9")),
            history(Some(9), 2)
        );
    }

    #[test]
    fn the_router_finds_every_route_that_it_lists() {
        for listed in ROUTES {
            let (method, target) = listed.split_once(' ').unwrap();
            let target = target
                .replace("{id}", "7")
                .replace("{name}", "default")
                .replace("{trace_id}", "4bf92f3577b34da6a3ce929d0e0e4736")
                .replace("{time}", "2026-11-27T00:00:00Z");
            let (path, query) = target
                .split_once('?')
                .map_or((target.as_str(), None), |(path, query)| (path, Some(query)));
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert!(route_request(&method, path, query).is_ok(), "{listed}");
        }
    }

    #[test]
    fn each_route_of_the_router_needs_its_access() {
        let needs = |method: &Method, path| {
            route_request(method, path, None).map(|route| route.needed_access())
        };
        assert_eq!(needs(&Method::POST, "/payments"), Ok(Access::Full));
        for path in ["/", "/payments/7", "/users/42/payment-history"] {
            assert_eq!(needs(&Method::GET, path), Ok(Access::ReadOnly), "{path}");
        }
        for path in ["/health/live", "/health/ready", "/metrics"] {
            assert_eq!(needs(&Method::GET, path), Ok(Access::Metrics), "{path}");
        }
        for path in [
            "/admin/channels",
            "/admin/dead-letters",
            "/admin/dead-letters/7",
        ] {
            assert_eq!(needs(&Method::GET, path), Ok(Access::Admin), "{path}");
        }
        for path in ["/admin/channels/a/resume", "/admin/dead-letters/7/replay"] {
            assert_eq!(needs(&Method::POST, path), Ok(Access::Admin), "{path}");
        }
    }

    #[test]
    fn the_router_finds_no_unknown_path() {
        for path in [
            "/payment",
            "/payments/",
            "/payments/abc",
            "/payments/1/x",
            "/users/42",
            "/health",
            "//payments",
        ] {
            let missing = Problem::not_found(format!("there is no resource at {path}"));
            assert_eq!(
                route_request(&Method::GET, path, None),
                Err(missing),
                "{path}"
            );
        }
        let missing = Problem::invalid_field(
            "reservation_id",
            "is missing: GET /payments?reservation_id=1001",
        );
        assert_eq!(route_get("/payments", None), Err(missing));
        assert_eq!(
            route_request(&Method::PUT, "/payments", None),
            Err(Problem::method_not_allowed("GET, HEAD, POST"))
        );
        assert_eq!(
            route_request(&Method::DELETE, "/payments/1", None),
            Err(Problem::method_not_allowed("GET, HEAD"))
        );
    }

    #[test]
    fn the_router_refuses_impossible_numbers() {
        for id in ["9223372036854775808", "-1", "+1", "1.0", "x", "%31"] {
            let path = format!("/payments/{id}");
            let missing = Problem::not_found(format!("there is no resource at {path}"));
            assert_eq!(route_get(&path, None), Err(missing), "{id}");
            assert!(
                route_get("/payments", Some(&format!("reservation_id={id}"))).is_err(),
                "{id}"
            );
        }
        for query in [
            "limit=0",
            "limit=501",
            "limit=",
            "before=x",
            "page=1",
            "limit",
        ] {
            assert!(
                route_get("/users/1/payment-history", Some(query)).is_err(),
                "{query}"
            );
        }
        for path in ["/", "/payments/1", "/health/live", "/health/ready"] {
            assert!(route_get(path, Some("verbose=true")).is_err(), "{path}");
        }
        assert!(route_request(&Method::POST, "/payments", Some("dry_run=true")).is_err());
    }

    /// A method, a path, a query, as in the first line of a request.
    #[test]
    fn the_router_survives_the_corpus_of_request_targets() {
        let words = [
            "GET ",
            "POST ",
            "/payments/",
            "/users/",
            "/payment-history",
            "?",
            "&",
            "=",
            "limit=",
            "before=",
            "/admin/",
            "dead-letters",
            "dry_run=",
            "all=",
            "true",
        ];
        crate::fuzz::fuzz_corpus("target", 10_000, &words, |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let (method, target) = text.split_once(' ').unwrap_or(("GET", &text));
            let Ok(method) = Method::from_bytes(method.as_bytes()) else {
                return false;
            };
            let (path, query) = target
                .split_once('?')
                .map_or((target, None), |(path, query)| (path, Some(query)));
            match route_request(&method, path, query) {
                Ok(HttpRoute::Payment { id }) => assert!(id >= 0),
                Ok(HttpRoute::History {
                    user_id,
                    before,
                    limit,
                }) => {
                    assert!(
                        user_id >= 0
                            && before.is_none_or(|id| id >= 0)
                            && (1..=PAGE_MAX).contains(&limit)
                    );
                }
                Ok(HttpRoute::Pay) => assert!(method == Method::POST && path.ends_with("payments")),
                Ok(HttpRoute::Admin(
                    AdminRoute::ResolveDeadLetters(_)
                    | AdminRoute::ResumeChannel { .. }
                    | AdminRoute::ResumeRelay
                    | AdminRoute::SkipInChannel { .. },
                )) => {
                    assert_eq!(method, Method::POST);
                }
                Ok(_) => assert!(method == Method::GET || method == Method::HEAD),
                Err(problem) => {
                    let status = problem.into_response().status().as_u16();
                    assert!([404, 405, 422].contains(&status), "{status}");
                    return false;
                }
            }
            true
        });
    }
}
