//! Which brokers accept no connection at the addresses that the cluster gives: often the reason why
//! no answer comes.

use std::io;
use std::time::Duration;

use krafka::{BrokerInfo, Kafka};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long one connection may take: a few round trips on any network.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// A broker, where the cluster says that it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    broker: i32,
    address: String,
}

/// Where no answer comes from, and what to do about it. `kafka` is `None` before the first answer
/// of a bootstrap server.
pub(crate) async fn locate_silence(kafka: Option<&Kafka>, bootstrap_servers: &[String]) -> String {
    let places = match kafka {
        Some(kafka) => places(kafka).await,
        None => Vec::new(),
    };
    if places.is_empty() {
        return format!("none from {}", bootstrap_servers.join(", "));
    }
    let refusals = refusals(&places).await;
    describe(&places, &refusals, bootstrap_servers)
}

/// Brokers that accept no connection, and what to do about it; `None` if all of them do.
pub(crate) async fn unreachable(kafka: &Kafka, bootstrap_servers: &[String]) -> Option<String> {
    let places = places(kafka).await;
    let refusals = refusals(&places).await;
    (!refusals.is_empty()).then(|| describe(&places, &refusals, bootstrap_servers))
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

/// The brokers that accept no connection, and why.
async fn refusals(places: &[Place]) -> Vec<(Place, String)> {
    let mut attempts = JoinSet::new();
    for place in places.iter().cloned() {
        attempts.spawn(async move {
            let refusal = match timeout(CONNECT_LIMIT, TcpStream::connect(&place.address)).await {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(reason(&error)),
                Err(_) => Some(format!("no answer within {} s", CONNECT_LIMIT.as_secs())),
            };
            refusal.map(|refusal| (place, refusal))
        });
    }
    let mut refusals: Vec<_> = attempts.join_all().await.into_iter().flatten().collect();
    refusals.sort();
    refusals
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        _ => error.to_string(),
    }
}

fn describe(
    places: &[Place],
    refusals: &[(Place, String)],
    bootstrap_servers: &[String],
) -> String {
    const HINT: &str =
        "if this machine cannot reach that address, correct advertised.listeners of the broker";
    if refusals.is_empty() {
        let places: Vec<_> = places
            .iter()
            .map(|Place { broker, address }| format!("broker {broker} at {address}"))
            .collect();
        return format!(
            "the cluster gives {}, which accepts connections; {HINT}",
            places.join(", ")
        );
    }
    let is_known = |place: &Place| bootstrap_servers.contains(&place.address);
    let refused = refusals.iter().map(|(Place { broker, address }, reason)| {
        format!(
            "the cluster gives {address} as the address of broker {broker}, which accepts no \
            connection ({reason})"
        )
    });
    let text = refused.collect::<Vec<_>>().join("; ");
    // A bootstrap server that went away has the right address.
    if refusals.iter().all(|(place, _)| is_known(place)) {
        text
    } else {
        format!("{text}; {HINT}")
    }
}
