//! The settings of every producer, each with its reason.

use std::time::Duration;

use krafka::error::KrafkaError;
use krafka::producer::{Acks, Producer, ProducerBuilder, TransactionalProducer};
use krafka::{Compression, Kafka};

use crate::config;

/// Without transactions krafka retries a batch for this long, and never doubles it.
const DELIVERY_TIMEOUT: Duration = Duration::from_mins(5);

/// A report that is older than this is not sent any more.
const DELIVERY_TIMEOUT_OF_STATUS: Duration = Duration::from_secs(10);

/// In a transaction a batch is given up before the broker ends the transaction.
const DELIVERY_TIMEOUT_IN_TRANSACTION: Duration = Duration::from_secs(45);

/// How long the broker leaves a transaction open that no producer ends; until then
/// `read_committed` consumers wait behind it. A shorter limit would abort the batches of a slow
/// broker.
const TRANSACTION_TIMEOUT: Duration = Duration::from_mins(1);

/// Longer than it takes to queue a batch, so that the flush sends a batch of the outbox as one
/// batch for each partition. The broker accepts or rejects such a batch as a whole, and no event
/// overtakes another.
const LINGER: Duration = Duration::from_secs(1);

/// Capacity for 1,000 events in one batch of a partition, and less than a broker accepts by default
/// (`message.max.bytes`, 1,048,588).
const BATCH_BYTES_MAX: usize = 1_000_000;

/// An idempotent producer.
pub(super) async fn idempotent_producer(
    kafka: &Kafka,
    compression: config::Compression,
) -> Result<Producer, KrafkaError> {
    let producer = producer_builder(kafka, compression).delivery_timeout(DELIVERY_TIMEOUT);
    producer.build().await
}

/// Acquires the transactional id: fences its last producer, and aborts its open transaction.
pub(super) async fn transactional_producer(
    kafka: &Kafka,
    id: &str,
    compression: config::Compression,
) -> Result<TransactionalProducer, KrafkaError> {
    producer_builder(kafka, compression)
        .delivery_timeout(DELIVERY_TIMEOUT_IN_TRANSACTION)
        .transaction_timeout(TRANSACTION_TIMEOUT)
        .build_transactional(id)
        .await
}

/// A producer for the reports of an edge: each goes out at once.
pub(super) async fn status_producer(kafka: &Kafka) -> Result<Producer, KrafkaError> {
    producer_builder(kafka, config::Compression::None)
        .linger(Duration::ZERO)
        .delivery_timeout(DELIVERY_TIMEOUT_OF_STATUS)
        .build()
        .await
}

fn producer_builder(kafka: &Kafka, compression: config::Compression) -> ProducerBuilder {
    let compression = match compression {
        config::Compression::None => Compression::None,
        config::Compression::Gzip => Compression::Gzip,
        config::Compression::Lz4 => Compression::Lz4,
        config::Compression::Zstd => Compression::Zstd,
    };
    kafka
        .producer()
        .acks(Acks::All)
        .compression(compression)
        .idempotent(true)
        .linger(LINGER)
        .batch_size(BATCH_BYTES_MAX)
        // Operators watch payrelay, not its client.
        .metrics_push(false)
}
