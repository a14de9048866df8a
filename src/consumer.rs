//! The consumer: takes the topic as a member of the group, writes what comes to the delivery table, then commits the
//! offset. It never waits for Slack.
//!
//! At least once: a crash between the database's commit and the group's brings records again, and a second copy of
//! an event changes nothing. A record that is not ours, or cannot be read, is kept as a dead letter and the rest goes
//! on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{after, select_biased};
use krafka::consumer::{AutoOffsetReset, Consumer as Client, ConsumerRecord, GroupProtocol};
use krafka::error::KrafkaError;

use crate::clock::Timestamp;
use crate::config;
use crate::event::{ID_HEADER, NodeId, Notice};
use crate::kafka::{Driver, Failure, Link, within};
use crate::outage::{Backoff, Outage, Part};
use crate::store::dead_letter::{self, DeadRecord};
use crate::store::delivery::{self, Arrival};
use crate::store::{self, SqlResult, Store, StoreError, Transaction};
use crate::worker::{Stop, Waker};

/// How long it waits when the broker is away.
const BACKOFF: Backoff = Backoff { base: Duration::from_millis(100), cap: Duration::from_secs(5) };

/// How long one poll waits for records: also how late a stop is noticed.
const POLL: Duration = Duration::from_millis(500);

/// How long one call of krafka may take where nothing answers; a poll that is dropped takes nothing.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many records are written in one transaction.
const RECORDS_MAX: i32 = 1000;

/// Takes the topic.
pub struct Consumer {
    // Before the runtime, which its tasks need.
    client: Option<Client>,
    link: Link,
    driver: Driver,
    store: Store,
    notifier: Waker,
    outage: Outage,
    /// Taken from the topic, but not stored yet: kept while the database refuses.
    unstored: Arc<Vec<ConsumerRecord>>,
}

/// What a step has found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// So many records were stored; perhaps none.
    Stored(usize),
    /// Try again after this.
    Away(Duration),
}

impl Consumer {
    /// Joins the group when it first polls.
    pub fn new(settings: config::Kafka, store: Store, notifier: Waker, part: Part) -> io::Result<Self> {
        Ok(Self {
            client: None,
            link: Link::new(settings, format!("payrelay-consumer-{}", store.node())),
            driver: Driver::new()?,
            store,
            notifier,
            outage: Outage::new("Kafka (consumer)", BACKOFF, part),
            unstored: Arc::default(),
        })
    }

    /// Works until the stop. The membership is kept: the next start takes it up at once.
    pub fn run(mut self, stop: &Stop) {
        while !stop.requested() {
            if let Step::Away(delay) = self.step() {
                select_biased! {
                    recv(stop.signal()) -> _ => return,
                    recv(after(delay)) -> _ => {}
                }
            }
        }
    }

    /// One poll: take, store, commit the offset.
    pub fn step(&mut self) -> Step {
        if self.unstored.is_empty() {
            let poll = within(PATIENCE, poll(&mut self.client, &mut self.link, self.store.node()));
            match self.driver.runtime().block_on(poll) {
                Ok(records) => {
                    self.outage.recovered();
                    self.unstored = Arc::new(records);
                }
                Err(failure) => {
                    if matches!(&failure, Failure::Client(error) if error.is_fatal()) {
                        self.client = None;
                        self.link.forget();
                    }
                    return Step::Away(self.outage.failed(&failure));
                }
            }
        }
        match self.store_taken() {
            Ok(0) => Step::Stored(0),
            Ok(count) => {
                self.notifier.wake();
                self.commit_offsets();
                Step::Stored(count)
            }
            Err(error) => {
                log::error!("the consumer waits for the database: {error}");
                Step::Away(store::PAUSE)
            }
        }
    }

    fn store_taken(&mut self) -> Result<usize, StoreError> {
        if self.unstored.is_empty() {
            return Ok(0);
        }
        let (node, taken) = (self.store.node().clone(), Arc::clone(&self.unstored));
        let keep_all = move |tx: &Transaction<'_>| -> SqlResult<Vec<DeadRecord>> {
            let kept = taken.iter().map(|record| keep(tx, &node, record, Timestamp::now()));
            Ok(kept.collect::<SqlResult<Vec<_>>>()?.into_iter().flatten().collect())
        };
        for DeadRecord { topic, partition, offset, reason, .. } in self.store.write(keep_all)? {
            log::warn!("kept a record of {topic} aside (partition {partition}, offset {offset}): {reason}");
        }
        Ok(std::mem::take(&mut self.unstored).len())
    }

    /// A commit that fails is made good by the next one: the records are in the database, and known by their ids.
    fn commit_offsets(&self) {
        if let Some(client) = &self.client
            && let Err(error) = self.driver.runtime().block_on(async { within(PATIENCE, client.commit()).await })
        {
            log::debug!("the group's offset could not be committed, the next commit will: {error}");
        }
    }
}

async fn poll(client: &mut Option<Client>, link: &mut Link, node: &NodeId) -> Result<Vec<ConsumerRecord>, KrafkaError> {
    let client = match client {
        Some(client) => client,
        None => client.insert(join(link, node).await?),
    };
    client.poll(POLL).await
}

async fn join(link: &mut Link, node: &NodeId) -> Result<Client, KrafkaError> {
    let kafka = link.get().await?;
    let settings = link.settings();
    let client = kafka
        .consumer(&settings.group)
        // With static membership on the classic protocol a member that was killed and comes back goes on at once;
        // with KIP-848 it waits until its own session has timed out (measured: 45 s).
        .group_protocol(GroupProtocol::Classic)
        .group_instance_id(node.as_str())
        .enable_auto_commit(false)
        // Never skip: what was seen before is known by its id.
        .auto_offset_reset(AutoOffsetReset::Earliest)
        .max_poll_records(RECORDS_MAX)
        .metrics_push(false)
        .build()
        .await?;
    client.subscribe([&settings.topic]).await?;
    Ok(client)
}

/// One record: to the delivery table if it is ours, else aside.
fn keep(tx: &Transaction<'_>, node: &NodeId, record: &ConsumerRecord, now: Timestamp) -> SqlResult<Option<DeadRecord>> {
    let reason = match Notice::parse(node, record.header_str(ID_HEADER), record.value.as_deref()) {
        Ok(notice) => match delivery::accept(tx, notice, now)? {
            Arrival::Accepted | Arrival::Purged => return Ok(None),
            Arrival::Unknown => "no event of this database has its id and payment".to_owned(),
        },
        Err(foreign) => foreign.to_string(),
    };
    let letter = letter(record, reason);
    dead_letter::insert_record(tx, &letter, now)?;
    Ok(Some(letter))
}

fn letter(record: &ConsumerRecord, reason: String) -> DeadRecord {
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    DeadRecord {
        topic: record.topic.to_string(),
        partition: record.partition,
        offset: record.offset,
        reason,
        key: record.key.as_deref().map(<[u8]>::to_vec),
        value: record.value.as_deref().map(<[u8]>::to_vec),
        headers: record.headers.iter().map(|(name, value)| (name.clone(), value.as_deref().map(text))).collect(),
    }
}
