//! What is on a topic, read by a client without a group; and records put there by somebody else.

use std::time::{Duration, Instant};

use krafka::consumer::AutoOffsetReset;
use krafka::{Kafka, Record};

/// A record as it lies on the topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub partition: i32,
    pub offset: i64,
    pub timestamp_ms: i64,
    pub key: String,
    pub value: String,
    pub headers: Vec<(String, String)>,
}

impl Found {
    pub fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(candidate, _)| candidate == name);
        found.map_or("", |(_, value)| value)
    }
}

/// All records of a topic, by partition, then by offset. Panics if they do not come within `limit`.
pub fn read(bootstrap: &str, topic: &str, limit: Duration) -> Vec<Found> {
    block_on(async {
        let deadline = Instant::now() + limit;
        let kafka = Kafka::builder(bootstrap).connect().await.expect("the broker answers");
        let consumer = kafka
            .consumer_without_group()
            .auto_offset_reset(AutoOffsetReset::Earliest)
            .metrics_push(false)
            .build()
            .await
            .expect("the settings are right");
        let producer = kafka.producer().build().await.expect("the settings are right");
        let partitions: Vec<i32> = match producer.partitions_for(topic).await {
            Ok(partitions) => partitions.iter().map(|partition| partition.partition).collect(),
            Err(_) => return Vec::new(),
        };
        let mut missing = 0;
        for partition in &partitions {
            let (low, high) = consumer.fetch_watermarks(topic, *partition).await.expect("the leader answers");
            missing += high - low;
        }
        consumer.assign(topic, partitions).await.expect("the partitions are there");
        let mut found = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        while missing > 0 {
            assert!(Instant::now() < deadline, "{missing} records of {topic} did not come within {limit:?}");
            for record in consumer.poll(Duration::from_millis(200)).await.expect("the topic can be read") {
                missing -= 1;
                found.push(Found {
                    partition: record.partition,
                    offset: record.offset,
                    timestamp_ms: record.timestamp,
                    key: record.key.as_deref().map(text).unwrap_or_default(),
                    value: record.value.as_deref().map(text).unwrap_or_default(),
                    headers: record
                        .headers
                        .iter()
                        .map(|(name, value)| (name.clone(), value.as_deref().map(text).unwrap_or_default()))
                        .collect(),
                });
            }
        }
        found.sort_by_key(|record| (record.partition, record.offset));
        found
    })
}

/// Puts a record on a topic: key, value, headers.
pub fn put(bootstrap: &str, topic: &str, key: Option<&str>, value: Option<&[u8]>, headers: &[(&str, &str)]) {
    block_on(async {
        let kafka = Kafka::builder(bootstrap).connect().await.expect("the broker answers");
        let producer = kafka.producer().metrics_push(false).build().await.expect("the settings are right");
        let mut record = Record::new(topic, value.unwrap_or_default().to_vec());
        if value.is_none() {
            record = record.without_value();
        }
        if let Some(key) = key {
            record = record.key(key.to_owned());
        }
        for (name, value) in headers {
            record = record.header(*name, (*value).to_owned());
        }
        let _ = producer.send(record).await.expect("the broker takes the record");
        producer.close().await.expect("nothing is left to be sent");
    });
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}
