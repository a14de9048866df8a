//! The consumer: takes the topic as a member of the group, writes what comes to the delivery table, then commits the
//! offset. It never waits for Slack.
//!
//! Exactly once: a record and the place behind it are written in one transaction, and whenever partitions are assigned it
//! goes on from there, whatever the group's offset says; that one is committed for those who look at the group. A second
//! copy of an event changes nothing. What the topic lost is taken from the outbox. A record that is not ours, or cannot
//! be read, is kept as a dead letter and the rest goes on.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{after, select_biased};
use krafka::consumer::{
    AutoOffsetReset, Consumer as Client, ConsumerRebalanceListener, ConsumerRecord, GroupProtocol, IsolationLevel,
    TopicPartition,
};
use krafka::error::KrafkaError;
use krafka::{CloseOptions, GroupMembershipOperation, Kafka};

use crate::clock::Timestamp;
use crate::config;
use crate::event::{ID_HEADER, NodeId, Notice, TIME_HEADER};
use crate::kafka::{ANSWER_BYTES_MAX, Driver, Failure, Identified, Link, identify, within};
use crate::outage::{Outage, Part};
use crate::relay::BACKOFF;
use crate::store::dead_letter::{self, DeadRecord};
use crate::store::delivery::{self, Arrival};
use crate::store::topic::{self, Intake, Taken, Topic};
use crate::store::{self, SqlResult, Store, StoreError, Transaction, unconsumed};
use crate::worker::{Stop, Waker};

/// How long one poll waits for records: also how late a stop is noticed.
const POLL: Duration = Duration::from_millis(500);

/// How long one call of krafka may take where nothing answers; a poll that is dropped takes nothing.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often the topic is looked at: for new partitions, new leaders, another life.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// How many records are written in one transaction.
const RECORDS_MAX: i32 = 1000;

/// Takes the topic.
pub struct Consumer {
    // Before the runtime, which its tasks need.
    joined: Option<Joined>,
    link: Link,
    driver: Driver,
    store: Store,
    notifier: Waker,
    outage: Outage,
    /// For how many partitions it has left the group, to be given those that it was not.
    missed: Option<usize>,
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
            joined: None,
            link: Link::new(settings, format!("payrelay-consumer-{}", store.node())),
            driver: Driver::new()?,
            store,
            notifier,
            outage: Outage::new("Kafka (consumer)", BACKOFF, part),
            missed: None,
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
            let poll = within(PATIENCE, poll(&mut self.joined, &mut self.link, &self.store, &mut self.missed));
            match self.driver.runtime().block_on(poll) {
                Ok(records) => {
                    self.tell_whether_it_takes(!records.is_empty());
                    self.unstored = Arc::new(records);
                }
                Err(Failure::Store(error)) => return wait_for_database(&error),
                Err(failure) => {
                    if matches!(&failure, Failure::Client(error) if error.is_fatal()) {
                        self.leave();
                    }
                    if matches!(failure, Failure::Stale) {
                        log::info!("the topic is not as it was: the consumer joins the group again");
                        self.leave_group();
                        return Step::Stored(0);
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
            Err(error) => wait_for_database(&error),
        }
    }

    /// krafka answers that there is nothing also while it waits for the group, or cannot reach a leader.
    fn tell_whether_it_takes(&mut self, some: bool) {
        let Some(joined) = &mut self.joined else { return };
        if some && matches!(joined.lack, Some(Lack::Event(_))) {
            joined.lack = None;
        }
        match &joined.lack {
            Some(lack) => drop(self.outage.failed(lack)),
            None if some || joined.positions.whole => self.outage.recovered(),
            None => {}
        }
    }

    /// A static member that comes back is given what it had (KIP-345): what is to be assigned anew is left first.
    fn leave_group(&mut self) {
        if let Some(joined) = self.joined.take() {
            let leave =
                CloseOptions::new().timeout(PATIENCE).group_membership_operation(GroupMembershipOperation::LeaveGroup);
            if let Err(error) = self.driver.runtime().block_on(joined.client.close_with(leave)) {
                log::debug!("the group could not be left: {error}");
            }
        }
        self.leave();
    }

    /// Joins anew at the next poll.
    fn leave(&mut self) {
        self.joined = None;
        self.link.forget();
    }

    fn store_taken(&mut self) -> Result<usize, StoreError> {
        if self.unstored.is_empty() {
            return Ok(0);
        }
        let Some(joined) = &self.joined else { return Ok(0) };
        let (node, records, topic) = (self.store.node().clone(), Arc::clone(&self.unstored), joined.topic.clone());
        let keep_all = move |tx: &Transaction<'_>| keep_all(tx, &node, &topic, &records, Timestamp::now());
        let Some(Kept { dead, taken }) = self.store.write(keep_all)? else {
            log::warn!("the topic was deleted and made anew: the consumer joins again");
            self.leave_group();
            self.unstored = Arc::default();
            return Ok(0);
        };
        for DeadRecord { topic, partition, offset, reason, .. } in dead {
            log::warn!("kept a record of {topic} aside (partition {partition}, offset {offset}): {reason}");
        }
        if taken != Taken::default() {
            let Taken { duplicates, gaps, inversions } = taken;
            log::warn!(
                "the topic brought {duplicates} events again, {inversions} after a later one, and {gaps} not at all; \
                 those were taken from the outbox"
            );
        }
        Ok(std::mem::take(&mut self.unstored).len())
    }

    /// A commit that fails is made good by the next one: the records are in the database, and known by their ids.
    fn commit_offsets(&self) {
        if let Some(Joined { client, .. }) = &self.joined
            && let Err(error) = self.driver.runtime().block_on(async { within(PATIENCE, client.commit()).await })
        {
            log::debug!("the group's offset could not be committed, the next commit will: {error}");
        }
    }
}

fn wait_for_database(error: &StoreError) -> Step {
    log::error!("the consumer waits for the database: {error}");
    Step::Away(store::PAUSE)
}

/// A member of the group.
struct Joined {
    kafka: Kafka,
    client: Client,
    topic: Topic,
    partitions: usize,
    looked_at: Instant,
    /// The oldest event that was published and not taken when it was last looked at.
    untaken: Option<i64>,
    /// What keeps it from taking everything.
    lack: Option<Lack>,
    assigned: Assigned,
    /// Which assignment was put in position, or is being, and what of it already.
    positions: Positions,
}

/// What is there, and does not come.
#[derive(Debug, thiserror::Error)]
enum Lack {
    #[error("kafka.group gives it {0} of {1} partitions: others are in it, or its coordinator is away")]
    Partitions(usize, usize),
    #[error("event {0} was published and does not come: is a transaction open on the topic?")]
    Event(i64),
}

#[derive(Default)]
struct Positions {
    of: u64,
    whole: bool,
    done: BTreeSet<i32>,
}

/// How many times partitions were assigned.
#[derive(Clone, Default)]
struct Assigned(Arc<AtomicU64>);

impl ConsumerRebalanceListener for Assigned {
    async fn on_partitions_assigned(&self, _: &[TopicPartition]) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    async fn on_partitions_revoked(&self, _: &[TopicPartition]) {}
}

/// The next records, each behind what is in the database.
async fn poll(
    joined: &mut Option<Joined>,
    link: &mut Link,
    store: &Store,
    missed: &mut Option<usize>,
) -> Result<Vec<ConsumerRecord>, Failure> {
    let joined = match joined {
        Some(joined) => joined,
        None => joined.insert(join(link, store.node()).await?),
    };
    if joined.looked_at.elapsed() > LOOK_INTERVAL {
        joined.look(store, missed).await?;
    }
    let records = joined.client.poll(POLL).await?;
    if joined.is_in_position() {
        return Ok(records);
    }
    // What came is from where the group's offset was, or from a partition that is in position while another one is not yet: it
    // comes again, from where it should.
    for record in &records {
        joined.positions.done.remove(&record.partition);
    }
    joined.go_to_positions(store).await?;
    Ok(Vec::new())
}

async fn join(link: &mut Link, node: &NodeId) -> Result<Joined, KrafkaError> {
    let kafka = link.get().await?;
    let settings = link.settings();
    let Identified { topic, partitions } = identify(&kafka, &settings.topic).await?;
    let assigned = Assigned::default();
    let client = kafka
        .consumer(&settings.group)
        // With static membership on the classic protocol a member that was killed and comes back goes on at once;
        // with KIP-848 it waits until its own session has timed out (measured: 45 s).
        .group_protocol(GroupProtocol::Classic)
        .group_instance_id(node.as_str())
        .enable_auto_commit(false)
        .isolation_level(IsolationLevel::ReadCommitted)
        .rebalance_listener(assigned.clone())
        // Never skip: what was seen before is known by its id.
        .auto_offset_reset(AutoOffsetReset::Earliest)
        .max_poll_records(RECORDS_MAX)
        .fetch_max_bytes(ANSWER_BYTES_MAX)
        .metrics_push(false)
        .build()
        .await?;
    client.subscribe([&settings.topic]).await?;
    let looked_at = Instant::now();
    let positions = Positions::default();
    Ok(Joined { kafka, client, topic, partitions, looked_at, untaken: None, lack: None, assigned, positions })
}

impl Joined {
    /// krafka asks for metadata when an answer tells it to. A consumer that is told nothing would never learn of partitions that
    /// were added, of a leader that is gone for good, or of a topic that was made anew: then it joins again.
    async fn look(&mut self, store: &Store, missed: &mut Option<usize>) -> Result<(), Failure> {
        let _ = self.client.fetch_metadata(Some(&self.topic.name)).await?;
        let found = identify(&self.kafka, &self.topic.name).await?;
        let changed = (&found.topic, found.partitions) != (&self.topic, self.partitions);
        // They were added while nobody looked: a static member that comes back is given what it had.
        let assigned = self.client.assignment().await.remove(&*self.topic.name).unwrap_or_default().len();
        let fewer = assigned < found.partitions && *missed != Some(found.partitions);
        if changed || fewer {
            *missed = Some(found.partitions);
            return Err(Failure::Stale);
        }
        let untaken = store.read(delivery::oldest_untaken)?;
        self.lack = if assigned < found.partitions {
            Some(Lack::Partitions(assigned, found.partitions))
        } else {
            untaken.filter(|event| self.untaken == Some(*event)).map(Lack::Event)
        };
        self.untaken = untaken;
        self.looked_at = Instant::now();
        Ok(())
    }

    fn is_in_position(&mut self) -> bool {
        let assigned = self.assigned.0.load(Ordering::SeqCst);
        if self.positions.of != assigned {
            self.positions = Positions { of: assigned, ..Positions::default() };
        }
        self.positions.whole || assigned == 0
    }

    /// Puts every partition where the database says. Everything that was taken is in it by now.
    async fn go_to_positions(&mut self, store: &Store) -> Result<(), Failure> {
        let (topic, now) = (self.topic.clone(), Timestamp::now());
        let name = &*self.topic.name;
        if let Some(gaps) = store.write(move |tx| topic::begin_anew(tx, &topic, now))? {
            log::warn!("the topic {name} was made anew; {gaps} events that it lost are taken from the outbox");
        }
        let known = store.read(|connection| topic::partitions(connection, &self.topic))?;
        for partition in self.client.assignment().await.remove(name).unwrap_or_default() {
            if self.positions.done.contains(&partition) {
                continue;
            }
            let (low, end) = self.client.fetch_watermarks(name, partition).await?;
            let consumed_to = known.iter().find(|known| known.partition == partition).and_then(|k| k.consumed_to);
            let position = match consumed_to {
                Some(offset) if offset < low => {
                    self.skip(store, partition, low)?;
                    low
                }
                Some(offset) if offset > end => {
                    log::warn!("partition {partition} of {name} ends at {end}, but was taken to {offset}: read anew");
                    low
                }
                Some(offset) => offset,
                None => self.committed(partition).await?.map_or(low, |offset| offset.clamp(low, end)),
            };
            self.client.seek(name, partition, position).await?;
            // Should this take too long, the next call goes on from here.
            self.positions.done.insert(partition);
        }
        self.positions.whole = true;
        Ok(())
    }

    fn skip(&self, store: &Store, partition: i32, offset: i64) -> Result<(), StoreError> {
        let (topic, now) = (self.topic.clone(), Timestamp::now());
        let gaps = store.write(move |tx| topic::skip(tx, &topic, partition, offset, now))?;
        // Otherwise it was a marker of a transaction.
        if gaps > 0 {
            log::warn!(
                "the topic {} has deleted records of partition {partition} before they were taken; {gaps} events are taken \
                 from the outbox instead",
                self.topic.name
            );
        }
        Ok(())
    }

    /// Where the group was, for a database that has taken nothing yet.
    async fn committed(&self, partition: i32) -> Result<Option<i64>, KrafkaError> {
        let committed = self.client.committed(&[(&*self.topic.name, partition)]).await?;
        Ok(committed.into_values().next().map(|committed| committed.offset))
    }
}

/// What became of a batch.
struct Kept {
    dead: Vec<DeadRecord>,
    taken: Taken,
}

/// The records, and how far they reach, in one transaction. `None`: they are from an earlier life of the topic.
fn keep_all(
    tx: &Transaction<'_>,
    node: &NodeId,
    topic: &Topic,
    records: &[ConsumerRecord],
    now: Timestamp,
) -> SqlResult<Option<Kept>> {
    let Some(mut intake) = Intake::begin(tx, topic)? else { return Ok(None) };
    let mut dead = Vec::new();
    for record in records {
        let event = match keep(tx, node, record, now)? {
            Ok(event) => Some(event),
            Err(letter) => {
                dead.push(letter);
                None
            }
        };
        intake.took(record.partition, record.offset, event);
    }
    let taken = intake.finish(now)?;
    unconsumed::advance(tx, 2 * records.len())?;
    Ok(Some(Kept { dead, taken }))
}

/// One record: to the delivery table if it is ours, else aside.
fn keep(
    tx: &Transaction<'_>,
    node: &NodeId,
    record: &ConsumerRecord,
    now: Timestamp,
) -> SqlResult<Result<(i64, Arrival), DeadRecord>> {
    let reason = match Notice::parse(node, record.header_str(ID_HEADER), record.value.as_deref()) {
        Ok(notice) => match delivery::accept(tx, notice.created_at(record.header_str(TIME_HEADER)), now)? {
            Arrival::Unknown => "no event of this database has its id and payment".to_owned(),
            arrival => return Ok(Ok((notice.outbox_id, arrival))),
        },
        Err(foreign) => foreign.to_string(),
    };
    let letter = letter(record, reason);
    dead_letter::insert_record(tx, &letter, now)?;
    Ok(Err(letter))
}

fn letter(record: &ConsumerRecord, reason: String) -> DeadRecord {
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    DeadRecord {
        topic: record.topic.to_string(),
        partition: record.partition,
        offset: record.offset,
        written_at_ms: record.timestamp,
        reason,
        key: record.key.as_deref().map(<[u8]>::to_vec),
        value: record.value.as_deref().map(<[u8]>::to_vec),
        headers: record.headers.iter().map(|(name, value)| (name.clone(), value.as_deref().map(text))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Headers, one a line, then an empty line, then the value; `key` is the key. A header without a value has none.
    fn raw(bytes: &[u8]) -> ConsumerRecord {
        let (head, value) = match bytes.windows(2).position(|pair| pair == b"\n\n") {
            _ if bytes.starts_with(b"\n") => (&bytes[..0], Some(&bytes[1..])),
            Some(end) => (&bytes[..end], Some(&bytes[end + 2..])),
            None => (bytes, None),
        };
        let mut record = ConsumerRecord::new("payment-event", 0, 0, None, value.map(<[u8]>::to_vec).map(Into::into));
        for line in head.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let end = line.windows(2).position(|pair| pair == b": ").unwrap_or(line.len());
            let value = line.get(end + 2..).map(<[u8]>::to_vec);
            if &line[..end] == b"key" {
                record.key = value.map(Into::into);
            } else {
                record.headers.push((String::from_utf8_lossy(&line[..end]).into_owned(), value.map(Into::into)));
            }
        }
        record
    }

    #[test]
    fn the_corpus_of_records() {
        let node = NodeId::parse("shop-7").unwrap();
        let words = ["ce_id: ", "shop-7-", "shop-7-12", "\n", "\n\n", ": ", "key: ", "traceparent: "];
        crate::fuzz::corpus("record", 10_000, &words, |bytes| {
            let record = raw(bytes);
            match Notice::parse(&node, record.header_str(ID_HEADER), record.value.as_deref()) {
                Ok(notice) => {
                    assert!(notice.outbox_id > 0 && notice.payment_id > 0);
                    // It is written as it was read.
                    assert_eq!(record.header_str(ID_HEADER), Some(node.event_id(notice.outbox_id).as_str()));
                    assert_eq!(record.value.as_deref(), Some(notice.payment_id.to_string().as_bytes()));
                    true
                }
                Err(foreign) => {
                    let kept = letter(&record, foreign.to_string());
                    // Of whatever length and bytes it is, its reason is a line, and the rest is kept.
                    assert!(kept.reason.len() < 2000 && !kept.reason.contains(char::is_control), "{}", kept.reason);
                    assert_eq!(
                        (kept.key.as_deref(), kept.value.as_deref()),
                        (record.key.as_deref(), record.value.as_deref())
                    );
                    let json = serde_json::to_string(&kept.headers).unwrap();
                    assert_eq!(serde_json::from_str::<Vec<(String, Option<String>)>>(&json).unwrap(), kept.headers);
                    false
                }
            }
        });
    }
}
