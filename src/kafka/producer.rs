//! One batch, handed over to Kafka: in a transaction of the producer whose turn it is, or by an
//! idempotent producer.

use std::time::{Duration, Instant};

use krafka::error::{ErrorCode, KrafkaError};
use krafka::producer::{
    DeliveryConfirmation, DeliveryHandle, Producer, RecordMetadata, TransactionalProducer,
};
use krafka::{CloseOptions, Kafka};

use super::commit_order::CommitOrder;
use super::producer_builder::idempotent_producer;
use super::producer_ring::ProducerRing;
use crate::config::{Compression, DeliveryGuarantee};
use crate::domain::event::{Event, Record, RecordSource};
use crate::domain::timestamp::Timestamp;
use crate::store::publication::{Destination, Receipt};

/// A producer of either kind.
pub(super) enum AnyProducer {
    Plain(Box<Producer>),
    Transactional(ProducerRing),
}

impl AnyProducer {
    /// An idempotent producer.
    pub(super) async fn plain(
        kafka: &Kafka,
        compression: Compression,
    ) -> Result<Self, KrafkaError> {
        let producer = idempotent_producer(kafka, compression).await?;
        Ok(Self::Plain(Box::new(producer)))
    }

    pub(super) fn guarantee(&self) -> DeliveryGuarantee {
        match self {
            Self::Plain(_) => DeliveryGuarantee::AtLeastOnce,
            Self::Transactional(_) => DeliveryGuarantee::ExactlyOnce,
        }
    }

    async fn close(&self) {
        match self {
            Self::Plain(producer) => {
                let at_once = CloseOptions::new().timeout(Duration::ZERO);
                let _ = producer.close_with(at_once).await;
            }
            Self::Transactional(ring) => ring.close().await,
        }
    }
}

/// The ids of an event in a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct SentEvent {
    pub(super) outbox_id: i64,
    pub(super) payment_id: i64,
}

/// A batch, as it is handed over.
pub(super) struct Batch {
    events: Vec<SentEvent>,
    records: Vec<krafka::Record>,
}

impl Batch {
    /// `previous` is the event of this database before the first one on the topic.
    pub(super) fn new(place: &Place<'_>, mut previous: i64, events: &[Event]) -> Self {
        let now = Timestamp::now();
        let producer_record = |event: &Event| {
            let record = event.to_record(place.source, previous, now);
            previous = event.outbox_id;
            producer_record(place, record)
        };
        let sent = |event: &Event| SentEvent {
            outbox_id: event.outbox_id,
            payment_id: event.payment_id,
        };
        Self {
            events: events.iter().map(sent).collect(),
            records: events.iter().map(producer_record).collect(),
        }
    }
}

/// Where a batch goes, and from where.
pub(super) struct Place<'a> {
    pub(super) topic: &'a str,
    /// `None`: the key decides.
    pub(super) partition: Option<i32>,
    pub(super) source: &'a RecordSource,
}

fn producer_record(place: &Place<'_>, record: Record) -> krafka::Record {
    let mut out = krafka::Record::new(place.topic, record.value)
        .key(record.key)
        .timestamp(record.timestamp_ms);
    if let Some(partition) = place.partition {
        out = out.partition(partition);
    }
    record
        .headers
        .into_iter()
        .fold(out, |out, (name, value)| out.header(name, value))
}

/// The outcome of a batch.
pub(super) struct SendOutcome {
    pub(super) events: Vec<SentEvent>,
    pub(super) receipts: Vec<Receipt>,
    pub(super) error: Option<KrafkaError>,
    pub(super) began: Instant,
}

/// The acknowledged records, each with its index in the batch, and the first error.
#[derive(Default)]
struct Acknowledged {
    records: Vec<(usize, RecordMetadata)>,
    error: Option<KrafkaError>,
}

/// Sends a batch. The future is never dropped half-way: call after call polls it to its end.
pub(super) async fn send_batch(producer: &mut AnyProducer, batch: Batch) -> SendOutcome {
    let began = Instant::now();
    let Batch { events, records } = batch;
    let Acknowledged { records, error } = match producer {
        AnyProducer::Plain(producer) => send_without_transaction(producer, records).await,
        AnyProducer::Transactional(ring) => send_in_transaction(ring, records).await,
    };
    if error.is_some() {
        // Records that are still queued must not be sent after the next producer has started.
        producer.close().await;
    }
    let receipt = |(index, metadata): (usize, RecordMetadata)| Receipt {
        outbox_id: events[index].outbox_id,
        place: destination_of_sent_record(&metadata),
    };
    SendOutcome {
        receipts: records.into_iter().map(receipt).collect(),
        events,
        error,
        began,
    }
}

/// Some records may be acknowledged while others are not.
async fn send_without_transaction(
    producer: &Producer,
    records: Vec<krafka::Record>,
) -> Acknowledged {
    let mut handles = Vec::with_capacity(records.len());
    let mut enqueue_error = None;
    for record in records {
        match producer.enqueue(record).await {
            Ok(handle) => handles.push(handle),
            Err(error) => {
                enqueue_error = Some(error);
                break;
            }
        }
    }
    let flushed = producer.flush().await;
    let acknowledged = confirm_sent_records(handles).await;
    Acknowledged {
        error: enqueue_error.or(acknowledged.error).or(flushed.err()),
        ..acknowledged
    }
}

/// All records are acknowledged, or none. Where the outcome is unknown, the next session reads it
/// from the topic before it sends anything.
async fn send_in_transaction(
    ring: &mut ProducerRing,
    records: Vec<krafka::Record>,
) -> Acknowledged {
    let (producer, order) = ring.current();
    match try_in_transaction(producer, order, records).await {
        Ok(records) => {
            order.committed(&records);
            ring.pass_turn();
            Acknowledged {
                records,
                error: None,
            }
        }
        Err(error) => Acknowledged {
            records: Vec::new(),
            error: Some(error),
        },
    }
}

async fn try_in_transaction(
    producer: &TransactionalProducer,
    order: &mut CommitOrder,
    records: Vec<krafka::Record>,
) -> Result<Vec<(usize, RecordMetadata)>, KrafkaError> {
    producer.begin()?;
    match send_in_order(producer, order, records).await {
        Ok(acknowledged) => producer.commit().await.map(|()| acknowledged),
        Err(error) if is_producer_fenced(&error) => Err(error),
        Err(error) => match producer.abort().await {
            // With the later protocol a fenced producer learns it here.
            Err(fenced) if is_producer_fenced(&fenced) => Err(fenced),
            // When the abort fails, the next producer has the broker abort it.
            Ok(()) | Err(_) => Err(error),
        },
    }
}

/// Sends the records in the open transaction. It may be committed then.
async fn send_in_order(
    producer: &TransactionalProducer,
    order: &mut CommitOrder,
    records: Vec<krafka::Record>,
) -> Result<Vec<(usize, RecordMetadata)>, KrafkaError> {
    let acknowledged = send_open(producer, records).await?;
    order.wait_until_visible().await?;
    Ok(acknowledged)
}

/// Sends the records in the open transaction.
async fn send_open(
    producer: &TransactionalProducer,
    records: Vec<krafka::Record>,
) -> Result<Vec<(usize, RecordMetadata)>, KrafkaError> {
    let mut handles = Vec::with_capacity(records.len());
    for record in records {
        handles.push(producer.enqueue(record).await?);
    }
    let flushed = producer.flush().await;
    let acknowledged = confirm_sent_records(handles).await;
    // The record's own error has the broker's code, where the client gives it.
    match acknowledged.error {
        Some(error) => Err(error),
        None => flushed.map(|()| acknowledged.records),
    }
}

async fn confirm_sent_records(handles: Vec<DeliveryHandle>) -> Acknowledged {
    let mut acknowledged = Acknowledged::default();
    for (index, handle) in handles.into_iter().enumerate() {
        match handle.await {
            Ok(metadata) => acknowledged.records.push((index, metadata)),
            Err(error) => {
                acknowledged.error.get_or_insert(error);
            }
        }
    }
    acknowledged
}

fn destination_of_sent_record(metadata: &RecordMetadata) -> Destination {
    // A broker that drops a duplicate may report no offset.
    let offset = (metadata.delivery == DeliveryConfirmation::Offset).then_some(metadata.offset);
    Destination::Topic {
        partition: metadata.partition,
        offset,
    }
}

/// Whether another producer has acquired the transactional id.
pub(super) fn is_producer_fenced(error: &KrafkaError) -> bool {
    let codes = [ErrorCode::ProducerFenced, ErrorCode::InvalidProducerEpoch];
    matches!(error, KrafkaError::Fenced { .. })
        || matches!(error, KrafkaError::Broker { code, .. } if codes.contains(code))
}
