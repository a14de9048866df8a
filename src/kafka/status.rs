//! The reports of an edge, on a topic of their own. A report that cannot be sent is no outage: the
//! next one has everything.

use std::time::{Duration, Instant};

use krafka::error::KrafkaError;
use krafka::producer::Producer;
use krafka::{Kafka, Record};
use tokio::time::timeout;

use super::producer_builder::status_producer;
use crate::domain::node_id::NodeId;
use crate::domain::node_status::status_topic;

/// How long the broker may need for a report. An event that comes meanwhile waits for it.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Makes the text of a report. The argument is the largest id of an event on the topic.
pub type StatusSource = Box<dyn Fn(i64) -> Option<String> + Send + Sync>;

/// The reports of a node.
pub struct StatusReports {
    /// How often it reports.
    pub interval: Duration,
    /// Makes the text.
    pub source: StatusSource,
}

/// The reports of one session.
pub(super) struct StatusReporter {
    producer: Option<Producer>,
    due: Instant,
    /// Whether the last report was not sent. The log says so once.
    is_failing: bool,
}

impl StatusReporter {
    /// The first report follows the start. A thousand nodes do not report at the same moment.
    pub(super) fn new(interval: Duration) -> Self {
        let first = (interval / 10).mul_f64(fastrand::f64());
        Self {
            producer: None,
            due: Instant::now() + first,
            is_failing: false,
        }
    }

    /// When the next report is due.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Sends a report.
    pub(super) async fn report(
        &mut self,
        kafka: &Kafka,
        (node, events): (&NodeId, &str),
        reports: &StatusReports,
        last_published: i64,
    ) {
        self.due = Instant::now() + reports.interval.mul_f64(0.9 + 0.2 * fastrand::f64());
        let Some(text) = (reports.source)(last_published) else {
            return;
        };
        let topic = status_topic(events);
        let record = Record::new(&topic, text).key(node.as_str().to_owned());
        let failure = match timeout(SEND_TIMEOUT, self.send(kafka, record)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer".to_owned()),
        };
        match failure {
            None => self.is_failing = false,
            Some(reason) if !self.is_failing => {
                self.is_failing = true;
                log::warn!(
                    event = "status_not_reported";
                    "the state of this node was not reported on the topic {topic}: {reason}. \
                        Events are published all the same. `payrelay fleet init` creates the topic"
                );
            }
            Some(reason) => log::debug!("the state was not reported on {topic}: {reason}"),
        }
    }

    async fn send(&mut self, kafka: &Kafka, record: Record) -> Result<(), KrafkaError> {
        let producer = match &self.producer {
            Some(producer) => producer,
            None => self.producer.insert(status_producer(kafka).await?),
        };
        producer.send(record).await.map(drop)
    }
}
