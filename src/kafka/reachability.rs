//! The brokers that accept no connection at their advertised address: often the reason for missing
//! answers.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use krafka::{BrokerInfo, Kafka};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout_at;

/// The longest test of all brokers: a few round trips on any network.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the last result is used. A DNS lookup cannot be cancelled, and lookups must not pile
/// up.
const REFRESH_INTERVAL: Duration = Duration::from_secs(30);

/// A broker, at the address that the cluster advertises.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct BrokerAddress {
    id: i32,
    address: String,
}

/// The last test of the brokers' addresses.
#[derive(Debug, Default)]
pub(crate) struct Reachability {
    refreshed_at: Option<Instant>,
    brokers: Vec<BrokerAddress>,
    /// The brokers that accept no connection, and why.
    refusals: Vec<(BrokerAddress, String)>,
}

impl Reachability {
    /// A broker has answered: the next failure tests again.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// The brokers that do not answer, and the remedy. `kafka` is `None` before the first answer of
    /// a bootstrap server.
    pub(crate) async fn locate_silence(
        &mut self,
        kafka: Option<&Kafka>,
        bootstrap_servers: &[String],
    ) -> String {
        self.refresh(kafka).await;
        if self.brokers.is_empty() {
            return format!("none from {}", bootstrap_servers.join(", "));
        }
        self.describe(bootstrap_servers)
    }

    /// The brokers that accept no connection, and the remedy; `None` if all of them do.
    pub(crate) async fn unreachable(
        &mut self,
        kafka: &Kafka,
        bootstrap_servers: &[String],
    ) -> Option<String> {
        self.refresh(Some(kafka)).await;
        (!self.refusals.is_empty()).then(|| self.describe(bootstrap_servers))
    }

    async fn refresh(&mut self, kafka: Option<&Kafka>) {
        let Some(kafka) = kafka else { return };
        if self
            .refreshed_at
            .is_some_and(|at| at.elapsed() < REFRESH_INTERVAL)
        {
            return;
        }
        self.refreshed_at = Some(Instant::now());
        self.brokers = known_broker_addresses(kafka).await;
        self.refusals = unreachable_brokers(&self.brokers).await;
    }

    fn describe(&self, bootstrap_servers: &[String]) -> String {
        const HINT: &str =
            "if this machine cannot reach that address, correct advertised.listeners of the broker";
        let is_known = |broker: &BrokerAddress| bootstrap_servers.contains(&broker.address);
        let name = |broker: &BrokerAddress| {
            let BrokerAddress { id, address } = broker;
            // A bootstrap server has the right address.
            let source = if is_known(broker) {
                ""
            } else {
                ", as the cluster says"
            };
            format!("broker {id} at {address}{source}")
        };
        let (text, are_known) = if self.refusals.is_empty() {
            let named: Vec<_> = self.brokers.iter().map(name).collect();
            let text = format!(
                "{}: connections are accepted and not answered; the broker is overloaded, or \
                    something else listens there",
                named.join(", ")
            );
            (text, self.brokers.iter().all(is_known))
        } else {
            let refused = self
                .refusals
                .iter()
                .map(|(broker, reason)| format!("{} {reason}", name(broker)));
            let text = refused.collect::<Vec<_>>().join("; ");
            (
                text,
                self.refusals.iter().all(|(broker, _)| is_known(broker)),
            )
        };
        if are_known {
            text
        } else {
            format!("{text}; {HINT}")
        }
    }
}

/// The brokers of the cluster's last metadata. Sends no request.
async fn known_broker_addresses(kafka: &Kafka) -> Vec<BrokerAddress> {
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
        .map(|metadata| metadata.brokers)
        .unwrap_or_default();
    let address = |broker: BrokerInfo| BrokerAddress {
        id: broker.id(),
        address: broker.address().to_owned(),
    };
    let mut brokers: Vec<BrokerAddress> = brokers.into_iter().map(address).collect();
    brokers.sort();
    brokers
}

async fn unreachable_brokers(brokers: &[BrokerAddress]) -> Vec<(BrokerAddress, String)> {
    let deadline = (Instant::now() + REFRESH_TIMEOUT).into();
    let mut refusals = Vec::new();
    let mut attempts = JoinSet::new();
    for broker in brokers.iter().cloned() {
        // One after the other: the runtime has a single thread for lookups, and a slow one blocks
        // it.
        let found = timeout_at(deadline, lookup_host(&broker.address)).await;
        let found = found.map(|found| found.map(Iterator::collect::<Vec<SocketAddr>>));
        let addresses = match found {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => {
                refusals.push((
                    broker,
                    format!("has a name that cannot be resolved ({error})"),
                ));
                continue;
            }
            Err(_) => {
                let reason = format!("has a name that was not resolved within {REFRESH_TIMEOUT:?}");
                refusals.push((broker, reason));
                break;
            }
        };
        attempts.spawn(async move {
            let reason = match timeout_at(deadline, TcpStream::connect(&*addresses)).await {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(unreachable_reason(&error)),
                Err(_) => Some(format!("no answer within {REFRESH_TIMEOUT:?}")),
            };
            reason.map(|reason| (broker, format!("accepts no connection ({reason})")))
        });
    }
    refusals.extend(attempts.join_all().await.into_iter().flatten());
    refusals.sort();
    refusals
}

fn unreachable_reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        _ => error.to_string(),
    }
}
