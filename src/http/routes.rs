//! Which request is which, and what is answered. What can be decided without the store is decided in pure functions.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, EXPECT, HeaderMap, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use tokio::sync::oneshot;

use super::access::{Access, Client, Gate};
use super::admin::{self, Channel};
use super::body::{self, Arriving};
use super::idempotency;
use super::limits::{Account, Limits};
use super::mailbox::Mailbox;
use super::problem::Problem;
use crate::clock::Timestamp;
use crate::config;
use crate::event::parse_traceparent;
use crate::outage::{Part, PartState};
use crate::payment::{NewPayment, Payment};
use crate::sampler::{Snapshot, Snapshots};
use crate::store::backlog::Waiting;
use crate::store::idempotency::{self as keys, Keyed};
use crate::store::payment::{self as payments, Way};
use crate::store::{self, Connection, SqlResult, Store, StoreError, Transaction};
use crate::worker::Waker;

pub(super) type Body = Full<Bytes>;

/// How many entries a page has, unless the client says.
pub(super) const PAGE: usize = 50;

/// The largest page.
pub(super) const PAGE_MAX: usize = 500;

/// What the edge needs of the rest.
pub struct Context {
    /// Where payments go.
    pub store: Store,
    /// Woken when events were committed.
    pub relay: Waker,
    /// Woken when dead letters were replayed.
    pub notifiers: Waker,
    /// Of new payments.
    pub currency: String,
    /// How many Idempotency-Keys are kept.
    pub keys_max: usize,
    /// Limits.
    pub settings: config::Http,
    /// Who may call.
    pub gate: Arc<Gate>,
    /// The remote parts, by name.
    pub parts: Vec<(String, Part)>,
    /// Where events go by way of, if they do.
    pub topic: String,
    /// Who is told.
    pub channels: Vec<Channel>,
    /// What waits.
    pub snapshots: Snapshots,
}

/// What the routes need.
pub struct App {
    pub(super) context: Context,
    mailbox: Arc<Mailbox>,
    limits: Arc<Limits>,
}

/// A request that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Route {
    Pay,
    Payment { id: i64 },
    History { user_id: i64, before: Option<i64>, limit: usize },
    Live,
    Ready,
    Admin(admin::Route),
}

impl Route {
    /// What a client must be allowed to do.
    fn needs(&self) -> Access {
        match self {
            Self::Live | Self::Ready | Self::Payment { .. } | Self::History { .. } => Access::ReadOnly,
            Self::Pay => Access::Full,
            Self::Admin(_) => Access::Admin,
        }
    }
}

/// Tells what a method, a path and a query ask for.
fn route(method: &Method, path: &str, query: Option<&str>) -> Result<Route, Problem> {
    let segments: Vec<&str> = path.strip_prefix('/').unwrap_or(path).split('/').collect();
    let reading = || match *method {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Problem::method_not_allowed("GET, HEAD")),
    };
    match *segments.as_slice() {
        ["payments"] => match *method {
            Method::POST => Ok(Route::Pay),
            _ => Err(Problem::method_not_allowed("POST")),
        },
        ["payments", id] => reading().and_then(|()| Ok(Route::Payment { id: number("id", id)? })),
        ["users", id, "payment-history"] => {
            reading()?;
            let user_id = number("user_id", id)?;
            let (before, limit) = page(each_once(query)?)?;
            Ok(Route::History { user_id, before, limit })
        }
        ["health", "live"] => reading().map(|()| Route::Live),
        ["health", "ready"] => reading().map(|()| Route::Ready),
        ["admin", ref rest @ ..] => admin::route(method, path, rest, each_once(query)?).map(Route::Admin),
        _ => Err(Problem::not_found(format!("there is nothing at {path}"))),
    }
}

pub(super) fn number(field: &str, text: &str) -> Result<i64, Problem> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let refused = || Problem::invalid_field(field, "must be an integer from 0 to 9223372036854775807");
    if digits { text.parse().map_err(|_| refused()) } else { Err(refused()) }
}

/// The names and values of a query; nothing here needs decoding.
pub(super) fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// A parameter that is named twice is refused: which one was meant is not for us to guess.
fn each_once(query: Option<&str>) -> Result<&str, Problem> {
    let query = query.unwrap_or("");
    let mut seen = HashSet::new();
    match pairs(query).find(|(name, _)| !seen.insert(*name)) {
        Some((name, _)) => Err(Problem::invalid_field(name, "is named twice")),
        None => Ok(query),
    }
}

pub(super) fn page_size(text: &str) -> Result<usize, Problem> {
    let limit = usize::try_from(number("limit", text)?).unwrap_or(usize::MAX);
    if (1..=PAGE_MAX).contains(&limit) {
        Ok(limit)
    } else {
        Err(Problem::invalid_field("limit", format!("must be an integer from 1 to {PAGE_MAX}")))
    }
}

fn page(query: &str) -> Result<(Option<i64>, usize), Problem> {
    let (mut before, mut limit) = (None, PAGE);
    for (name, value) in pairs(query) {
        match name {
            "before" => before = Some(number("before", value)?),
            "limit" => limit = page_size(value)?,
            _ => {
                return Err(Problem::invalid_field(name, "there is no such parameter; there are before and limit"));
            }
        }
    }
    Ok((before, limit))
}

/// Without a type, or with one that is not JSON, a body is refused.
fn is_json(headers: &HeaderMap) -> bool {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = text.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    essence == "application/json"
        || essence.strip_prefix("application/").is_some_and(|subtype| subtype.ends_with("+json"))
}

impl App {
    /// An edge on the rest.
    pub fn new(context: Context) -> Self {
        let limits = Arc::new(Limits::new(&context.settings));
        Self { context, mailbox: Arc::default(), limits }
    }

    /// What is kept about clients.
    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// Where answers of other threads arrive.
    pub(super) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// Answers a request that came from `peer`.
    pub(super) async fn answer(&self, peer: &Arc<Account>, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let mut body = Arriving::new(body);
        match self.try_answer(peer, &head, &mut body).await {
            Ok(response) => response,
            Err(problem) => {
                // A client that still waits for 100 Continue has sent nothing, and will not.
                if body.is_coming(head.headers.contains_key(EXPECT)) && !problem.is_timeout() {
                    body::discard(&mut body, self.context.settings.body_bytes_max, self.context.settings.body_timeout)
                        .await;
                }
                problem.into_response()
            }
        }
    }

    async fn try_answer(
        &self,
        peer: &Arc<Account>,
        head: &Parts,
        body: &mut Arriving,
    ) -> Result<Response<Body>, Problem> {
        let found = route(&head.method, head.uri.path(), head.uri.query());
        if found == Ok(Route::Live) {
            // Whoever supervises payrelay must not take a limit for its death; and it tells nothing else.
            return Ok(json(StatusCode::OK, &serde_json::json!({ "status": "live" })));
        }
        let client = self.context.gate.identify(head, peer);
        let account = if let Ok(Some(client)) = &client { &client.account } else { peer };
        self.limits.request(account)?;
        let Some(client) = client? else {
            // Who has no token does not even learn what there is.
            return if found == Ok(Route::Ready) { Ok(self.bare_ready().await) } else { Err(Problem::no_token()) };
        };
        let found = found?;
        client.require(found.needs())?;
        match found {
            Route::Pay => self.pay(&client, &head.headers, body).await,
            Route::Payment { id } => self.payment(id).await,
            Route::History { user_id, before, limit } => self.history(user_id, before, limit).await,
            Route::Live | Route::Ready => Ok(self.ready().await),
            Route::Admin(route) => self.administer(route).await,
        }
    }

    async fn pay(&self, client: &Client, headers: &HeaderMap, body: &mut Arriving) -> Result<Response<Body>, Problem> {
        if !is_json(headers) {
            return Err(Problem::unsupported_media_type());
        }
        let key = idempotency::key(headers)?;
        let settings = &self.context.settings;
        let mut held = self.limits.hold(&client.account);
        let bytes = body::read(body, settings.body_bytes_max, settings.body_timeout, &mut held).await?;
        self.context.store.admit()?;
        let new = NewPayment::parse(&bytes)?;
        let name = &client.name;
        let keyed = key.map(|key| Keyed { client: name.to_string(), key, body_hash: idempotency::hash(&bytes) });
        // While the writer works there is no body in memory.
        drop((bytes, held));
        let trace = headers.get("traceparent").and_then(|value| value.to_str().ok());
        let trace = trace.and_then(parse_traceparent).map(str::to_owned);
        let (answer, answered) = oneshot::channel();
        let (currency, relay) = (self.context.currency.clone(), self.context.relay.clone());
        let keys_max = self.context.keys_max;
        let mailbox = Arc::clone(&self.mailbox);
        self.context.store.submit(
            new.reservations.len(),
            move |tx| {
                let now = Timestamp::now();
                let pay = || payments::execute(tx, &new, &currency, trace.as_deref(), now);
                match &keyed {
                    Some(keyed) => keys::once(tx, keyed, keys_max, now, pay),
                    None => pay().map(Some),
                }
            },
            move |result| {
                if result.is_ok() {
                    relay.wake();
                }
                // A client that went away meanwhile has its payment all the same.
                mailbox.post(answer, result);
            },
        )?;
        let payments = received(answered.await)?.ok_or_else(Problem::key_reused)?;
        Ok(json(StatusCode::CREATED, &Payments { payments: &payments }))
    }

    async fn payment(&self, id: i64) -> Result<Response<Body>, Problem> {
        let way = self.query(move |connection| payments::find(connection, id)).await?;
        let way = way.ok_or_else(|| Problem::not_found(format!("there is no payment {id}")))?;
        Ok(json(StatusCode::OK, &PaymentWay::new(&way, &self.context.store)))
    }

    async fn history(&self, user_id: i64, before: Option<i64>, limit: usize) -> Result<Response<Body>, Problem> {
        // One more than the page tells whether there is a next one.
        let payments = self.query(move |connection| payments::history(connection, user_id, before, limit + 1)).await?;
        let not_theirs = || Problem::invalid_field("before", "is not a payment of this user; use the path in next");
        let mut payments = payments.ok_or_else(not_theirs)?;
        let more = payments.len() > limit;
        payments.truncate(limit);
        let next = payments
            .last()
            .filter(|_| more)
            .map(|last| format!("/users/{user_id}/payment-history?before={}&limit={limit}", last.id));
        Ok(json(StatusCode::OK, &History { user_id, payments: &payments, next }))
    }

    /// Kafka or Slack away is ready all the same: payments are taken.
    async fn ready(&self) -> Response<Body> {
        let (status, ready) = self.readiness().await;
        json(status, &ready)
    }

    /// What a load balancer needs, and no more.
    async fn bare_ready(&self) -> Response<Body> {
        let (status, ready) = self.readiness().await;
        json(status, &serde_json::json!({ "status": ready.status }))
    }

    async fn readiness(&self) -> (StatusCode, Ready<'_>) {
        let look = self.look(store::answer).await;
        let store = &self.context.store;
        let database = store.database_state();
        let disk = store.disk_state();
        if database.is_failing() {
            // No payment is accepted any more, so that nothing else would show that the database works again.
            store.probe();
        }
        let works = answers(&look) && !database.is_failing() && !disk.is_failing();
        let mut components: BTreeMap<_, _> =
            self.context.parts.iter().map(|(name, part)| (name.as_str(), part.get())).collect();
        let pending = self.context.snapshots.latest().map(|snapshot| Pending::new(&snapshot, Timestamp::now()));
        let late = pending.as_ref().is_some_and(Pending::is_late);
        let (status, word) = if !works {
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
        } else if late || components.values().any(PartState::is_failing) {
            (StatusCode::OK, "degraded")
        } else {
            (StatusCode::OK, "ready")
        };
        components.extend([("database", database), ("disk", disk)]);
        (status, Ready { status: word, node: store.node().as_str(), components, pending })
    }

    /// A write, and its result once it is on the disk.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, Problem> {
        let (answer, answered) = oneshot::channel();
        let mailbox = Arc::clone(&self.mailbox);
        self.context.store.submit(1, work, move |result| mailbox.post(answer, result))?;
        Ok(received(answered.await)?)
    }

    pub(super) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, Problem> {
        // The store's own threads say why, once for as many as are refused.
        Ok(self.look(query).await?)
    }

    async fn look<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let mailbox = Arc::clone(&self.mailbox);
        self.context.store.query(query, move |result| mailbox.post(answer, result))?;
        received(answered.await)
    }
}

/// The answer of the store's thread; none comes if the store was closed with the work undone.
fn received<T>(answer: Result<Result<T, StoreError>, oneshot::error::RecvError>) -> Result<T, StoreError> {
    answer.unwrap_or(Err(StoreError::Closed))
}

/// Whether the database answers. That too many reads wait is not its refusal: payments have a queue of their own.
fn answers<T>(look: &Result<T, StoreError>) -> bool {
    matches!(look, Ok(_) | Err(StoreError::Busy))
}

/// A response with a JSON body.
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    // Serializing our own types into memory cannot fail.
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Nothing here is a page, whatever a browser makes of it.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
    response
}

#[derive(Serialize)]
struct Payments<'a> {
    payments: &'a [Payment],
}

#[derive(Serialize)]
struct History<'a> {
    user_id: i64,
    payments: &'a [Payment],
    /// Where older payments are.
    next: Option<String>,
}

/// A payment with how far it has come.
#[derive(Serialize)]
struct PaymentWay<'a> {
    #[serde(flatten)]
    payment: &'a Payment,
    event: Option<Event<'a>>,
    notification: Option<Notification<'a>>,
}

#[derive(Serialize)]
struct Event<'a> {
    id: String,
    status: &'a str,
    created_at: Timestamp,
    published_at: Option<Timestamp>,
    partition: Option<i32>,
    offset: Option<i64>,
    /// Why the broker does not take it, while it is set aside.
    #[serde(skip_serializing_if = "Option::is_none")]
    rejection: Option<&'a str>,
}

#[derive(Serialize)]
struct Notification<'a> {
    status: &'a str,
    channel: Option<&'a str>,
    attempts: u32,
    unknown_outcomes: u32,
    delivered_at: Option<Timestamp>,
    last_error: Option<&'a str>,
}

impl<'a> PaymentWay<'a> {
    fn new(way: &'a Way, store: &Store) -> Self {
        let event = way.event.as_ref().map(|event| Event {
            id: store.node().event_id(event.outbox_id),
            status: &event.status,
            created_at: event.created_at,
            published_at: event.published_at,
            partition: event.partition,
            offset: event.offset,
            rejection: event.rejection.as_deref(),
        });
        let notification = match (&way.notification, &way.event) {
            (Some(told), _) => Some(Notification {
                status: &told.status,
                channel: Some(&told.channel),
                attempts: told.attempts,
                unknown_outcomes: told.unknown_outcomes,
                delivered_at: told.delivered_at,
                last_error: told.last_error.as_deref(),
            }),
            // On its way to the delivery table.
            (None, Some(_)) => Some(Notification {
                status: "PENDING",
                channel: None,
                attempts: 0,
                unknown_outcomes: 0,
                delivered_at: None,
                last_error: None,
            }),
            (None, None) => None,
        };
        Self { payment: &way.payment, event, notification }
    }
}

#[derive(Serialize)]
struct Ready<'a> {
    status: &'static str,
    node: &'a str,
    components: BTreeMap<&'a str, PartState>,
    /// `null` until the database was looked at for the first time.
    pending: Option<Pending>,
}

/// What waits, as it was when the sampler last looked.
#[derive(Serialize)]
struct Pending {
    sampled_at: Timestamp,
    unpublished: Age,
    unconsumed: Age,
    undelivered: Age,
    dead_letters: Age,
}

#[derive(Serialize)]
struct Age {
    count: i64,
    oldest_at: Option<Timestamp>,
    oldest_age_s: u64,
}

/// An event that was published is in the delivery table long before.
const UNCONSUMED_AGE_MAX_S: u64 = 60;

impl Pending {
    fn new(snapshot: &Snapshot, now: Timestamp) -> Self {
        let age = |waiting: Waiting| Age {
            count: waiting.count,
            oldest_at: waiting.oldest_at,
            oldest_age_s: waiting.age(now).as_secs(),
        };
        let backlog = &snapshot.backlog;
        Self {
            sampled_at: snapshot.at,
            unpublished: age(backlog.unpublished),
            unconsumed: age(backlog.unconsumed),
            undelivered: age(backlog.undelivered()),
            dead_letters: age(backlog.dead_letters),
        }
    }

    fn is_late(&self) -> bool {
        self.unconsumed.oldest_age_s > UNCONSUMED_AGE_MAX_S
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str, query: Option<&str>) -> Result<Route, Problem> {
        route(&Method::GET, path, query)
    }

    #[test]
    fn knows_its_routes() {
        assert_eq!(route(&Method::POST, "/payments", None), Ok(Route::Pay));
        assert_eq!(get("/payments/7", None), Ok(Route::Payment { id: 7 }));
        assert_eq!(route(&Method::HEAD, "/health/live", None), Ok(Route::Live));
        assert_eq!(get("/health/ready", None), Ok(Route::Ready));
        let history = |before, limit| Ok(Route::History { user_id: 42, before, limit });
        assert_eq!(get("/users/42/payment-history", None), history(None, PAGE));
        assert_eq!(get("/users/42/payment-history", Some("limit=2&before=9")), history(Some(9), 2));
    }

    #[test]
    fn each_route_needs_its_access() {
        let needs = |method: &Method, path| route(method, path, None).map(|route| route.needs());
        assert_eq!(needs(&Method::POST, "/payments"), Ok(Access::Full));
        for path in ["/payments/7", "/users/42/payment-history", "/health/live", "/health/ready"] {
            assert_eq!(needs(&Method::GET, path), Ok(Access::ReadOnly), "{path}");
        }
        for path in ["/admin/channels", "/admin/dead-letters", "/admin/dead-letters/7"] {
            assert_eq!(needs(&Method::GET, path), Ok(Access::Admin), "{path}");
        }
        for path in ["/admin/channels/a/resume", "/admin/dead-letters/7/replay", "/admin/dead-letters/discard"] {
            assert_eq!(needs(&Method::POST, path), Ok(Access::Admin), "{path}");
        }
    }

    #[test]
    fn refuses_what_is_not_there() {
        for path in ["/", "", "/payment", "/payments/", "/payments/1/x", "/users/42", "/health", "//payments"] {
            let refusal = route(&Method::GET, path, None).err();
            let (missing, field) = (Problem::not_found(format!("there is nothing at {path}")), number("id", "").err());
            assert!(refusal == Some(missing) || refusal == field, "{path}: {refusal:?}");
        }
        assert_eq!(get("/payments", None), Err(Problem::method_not_allowed("POST")));
        assert_eq!(route(&Method::DELETE, "/payments/1", None), Err(Problem::method_not_allowed("GET, HEAD")));
    }

    #[test]
    fn refuses_numbers_that_cannot_be() {
        for id in ["9223372036854775808", "-1", "+1", "1.0", "x", "%31"] {
            assert_eq!(get(&format!("/payments/{id}"), None).err(), number("id", "").err(), "{id}");
        }
        for query in ["limit=0", "limit=501", "limit=", "before=x", "page=1", "limit"] {
            assert!(get("/users/1/payment-history", Some(query)).is_err(), "{query}");
        }
    }

    /// A method, a path, a query, as in the first line of a request.
    #[test]
    fn the_corpus_of_targets() {
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
        crate::fuzz::corpus("target", 10_000, &words, |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let (method, target) = text.split_once(' ').unwrap_or(("GET", &text));
            let Ok(method) = Method::from_bytes(method.as_bytes()) else { return false };
            let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
            match route(&method, path, query) {
                Ok(Route::Payment { id }) => assert!(id >= 0),
                Ok(Route::History { user_id, before, limit }) => {
                    assert!(user_id >= 0 && before.is_none_or(|id| id >= 0) && (1..=PAGE_MAX).contains(&limit));
                }
                Ok(Route::Pay) => assert!(method == Method::POST && path.ends_with("payments")),
                Ok(Route::Admin(admin::Route::Act { .. } | admin::Route::Resume { .. })) => {
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

    #[test]
    fn json_is_told_by_its_type() {
        let typed = |text| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(text));
            is_json(&headers)
        };
        assert!(typed("application/json") && typed("Application/JSON; charset=utf-8") && typed("application/x+json"));
        assert!(!typed("text/plain") && !typed("application/jsonp") && !typed("") && !is_json(&HeaderMap::new()));
    }
}
