//! Which brokers accept no connection at the addresses that the cluster gives: often the reason why
//! no answer comes.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use krafka::{BrokerInfo, Kafka};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout_at;

/// How long one look may take: a few round trips on any network.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// How old the last look may be. A lookup of a name cannot be cancelled, so looks must not pile up.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// A broker, where the cluster says that it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    broker: i32,
    address: String,
}

/// What is known of the brokers' addresses.
#[derive(Debug, Default)]
pub(crate) struct Reachability {
    looked_at: Option<Instant>,
    places: Vec<Place>,
    /// The brokers that accept no connection, and why.
    refusals: Vec<(Place, String)>,
}

impl Reachability {
    /// Something was answered: the next failure looks again.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Where no answer comes from, and what to do about it. `kafka` is `None` before the first
    /// answer of a bootstrap server.
    pub(crate) async fn locate_silence(
        &mut self,
        kafka: Option<&Kafka>,
        bootstrap_servers: &[String],
    ) -> String {
        self.look(kafka).await;
        if self.places.is_empty() {
            return format!("none from {}", bootstrap_servers.join(", "));
        }
        self.describe(bootstrap_servers)
    }

    /// Brokers that accept no connection, and what to do about it; `None` if all of them do.
    pub(crate) async fn unreachable(
        &mut self,
        kafka: &Kafka,
        bootstrap_servers: &[String],
    ) -> Option<String> {
        self.look(Some(kafka)).await;
        (!self.refusals.is_empty()).then(|| self.describe(bootstrap_servers))
    }

    async fn look(&mut self, kafka: Option<&Kafka>) {
        let Some(kafka) = kafka else { return };
        if self
            .looked_at
            .is_some_and(|at| at.elapsed() < LOOK_INTERVAL)
        {
            return;
        }
        self.looked_at = Some(Instant::now());
        self.places = places(kafka).await;
        self.refusals = refusals(&self.places).await;
    }

    fn describe(&self, bootstrap_servers: &[String]) -> String {
        const HINT: &str =
            "if this machine cannot reach that address, correct advertised.listeners of the broker";
        let is_known = |place: &Place| bootstrap_servers.contains(&place.address);
        let name = |place: &Place| {
            let Place { broker, address } = place;
            // A bootstrap server has the right address.
            let source = if is_known(place) {
                ""
            } else {
                ", as the cluster says"
            };
            format!("broker {broker} at {address}{source}")
        };
        let (text, are_known) = if self.refusals.is_empty() {
            let named: Vec<_> = self.places.iter().map(name).collect();
            let text = format!(
                "{}: connections are accepted and not answered; the broker is overloaded, or \
                    something else listens there",
                named.join(", ")
            );
            (text, self.places.iter().all(is_known))
        } else {
            let refused = self
                .refusals
                .iter()
                .map(|(place, reason)| format!("{} {reason}", name(place)));
            let text = refused.collect::<Vec<_>>().join("; ");
            (text, self.refusals.iter().all(|(place, _)| is_known(place)))
        };
        if are_known {
            text
        } else {
            format!("{text}; {HINT}")
        }
    }
}

/// What the last answer of the cluster said. Asks no broker.
async fn places(kafka: &Kafka) -> Vec<Place> {
    let Ok(consumer) = kafka
        .consumer_without_group()
        .metrics_push(false)
        .build()
        .await
    else {
        return Vec::new();
    };
    let brokers = consumer
        .fetch_metadata(None)
        .await
        .map(|found| found.brokers)
        .unwrap_or_default();
    let place = |broker: BrokerInfo| Place {
        broker: broker.id(),
        address: broker.address().to_owned(),
    };
    let mut places: Vec<Place> = brokers.into_iter().map(place).collect();
    places.sort();
    places
}

async fn refusals(places: &[Place]) -> Vec<(Place, String)> {
    let deadline = (Instant::now() + LOOK_LIMIT).into();
    let mut refusals = Vec::new();
    let mut attempts = JoinSet::new();
    for place in places.iter().cloned() {
        // One after the other: the runtime has one thread for lookups, and a slow one blocks it.
        let found = timeout_at(deadline, lookup_host(&place.address)).await;
        let found = found.map(|found| found.map(Iterator::collect::<Vec<SocketAddr>>));
        let addresses = match found {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => {
                refusals.push((
                    place,
                    format!("has a name that cannot be resolved ({error})"),
                ));
                continue;
            }
            Err(_) => {
                let reason = format!("has a name that was not resolved within {LOOK_LIMIT:?}");
                refusals.push((place, reason));
                break;
            }
        };
        attempts.spawn(async move {
            let reason = match timeout_at(deadline, TcpStream::connect(&*addresses)).await {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(reason(&error)),
                Err(_) => Some(format!("no answer within {LOOK_LIMIT:?}")),
            };
            reason.map(|reason| (place, format!("accepts no connection ({reason})")))
        });
    }
    refusals.extend(attempts.join_all().await.into_iter().flatten());
    refusals.sort();
    refusals
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        _ => error.to_string(),
    }
}
