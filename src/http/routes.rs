//! Which request is which, and what is answered. What can be decided without the store is decided
//! in pure functions.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, EXPECT, HeaderMap,
    HeaderValue, LOCATION, TRANSFER_ENCODING, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use tokio::sync::oneshot;

use super::access::{Client, Gate, check_host};
use super::admin::{self, Channel};
use super::body::{self, Arriving};
use super::idempotency;
use super::limits::{Account, Limits, Visit};
use super::mailbox::Mailbox;
use super::problem::Problem;
use super::refusals::Refusals;
use crate::config;
use crate::domain::access::Access;
use crate::domain::event::TraceContext;
use crate::domain::payment::{NewPayment, Payment};
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::{Part, PartState};
use crate::runtime::metrics::Metrics;
use crate::runtime::warnings::Warnings;
use crate::runtime::worker::Waker;
use crate::sampler::{Snapshot, Snapshots};
use crate::store::backlog::Waiting;
use crate::store::idempotency::{self as keys, Keyed, Once};
use crate::store::payment::{self as payments, Way};
use crate::store::{self, Connection, SqlResult, Store, StoreError, Transaction};

pub(super) type Body = Full<Bytes>;

/// How many entries a page has, unless the client says.
pub(super) const PAGE: usize = 50;

/// The largest page.
pub(super) const PAGE_MAX: usize = 500;

/// A small body comes with its head: this long a refusal waits for it, so that the connection can
/// be kept.
const ARRIVED: Duration = Duration::from_millis(5);

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
    /// What was refused is counted here.
    pub metrics: Metrics,
    /// Risks of the configuration.
    pub warnings: Warnings,
}

/// What the routes need.
pub struct App {
    pub(super) context: Context,
    mailbox: Arc<Mailbox>,
    limits: Arc<Limits>,
    refusals: Refusals,
}

/// A request that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Route {
    About,
    Pay,
    Paid {
        reservation_id: i64,
    },
    Payment {
        id: i64,
    },
    History {
        user_id: i64,
        before: Option<i64>,
        limit: usize,
    },
    Live,
    Ready,
    Admin(admin::Route),
}

impl Route {
    /// What a client must be allowed to do.
    fn needs(&self) -> Access {
        match self {
            Self::About
            | Self::Live
            | Self::Ready
            | Self::Paid { .. }
            | Self::Payment { .. }
            | Self::History { .. } => Access::ReadOnly,
            Self::Pay => Access::Full,
            Self::Admin(_) => Access::Admin,
        }
    }

    fn has_body(&self) -> bool {
        matches!(self, Self::Pay | Self::Admin(admin::Route::Skip { .. }))
    }
}

/// Tells what a method, a path and a query ask for.
fn route(method: &Method, path: &str, query: Option<&str>) -> Result<Route, Problem> {
    let segments: Vec<&str> = path.strip_prefix('/').unwrap_or(path).split('/').collect();
    let reading = || match *method {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Problem::method_not_allowed("GET, HEAD")),
    };
    let plain = |route| {
        reading()
            .and_then(|()| no_parameters(each_once(query)?))
            .map(|()| route)
    };
    match *segments.as_slice() {
        [""] if path == "/" => plain(Route::About),
        ["payments"] => match *method {
            Method::POST => no_parameters(each_once(query)?).map(|()| Route::Pay),
            Method::GET | Method::HEAD => paid(each_once(query)?),
            _ => Err(Problem::method_not_allowed("GET, HEAD, POST")),
        },
        ["payments", id] => plain(Route::Payment {
            id: id_in_path(path, id)?,
        }),
        ["users", id, "payment-history"] => {
            reading()?;
            let user_id = id_in_path(path, id)?;
            let (before, limit) = page(each_once(query)?)?;
            Ok(Route::History {
                user_id,
                before,
                limit,
            })
        }
        ["health", "live"] => plain(Route::Live),
        ["health", "ready"] => plain(Route::Ready),
        ["admin", ref rest @ ..] => {
            admin::route(method, path, rest, each_once(query)?).map(Route::Admin)
        }
        _ => Err(Problem::not_found(format!("there is nothing at {path}"))),
    }
}

/// A path with something else in the place of an id leads nowhere.
pub(super) fn id_in_path(path: &str, text: &str) -> Result<i64, Problem> {
    number("id", text).map_err(|_| Problem::not_found(format!("there is nothing at {path}")))
}

pub(super) fn no_parameters(query: &str) -> Result<(), Problem> {
    match pairs(query).next() {
        None => Ok(()),
        Some((name, _)) => Err(Problem::invalid_field(
            name,
            "there is no such parameter; there are none here",
        )),
    }
}

fn paid(query: &str) -> Result<Route, Problem> {
    let mut reservation_id = None;
    for (name, value) in pairs(query) {
        if name != "reservation_id" {
            return Err(Problem::invalid_field(
                name,
                "there is no such parameter; there is reservation_id",
            ));
        }
        reservation_id = Some(number(name, value)?);
    }
    let missing = || {
        Problem::invalid_field(
            "reservation_id",
            "is missing: GET /payments?reservation_id=1001",
        )
    };
    reservation_id
        .map(|reservation_id| Route::Paid { reservation_id })
        .ok_or_else(missing)
}

pub(super) fn number(field: &str, text: &str) -> Result<i64, Problem> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let refused =
        || Problem::invalid_field(field, "must be an integer from 0 to 9223372036854775807");
    if digits {
        text.parse().map_err(|_| refused())
    } else {
        Err(refused())
    }
}

/// The names and values of a query; nothing here needs decoding.
pub(super) fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
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
        Err(Problem::invalid_field(
            "limit",
            format!("must be an integer from 1 to {PAGE_MAX}"),
        ))
    }
}

fn page(query: &str) -> Result<(Option<i64>, usize), Problem> {
    let (mut before, mut limit) = (None, PAGE);
    for (name, value) in pairs(query) {
        match name {
            "before" => before = Some(number("before", value)?),
            "limit" => limit = page_size(value)?,
            _ => {
                return Err(Problem::invalid_field(
                    name,
                    "there is no such parameter; there are before and limit",
                ));
            }
        }
    }
    Ok((before, limit))
}

/// Without a type, or with one that is not JSON, a body is refused.
fn is_json(headers: &HeaderMap) -> bool {
    let text = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let essence = text
        .split(';')
        .next()
        .unwrap_or("")
        .trim()
        .to_ascii_lowercase();
    essence == "application/json"
        || essence
            .strip_prefix("application/")
            .is_some_and(|subtype| subtype.ends_with("+json"))
}

/// Whether a body has no coding, or only the one that changes nothing (RFC 9110, 8.4.1).
fn is_plain(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_ENCODING).iter().all(|value| {
        let mut codings = value
            .as_bytes()
            .split(|byte| *byte == b',')
            .map(<[u8]>::trim_ascii);
        codings.all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity"))
    })
}

/// Where none is expected, a body is refused. One that was asked to wait for 100 Continue is not
/// asked for.
async fn refuse_body(body: &mut Arriving, headers: &HeaderMap) -> Result<(), Problem> {
    let is_empty = if headers.contains_key(EXPECT) {
        body.is_read()
    } else {
        body::is_empty(body, ARRIVED).await
    };
    if is_empty {
        Ok(())
    } else {
        Err(Problem::unexpected_body())
    }
}

impl App {
    /// An edge on the rest.
    pub fn new(context: Context) -> Self {
        let limits = Arc::new(Limits::new(&context.settings));
        let refusals = Refusals::new(context.metrics.clone());
        Self {
            context,
            mailbox: Arc::default(),
            limits,
            refusals,
        }
    }

    /// What is kept about clients.
    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    /// What was refused.
    pub(super) fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// Where answers of other threads arrive.
    pub(super) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// Answers a request. A refusal goes out at once, also while the body is still coming; then the
    /// connection ends.
    pub(super) async fn answer(&self, visit: &Visit, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let mut body = Arriving::new(body);
        match self.try_answer(&visit.account, &head, &mut body).await {
            Ok(response) => response,
            Err(problem) => {
                self.refusals.request(problem.status(), visit.address);
                // A client that still waits for 100 Continue has sent nothing, and will not.
                let coming = body.is_coming(head.headers.contains_key(EXPECT));
                let limit = self.context.settings.body_bytes_max;
                if coming {
                    body::discard(&mut body, limit, ARRIVED).await;
                }
                if body.is_read() {
                    return problem.into_response();
                }
                // Another one may write before it reads: what it writes is read meanwhile, or the
                // refusal would be lost with the connection.
                if coming {
                    let patience = self.context.settings.body_timeout;
                    tokio::spawn(async move { body::discard(&mut body, limit, patience).await });
                }
                problem.closing().into_response()
            }
        }
    }

    async fn try_answer(
        &self,
        peer: &Arc<Account>,
        head: &Parts,
        body: &mut Arriving,
    ) -> Result<Response<Body>, Problem> {
        check_host(head)?;
        check_transfer_coding(&head.headers)?;
        let found = route(&head.method, head.uri.path(), head.uri.query());
        if found == Ok(Route::Live) {
            refuse_body(body, &head.headers).await?;
            // Whoever supervises payrelay must not take a limit for its death; and it tells nothing
            // else.
            return Ok(json(
                StatusCode::OK,
                &serde_json::json!({ "status": "live" }),
            ));
        }
        let client = self.context.gate.identify(head, peer);
        let account = if let Ok(Some(client)) = &client {
            &client.account
        } else {
            peer
        };
        self.limits.request(account)?;
        let Some(client) = client? else {
            // Who has no token does not even learn what there is.
            return if found == Ok(Route::Ready) {
                Ok(self.bare_ready().await)
            } else {
                Err(Problem::no_token())
            };
        };
        let found = found?;
        client.require(found.needs())?;
        if !found.has_body() {
            refuse_body(body, &head.headers).await?;
        }
        match found {
            Route::About => Ok(about()),
            Route::Paid { reservation_id } => self.paid(reservation_id).await,
            Route::Pay => self.pay(&client, &head.headers, body).await,
            Route::Payment { id } => self.payment(id).await,
            Route::History {
                user_id,
                before,
                limit,
            } => self.history(user_id, before, limit).await,
            Route::Live | Route::Ready => Ok(self.ready().await),
            Route::Admin(route) => self.administer(&client, route, body).await,
        }
    }

    async fn pay(
        &self,
        client: &Client,
        headers: &HeaderMap,
        body: &mut Arriving,
    ) -> Result<Response<Body>, Problem> {
        if !is_json(headers) {
            return Err(Problem::unsupported_media_type());
        }
        if !is_plain(headers) {
            return Err(Problem::unsupported_coding());
        }
        let key = idempotency::key(headers)?;
        let settings = &self.context.settings;
        let mut held = self.limits.hold(&client.account);
        let bytes = body::read(
            body,
            settings.body_bytes_max,
            settings.body_timeout,
            &mut held,
        )
        .await?;
        self.context.store.admit()?;
        let new = NewPayment::parse(&bytes)?;
        let name = &client.name;
        let keyed = key.map(|key| Keyed {
            client: name.to_string(),
            key,
            body_hash: idempotency::hash(&bytes),
        });
        // While the writer works there is no body in memory.
        drop((bytes, held));
        let texts = |name| {
            headers
                .get_all(name)
                .iter()
                .map(|value| value.to_str().unwrap_or_default())
        };
        let trace = TraceContext::parse(texts("traceparent"), texts("tracestate"));
        let (answer, answered) = oneshot::channel();
        let (currency, relay) = (self.context.currency.clone(), self.context.relay.clone());
        let keys_max = self.context.keys_max;
        let arrived_at = self.context.store.service_time();
        let mailbox = Arc::clone(&self.mailbox);
        self.context.store.submit(
            new.reservations.len(),
            move |tx| {
                let now = Timestamp::now();
                let pay = || payments::execute(tx, &new, &currency, trace.as_ref(), now);
                match &keyed {
                    Some(keyed) => keys::once(tx, keyed, keys_max, arrived_at, pay),
                    None => pay().map(Once::Executed),
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
        match received(answered.await)? {
            Once::Executed(payments) => Ok(created(&payments)),
            Once::Replayed(payments) => {
                let mut response = created(&payments);
                response
                    .headers_mut()
                    .insert("idempotency-replayed", HeaderValue::from_static("true"));
                Ok(response)
            }
            Once::KeyReused => Err(Problem::key_reused()),
        }
    }

    /// Whether a reservation is paid, and by which payment.
    async fn paid(&self, reservation_id: i64) -> Result<Response<Body>, Problem> {
        let paid = self
            .query(move |connection| payments::of_reservation(connection, reservation_id))
            .await?;
        Ok(json(
            StatusCode::OK,
            &Payments {
                payments: paid.as_slice(),
            },
        ))
    }

    async fn payment(&self, id: i64) -> Result<Response<Body>, Problem> {
        let way = self
            .query(move |connection| payments::find(connection, id))
            .await?;
        let way = way.ok_or_else(|| Problem::not_found(format!("there is no payment {id}")))?;
        Ok(json(
            StatusCode::OK,
            &PaymentWay::new(&way, &self.context.store),
        ))
    }

    async fn history(
        &self,
        user_id: i64,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Response<Body>, Problem> {
        // One more than the page tells whether there is a next one.
        let payments = self
            .query(move |connection| payments::history(connection, user_id, before, limit + 1))
            .await?;
        let not_theirs = || {
            Problem::invalid_field(
                "before",
                "is not a payment of this user; use the path in next",
            )
        };
        let mut payments = payments.ok_or_else(not_theirs)?;
        let more = payments.len() > limit;
        payments.truncate(limit);
        let next = payments.last().filter(|_| more).map(|last| {
            format!(
                "/users/{user_id}/payment-history?before={}&limit={limit}",
                last.id
            )
        });
        Ok(json(
            StatusCode::OK,
            &History {
                user_id,
                payments: &payments,
                next,
            },
        ))
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
            // No payment is accepted any more, so that nothing else would show that the database
            // works again.
            store.probe();
        }
        let works = answers(&look) && !database.is_failing() && !disk.is_failing();
        let mut components: BTreeMap<_, _> = self
            .context
            .parts
            .iter()
            .map(|(name, part)| (name.as_str(), part.get()))
            .collect();
        let pending = self
            .context
            .snapshots
            .latest()
            .map(|snapshot| Pending::new(&snapshot, Timestamp::now()));
        let late = pending.as_ref().is_some_and(Pending::is_late);
        let (status, word) = if !works {
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
        } else if late || components.values().any(PartState::is_failing) {
            (StatusCode::OK, "degraded")
        } else {
            (StatusCode::OK, "ready")
        };
        components.extend([("database", database), ("disk", disk)]);
        (
            status,
            Ready {
                status: word,
                node: store.node().as_str(),
                components,
                pending,
                warnings: self.context.warnings.get(),
            },
        )
    }

    /// A write, and its result once it is on the disk.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl Fn(&Transaction<'_>) -> SqlResult<T> + Send + 'static,
    ) -> Result<T, Problem> {
        let (answer, answered) = oneshot::channel();
        let mailbox = Arc::clone(&self.mailbox);
        self.context
            .store
            .submit(1, work, move |result| mailbox.post(answer, result))?;
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
        self.context
            .store
            .query(query, move |result| mailbox.post(answer, result))?;
        received(answered.await)
    }
}

/// The answer of the store's thread; none comes if the store was closed with the work undone.
fn received<T>(
    answer: Result<Result<T, StoreError>, oneshot::error::RecvError>,
) -> Result<T, StoreError> {
    answer.unwrap_or(Err(StoreError::Closed))
}

/// Whether the database answers. That too many reads wait is not its refusal: payments have a queue
/// of their own.
fn answers<T>(look: &Result<T, StoreError>) -> bool {
    matches!(look, Ok(_) | Err(StoreError::Busy))
}

/// The answer to a request that paid. One payment has an address of its own.
fn created(payments: &[Payment]) -> Response<Body> {
    let mut response = json(StatusCode::CREATED, &Payments { payments });
    if let [payment] = payments
        && let Ok(location) = HeaderValue::from_str(&format!("/payments/{}", payment.id))
    {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

/// For who opens the address to see what is there.
fn about() -> Response<Body> {
    json(
        StatusCode::OK,
        &serde_json::json!({
            "name": "payrelay",
            "version": env!("CARGO_PKG_VERSION"),
            "description": env!("CARGO_PKG_DESCRIPTION"),
            "documentation": "README.md and docs/ of payrelay's source; `payrelay --help` lists \
                the commands",
            "routes": [
                "POST /payments", "GET /payments/{id}", "GET /payments?reservation_id={id}",
                "GET /users/{id}/payment-history", "GET /health/live", "GET /health/ready",
            ],
        }),
    )
}

/// Only chunked is known (RFC 9112, 6.1). A body whose last coding is another one never gets here.
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
    headers.insert(
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"),
    );
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
    /// `single`, `digest` or `summary`.
    #[serde(skip_serializing_if = "Option::is_none")]
    delivered_in: Option<&'a str>,
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
                delivered_in: told.delivered_in.as_deref(),
                last_error: told.last_error.as_deref(),
            }),
            // On its way to the delivery table.
            (None, Some(_)) => Some(Notification {
                status: "PENDING",
                channel: None,
                attempts: 0,
                unknown_outcomes: 0,
                delivered_at: None,
                delivered_in: None,
                last_error: None,
            }),
            (None, None) => None,
        };
        Self {
            payment: &way.payment,
            event,
            notification,
        }
    }
}

#[derive(Serialize)]
struct Ready<'a> {
    status: &'static str,
    node: &'a str,
    components: BTreeMap<&'a str, PartState>,
    /// `null` until the database was looked at for the first time.
    pending: Option<Pending>,
    /// Risks of the configuration: they do not change the status.
    warnings: Vec<String>,
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
        assert_eq!(
            get("/payments", Some("reservation_id=7")),
            Ok(Route::Paid { reservation_id: 7 })
        );
        assert_eq!(get("/", None), Ok(Route::About));
        assert_eq!(route(&Method::HEAD, "/health/live", None), Ok(Route::Live));
        assert_eq!(get("/health/ready", None), Ok(Route::Ready));
        let history = |before, limit| {
            Ok(Route::History {
                user_id: 42,
                before,
                limit,
            })
        };
        assert_eq!(get("/users/42/payment-history", None), history(None, PAGE));
        assert_eq!(
            get("/users/42/payment-history", Some("limit=2&before=9")),
            history(Some(9), 2)
        );
    }

    #[test]
    fn each_route_needs_its_access() {
        let needs = |method: &Method, path| route(method, path, None).map(|route| route.needs());
        assert_eq!(needs(&Method::POST, "/payments"), Ok(Access::Full));
        for path in [
            "/payments/7",
            "/users/42/payment-history",
            "/health/live",
            "/health/ready",
        ] {
            assert_eq!(needs(&Method::GET, path), Ok(Access::ReadOnly), "{path}");
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
    fn refuses_what_is_not_there() {
        for path in [
            "/payment",
            "/payments/",
            "/payments/abc",
            "/payments/1/x",
            "/users/42",
            "/health",
            "//payments",
        ] {
            let missing = Problem::not_found(format!("there is nothing at {path}"));
            assert_eq!(route(&Method::GET, path, None), Err(missing), "{path}");
        }
        let missing = Problem::invalid_field(
            "reservation_id",
            "is missing: GET /payments?reservation_id=1001",
        );
        assert_eq!(get("/payments", None), Err(missing));
        assert_eq!(
            route(&Method::PUT, "/payments", None),
            Err(Problem::method_not_allowed("GET, HEAD, POST"))
        );
        assert_eq!(
            route(&Method::DELETE, "/payments/1", None),
            Err(Problem::method_not_allowed("GET, HEAD"))
        );
    }

    #[test]
    fn refuses_numbers_that_cannot_be() {
        for id in ["9223372036854775808", "-1", "+1", "1.0", "x", "%31"] {
            let path = format!("/payments/{id}");
            let missing = Problem::not_found(format!("there is nothing at {path}"));
            assert_eq!(get(&path, None), Err(missing), "{id}");
            assert!(
                get("/payments", Some(&format!("reservation_id={id}"))).is_err(),
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
                get("/users/1/payment-history", Some(query)).is_err(),
                "{query}"
            );
        }
        for path in ["/", "/payments/1", "/health/live", "/health/ready"] {
            assert!(get(path, Some("verbose=true")).is_err(), "{path}");
        }
        assert!(route(&Method::POST, "/payments", Some("dry_run=true")).is_err());
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
            let Ok(method) = Method::from_bytes(method.as_bytes()) else {
                return false;
            };
            let (path, query) = target
                .split_once('?')
                .map_or((target, None), |(path, query)| (path, Some(query)));
            match route(&method, path, query) {
                Ok(Route::Payment { id }) => assert!(id >= 0),
                Ok(Route::History {
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
                Ok(Route::Pay) => assert!(method == Method::POST && path.ends_with("payments")),
                Ok(Route::Admin(
                    admin::Route::Act { .. }
                    | admin::Route::Resume { .. }
                    | admin::Route::Skip { .. },
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

    #[test]
    fn json_is_told_by_its_type() {
        let typed = |text| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(text));
            is_json(&headers)
        };
        assert!(
            typed("application/json")
                && typed("Application/JSON; charset=utf-8")
                && typed("application/x+json")
        );
        assert!(
            !typed("text/plain")
                && !typed("application/jsonp")
                && !typed("")
                && !is_json(&HeaderMap::new())
        );
    }
}
