//! The publisher to Apache Kafka: acks=all, idempotent, one batch of a partition in flight.
//!
//! The guarantee: an event that has a receipt is on every in-sync replica; a user's events are on their partition in
//! commit order. krafka repeats a batch whose answer was lost under the same sequence numbers, so the broker drops
//! the second copy. What is left open is a crash of this process between the broker's word and the mark.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use krafka::error::KrafkaError;
use krafka::producer::{Acks, DeliveryConfirmation, DeliveryHandle, Producer, RecordMetadata};
use tokio::task::coop::unconstrained;

use super::{Away, Published, Publisher};
use crate::clock::Timestamp;
use crate::config;
use crate::event::{Event, NodeId, Record};
use crate::kafka::{Driver, Failure, Link, within};
use crate::store::outbox::{Place, Receipt};

/// How long one call waits for the broker's word before it says that the broker is away. The batch stays in flight.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long one call tries to connect; the next one goes on from what was reached.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// krafka repeats a batch for this long, without ever doubling it. Only when this is over are its events handed
/// over anew, and then one that was written without an answer shows twice on the topic, under the same event id.
const DELIVERY_TIMEOUT: Duration = Duration::from_mins(5);

/// Longer than it takes to queue a batch, so that a batch of the outbox becomes one batch of each partition, sent by
/// the flush that follows: such a batch is taken whole or not at all, and nothing overtakes.
const LINGER: Duration = Duration::from_secs(1);

/// Room for 1,000 events in one batch of a partition, and less than what a broker takes by default
/// (`message.max.bytes`, 1,048,588).
const BATCH_BYTES: usize = 1_000_000;

/// Publishes to a topic.
pub struct KafkaPublisher {
    // Before the runtime, which its tasks need.
    session: Session,
    driver: Driver,
}

struct Session {
    link: Link,
    node: NodeId,
    producer: Option<Producer>,
    in_flight: Vec<InFlight>,
}

struct InFlight {
    outbox_id: i64,
    handle: DeliveryHandle,
}

impl KafkaPublisher {
    /// Connects when it first publishes.
    pub fn new(settings: config::Kafka, node: NodeId) -> io::Result<Self> {
        let link = Link::new(settings, format!("payrelay-publisher-{node}"));
        let session = Session { link, node, producer: None, in_flight: Vec::new() };
        Ok(Self { session, driver: Driver::new()? })
    }
}

impl Publisher for KafkaPublisher {
    fn publish(&mut self, batch: &[Event]) -> Published {
        self.driver.runtime().block_on(self.session.publish(batch))
    }

    fn name(&self) -> &'static str {
        "Kafka (publisher)"
    }
}

impl Session {
    async fn publish(&mut self, batch: &[Event]) -> Published {
        let mut failure = None;
        if self.in_flight.is_empty() {
            failure = within(CONNECT_PATIENCE, self.hand_over(batch)).await.err();
        }
        if let (Some(producer), false) = (&self.producer, self.in_flight.is_empty()) {
            failure = within(PATIENCE, producer.flush()).await.err().or(failure);
        }
        let (receipts, refused) = self.collect().await;
        if refused.is_some() && self.in_flight.is_empty() {
            // The next try starts afresh: another leader, a topic that was deleted, a fenced epoch.
            self.producer = None;
            self.link.forget();
        }
        let away = refused.map(Failure::from).or(failure).map(|failure| Away(failure.to_string()));
        Published { receipts, away }
    }

    /// Queues the batch. What was queued before this failed or was dropped stays in flight.
    async fn hand_over(&mut self, batch: &[Event]) -> Result<(), KrafkaError> {
        let producer = match &self.producer {
            Some(producer) => producer,
            None => self.producer.insert(build(&self.link.get().await?).await?),
        };
        let now = Timestamp::now();
        for event in batch {
            let record = to_krafka(&self.link.settings().topic, event.to_record(&self.node, now));
            let handle = producer.enqueue(record).await?;
            self.in_flight.push(InFlight { outbox_id: event.outbox_id, handle });
        }
        Ok(())
    }

    /// Takes the answers that are there; what has none stays in flight.
    async fn collect(&mut self) -> (Vec<Receipt>, Option<KrafkaError>) {
        let mut receipts = Vec::with_capacity(self.in_flight.len());
        let mut failed = None;
        for mut flight in std::mem::take(&mut self.in_flight) {
            match answer(&mut flight.handle).await {
                Some(Ok(metadata)) => {
                    receipts.push(Receipt { outbox_id: flight.outbox_id, place: place(&metadata) });
                }
                Some(Err(error)) => failed = failed.or(Some(error)),
                None => self.in_flight.push(flight),
            }
        }
        (receipts, failed)
    }
}

/// The answer if it is there. Unconstrained: the runtime's budget would hide answers that are.
async fn answer(handle: &mut DeliveryHandle) -> Option<Result<RecordMetadata, KrafkaError>> {
    let mut handle = unconstrained(handle);
    poll_fn(|cx| match Pin::new(&mut handle).poll(cx) {
        Poll::Ready(answer) => Poll::Ready(Some(answer)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

async fn build(kafka: &krafka::Kafka) -> Result<Producer, KrafkaError> {
    kafka
        .producer()
        .acks(Acks::All)
        .idempotent(true)
        .linger(LINGER)
        .batch_size(BATCH_BYTES)
        .delivery_timeout(DELIVERY_TIMEOUT)
        // Operators watch payrelay, not its client.
        .metrics_push(false)
        .build()
        .await
}

fn to_krafka(topic: &str, record: Record) -> krafka::Record {
    let out = krafka::Record::new(topic, record.value).key(record.key).timestamp(record.timestamp_ms);
    record.headers.into_iter().fold(out, |out, (name, value)| out.header(name, value))
}

fn place(metadata: &RecordMetadata) -> Place {
    // A broker that drops a second copy may not tell where the first one is.
    let offset = (metadata.delivery == DeliveryConfirmation::Offset).then_some(metadata.offset);
    Place::Topic { partition: metadata.partition, offset }
}
