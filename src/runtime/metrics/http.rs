//! The metrics of the HTTP server. Their labels come from the table of routes, never from a
//! request.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use super::histogram::{BucketCounts, Buckets, Histogram};
use super::labeled::LabeledMetrics;
use super::registrar::Registrar;
use crate::domain::text_enum::text_enum;

text_enum! {
    /// Why a connection was refused.
    pub enum ConnectionRefusal {
        /// Its address had its maximum of connections.
        ClientLimit = "client_limit",
        /// The operating system could not accept it.
        AcceptFailed = "accept_failed",
    }
}

/// The values of the label `method`; every other method is the last one.
const METHODS: [&str; 5] = ["GET", "HEAD", "POST", "OPTIONS", "other"];

/// The values of the label `code`; every other status is the last one.
const CODES: [u16; 20] = [
    200, 201, 303, 304, 400, 401, 403, 404, 405, 408, 409, 413, 415, 421, 422, 429, 501, 503, 507,
    OTHER_CODE,
];

/// No status that payrelay sends.
const OTHER_CODE: u16 = 0;

/// What the HTTP server counts.
#[derive(Debug)]
pub struct HttpMetrics {
    requests: RequestFamily,
    durations: LabeledMetrics<Histogram>,
    /// The open connections.
    pub connections: Gauge,
    refused: Vec<Counter>,
    /// Payments that were executed.
    pub completed: Counter,
    /// Payments that were refused, because the reservation was paid already.
    pub failed: Counter,
    /// Requests whose first response was sent again.
    pub replayed: Counter,
    /// Requests with the Idempotency-Key of another request.
    pub key_reused: Counter,
}

impl HttpMetrics {
    pub(super) fn register(add: &mut Registrar<'_>) -> Self {
        let [completed, failed] = add.counters(
            "payments",
            "Stored payments, by their outcome",
            "status",
            ["COMPLETED", "FAILED"],
        );
        let [replayed, key_reused] = add.counters(
            "idempotent_answers",
            "Requests with a known Idempotency-Key: answered as before, or refused as another one",
            "kind",
            ["replayed", "key_reused"],
        );
        let reasons = ConnectionRefusal::ALL.iter().map(|reason| reason.as_str());
        Self {
            requests: add.add(
                "http_requests",
                "Responses, by the pattern of the path, the method and the status",
                RequestFamily::default(),
            ),
            durations: add.add(
                "http_request_duration_seconds",
                "From a complete head to the response, by the pattern of the path",
                LabeledMetrics::default(),
            ),
            connections: add.gauge("http_connections", "Open connections"),
            refused: add.enum_counters(
                "http_connections_refused",
                "Connections that were not served",
                "reason",
                reasons,
            ),
            completed,
            failed,
            replayed,
            key_reused,
        }
    }

    /// The metrics of a route. Its series for these methods and statuses exist from the start;
    /// others appear with their first response.
    pub fn add_route(
        &self,
        pattern: &'static str,
        methods: &'static [&'static str],
        codes: &'static [u16],
    ) -> RouteMetrics {
        let requests = Arc::new(RouteRequests {
            pattern,
            methods,
            codes,
            counts: std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))),
        });
        self.requests
            .lock(|routes| routes.push(Arc::clone(&requests)));
        let duration = Histogram::new(Buckets::REQUEST);
        RouteMetrics {
            requests,
            duration: self.durations.add(&[("route", pattern)], duration),
        }
    }

    /// The durations of a route's requests until now.
    pub fn durations_of_route(&self, pattern: &str) -> Option<BucketCounts> {
        self.durations
            .find(pattern)
            .map(|durations| durations.counts())
    }

    /// A connection was refused.
    pub fn refused(&self, reason: ConnectionRefusal) {
        self.refused[reason as usize].inc();
    }
}

/// The metrics of one route.
#[derive(Debug)]
pub struct RouteMetrics {
    requests: Arc<RouteRequests>,
    duration: Histogram,
}

impl RouteMetrics {
    /// A response was made.
    pub fn answered(&self, method: &str, code: u16, duration: Duration) {
        let method = METHODS.iter().position(|known| *known == method);
        let code = CODES.iter().position(|known| *known == code);
        let of_method = &self.requests.counts[method.unwrap_or(METHODS.len() - 1)];
        of_method[code.unwrap_or(CODES.len() - 1)].fetch_add(1, Relaxed);
        self.duration.observe(duration);
    }
}

#[derive(Debug)]
struct RouteRequests {
    pattern: &'static str,
    methods: &'static [&'static str],
    codes: &'static [u16],
    counts: [[AtomicU64; CODES.len()]; METHODS.len()],
}

/// The counters of all routes. The possible series are bounded, and most stay zero: they are shown
/// once they are expected or counted.
#[derive(Debug, Clone, Default)]
struct RequestFamily(Arc<Mutex<Vec<Arc<RouteRequests>>>>);

impl RequestFamily {
    fn lock<T>(&self, work: impl FnOnce(&mut Vec<Arc<RouteRequests>>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl EncodeMetric for RequestFamily {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        for route in self.lock(|routes| routes.clone()) {
            for (method, counts) in METHODS.iter().zip(&route.counts) {
                for (code, count) in CODES.iter().zip(counts) {
                    let count = count.load(Relaxed);
                    let is_expected = route.methods.contains(method) && route.codes.contains(code);
                    if count == 0 && !is_expected {
                        continue;
                    }
                    let code = match *code {
                        OTHER_CODE => "other".to_owned(),
                        code => code.to_string(),
                    };
                    let labels = [
                        ("route", route.pattern),
                        ("method", method),
                        ("code", code.as_str()),
                    ];
                    encoder
                        .encode_family(&labels)?
                        .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}
