//! The audit: cross-checks payments, outbox, deliveries and the topic once. It reads, and changes
//! nothing.
//!
//! It reads the topic first, to its end at that moment, and then the database in one snapshot. So
//! every event that was on the topic is in the snapshot. Every event that was marked PUBLISHED
//! before the end was read is on the topic. Therefore it also works on a running system.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

use crate::config::{self, Config, Problems, PublisherKind};
use crate::domain::node_id::NodeId;
use crate::domain::payment::Status;
use crate::domain::payment_record::parse_payment_ids;
use crate::kafka;
use crate::kafka::cluster::{ClusterConnection, ClusterError, KafkaRuntime, with_kafka_timeout};
use crate::kafka::errors::explain_cluster_error;
use crate::kafka::reachability::Reachability;
use crate::kafka::topic_reader::{ReadFrom, ReadTo, TopicReader, TopicRecord};
use crate::store::audit::{
    AuditDatabase, AuditTotals, COPY_KIND, DAMAGED_KIND, Finding, OffsetRange, TopicEvent,
    TopicSnapshot,
};
use crate::store::delivery::DeliveryStatus;
use crate::store::outbox::EventStatus;
use crate::store::{OpenError, StoreError};

/// How long one step of Kafka may need: the first answer, the topic's ends, the next records.
const CALL_TIMEOUT: Duration = Duration::from_secs(8);

/// The scope of an audit.
#[derive(Debug, Clone, Copy)]
pub struct AuditOptions {
    /// Do not read the topic.
    pub file_only: bool,
    /// How many examples of each finding are shown.
    pub limit: usize,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The database cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The configuration of Kafka cannot be used.
    #[error(transparent)]
    Config(#[from] Problems),
    /// The database does not answer.
    #[error("{0}; try again")]
    Store(#[from] StoreError),
    /// Kafka does not answer.
    #[error(
        "Kafka does not answer: {0}; try again, or look at the database alone: payrelay audit \
            --file-only"
    )]
    Kafka(String),
    /// The runtime could not be started.
    #[error("the operating system starts no further thread: {0}; try again")]
    Machine(#[from] io::Error),
}

/// The report.
#[derive(Debug, Clone, Serialize)]
pub struct AuditReport {
    /// The node of the database.
    pub node: String,
    /// The number of its rows.
    #[serde(flatten)]
    pub totals: AuditTotals,
    /// The result for the topic.
    pub topic: AuditedTopic,
    /// Facts worth knowing that are no inconsistency.
    pub notes: Vec<Finding>,
    /// Inconsistencies.
    pub findings: Vec<Finding>,
}

/// The topic's part of an audit.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum AuditedTopic {
    /// It was read.
    Read(TopicTotals),
    /// The topic does not exist.
    Absent {
        /// Its name.
        name: String,
    },
    /// It was not read: `--file-only`.
    LeftOut,
    /// Events do not pass through a topic: `publisher.kind` is `"application"`.
    None,
}

/// The records of the topic.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TopicTotals {
    /// Its name.
    pub name: String,
    #[serde(skip)]
    id: [u8; 16],
    /// Records of this node.
    pub records: u64,
    /// Other records.
    pub foreign_records: u64,
    /// The offsets that were read.
    pub partitions: Vec<OffsetRange>,
}

impl AuditReport {
    /// Whether there is no inconsistency.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    /// Whether the file is a copy that payrelay has not been started on.
    pub fn is_of_copy(&self) -> bool {
        self.notes.iter().any(|note| note.kind == COPY_KIND)
    }

    /// Whether SQLite found the file damaged.
    pub fn is_damaged(&self) -> bool {
        let mut kinds = self.findings.iter().map(|finding| finding.kind);
        kinds.any(|kind| kind == DAMAGED_KIND)
    }
}

/// How far an audit is, for a person who waits.
#[derive(Debug, Default)]
pub struct AuditProgress {
    offsets_done: AtomicU64,
    offsets_total: AtomicU64,
    checks_done: AtomicU64,
    checks_total: AtomicU64,
}

impl AuditProgress {
    /// The offsets of the topic that were read, and how many there are.
    pub fn offsets(&self) -> (u64, u64) {
        let total = self.offsets_total.load(Relaxed);
        (self.offsets_done.load(Relaxed).min(total), total)
    }

    /// The checks of the database that are done, and how many there are.
    pub fn checks(&self) -> (u64, u64) {
        (
            self.checks_done.load(Relaxed),
            self.checks_total.load(Relaxed),
        )
    }

    /// Before the topic is read.
    fn begin_topic(&self, reader: &TopicReader) {
        let ranges = reader.ranges().iter();
        let total: i64 = ranges.map(|range| range.end - range.start).sum();
        self.offsets_total.store(total.unsigned_abs(), Relaxed);
    }

    /// `next` has the next offset of each partition that was read.
    fn read_topic(&self, reader: &TopicReader, next: &BTreeMap<i32, i64>) {
        let ranges = reader.ranges().iter();
        let done: i64 = ranges
            .map(|range| {
                next.get(&range.partition)
                    .map_or(0, |next| next - range.start)
            })
            .sum();
        self.offsets_done.store(done.unsigned_abs(), Relaxed);
    }

    /// Markers of transactions have offsets, and are no records.
    fn finish_topic(&self) {
        self.offsets_done
            .store(self.offsets_total.load(Relaxed), Relaxed);
    }

    fn check_database(&self, done: usize, total: usize) {
        self.checks_total.store(total as u64, Relaxed);
        self.checks_done.store(done as u64, Relaxed);
    }
}

/// Runs the audit.
pub fn run_audit(
    config: &Config,
    scope: AuditOptions,
    progress: &AuditProgress,
) -> Result<AuditReport, AuditError> {
    let mut database = AuditDatabase::open(&config.database.path)?;
    let topic = match config.publisher.kind {
        PublisherKind::Application => AuditedTopic::None,
        PublisherKind::Kafka if scope.file_only => AuditedTopic::LeftOut,
        PublisherKind::Kafka => {
            // Another attempt would fail in the same way.
            kafka::check(&config.kafka.security)?;
            database.begin()?;
            let runtime = KafkaRuntime::new()?;
            runtime.runtime().block_on(read_audited_topic(
                &config.kafka,
                &mut database,
                progress,
            ))?
        }
    };
    let node = database.node().to_string();
    let snapshot = match &topic {
        AuditedTopic::Read(totals) => Some(TopicSnapshot {
            id: Some(totals.id),
            ranges: &totals.partitions,
        }),
        AuditedTopic::Absent { .. } => Some(TopicSnapshot {
            id: None,
            ranges: &[],
        }),
        AuditedTopic::LeftOut | AuditedTopic::None => None,
    };
    let result = database.check_with_progress(
        &config.kafka.topic,
        snapshot,
        scope.limit,
        &|done, total| progress.check_database(done, total),
    )?;
    Ok(AuditReport {
        node,
        totals: result.totals,
        topic,
        notes: result.notes,
        findings: result.findings,
    })
}

async fn read_audited_topic(
    settings: &config::Kafka,
    database: &mut AuditDatabase,
    progress: &AuditProgress,
) -> Result<AuditedTopic, AuditError> {
    let mut link = ClusterConnection::new(settings.clone(), "payrelay-audit".to_owned());
    match read_audited_topic_through(&mut link, database, progress).await {
        Ok(topic) => Ok(topic),
        Err(ClusterError::Store(error)) => Err(error.into()),
        Err(failure) => Err(AuditError::Kafka(
            explain_cluster_error(
                &failure,
                link.kafka(),
                &mut Reachability::default(),
                settings,
                database.node(),
            )
            .await,
        )),
    }
}

async fn read_audited_topic_through(
    link: &mut ClusterConnection,
    database: &mut AuditDatabase,
    progress: &AuditProgress,
) -> Result<AuditedTopic, ClusterError> {
    let kafka = with_kafka_timeout(CALL_TIMEOUT, link.connect()).await?;
    let settings = link.settings();
    let name = settings.topic.clone();
    let Some(mut reader) = TopicReader::open_within(
        CALL_TIMEOUT,
        &kafka,
        &name,
        ReadTo::LastStableOffset,
        |_| ReadFrom::Oldest,
    )
    .await?
    else {
        return Ok(AuditedTopic::Absent { name });
    };
    let node = database.node().clone();
    let mut totals = TopicTotals {
        name,
        id: reader.topic_id(),
        ..TopicTotals::default()
    };
    progress.begin_topic(&reader);
    let mut next = BTreeMap::new();
    while !reader.is_finished() {
        let batch = reader.next_within(CALL_TIMEOUT).await?;
        next.extend(
            batch
                .iter()
                .map(|record| (record.partition, record.offset + 1)),
        );
        progress.read_topic(&reader, &next);
        let ours: Vec<_> = batch
            .iter()
            .filter_map(|record| audited_topic_event(&node, record))
            .collect();
        totals.records += ours.len() as u64;
        totals.foreign_records += (batch.len() - ours.len()) as u64;
        database.store_records(&ours)?;
    }
    progress.finish_topic();
    let skipped = |skipped: &kafka::topic_reader::Skipped| {
        let kafka::topic_reader::Skipped {
            partition,
            first,
            end,
        } = *skipped;
        OffsetRange {
            partition,
            start: first,
            end,
        }
    };
    database.store_skipped_ranges(&reader.skipped().iter().map(skipped).collect::<Vec<_>>())?;
    reader.refresh_start_offsets(CALL_TIMEOUT).await?;
    let extent = |extent: &kafka::topic_reader::OffsetRange| OffsetRange {
        partition: extent.partition,
        start: extent.start,
        end: extent.end,
    };
    totals.partitions = reader.ranges().iter().map(extent).collect();
    Ok(AuditedTopic::Read(totals))
}

/// The event of a record; `None`: it is not one of this node's events.
fn audited_topic_event(node: &NodeId, record: &TopicRecord) -> Option<TopicEvent> {
    let outbox_id = node.outbox_id(record.event_id.as_deref()?)?;
    let key = std::str::from_utf8(record.key.as_deref().unwrap_or_default()).ok();
    let ids = record.value.as_deref().and_then(parse_payment_ids);
    let in_value = ids.and_then(|ids| ids.user_id);
    let user_id = match in_value {
        // If the key names neither the node nor the user, the record is another one.
        Some(user) => {
            let is_named = key == Some(node.as_str()) || key == Some(user.to_string().as_str());
            is_named.then_some(user)
        }
        // Only in its canonical form: no sign, no leading zero.
        None => key.and_then(|text| {
            let number: i64 = text.parse().ok()?;
            (number.to_string() == text).then_some(number)
        }),
    };
    Some(TopicEvent {
        partition: record.partition,
        offset: record.offset,
        outbox_id,
        user_id,
        payment_id: ids.map(|ids| ids.payment_id),
    })
}

/// For people: a line of totals for each part, the notes, the findings, the verdict.
impl fmt::Display for AuditReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AuditTotals {
            payments,
            events,
            events_purged,
            deliveries,
        } = &self.totals;
        writeln!(f, "node: {}", self.node)?;
        writeln!(
            f,
            "payments: {}",
            format_audit_counts(payments, Status::ALL.iter().map(|s| s.as_str()))
        )?;
        writeln!(
            f,
            "outbox: {}, {events_purged} purged",
            format_audit_counts(events, EventStatus::ALL.iter().map(|s| s.as_str()))
        )?;
        writeln!(f, "topic: {}", self.topic)?;
        writeln!(
            f,
            "deliveries: {}",
            format_audit_counts(deliveries, DeliveryStatus::ALL.iter().map(|s| s.as_str()))
        )?;
        for note in &self.notes {
            write_audit_finding(f, "note", note)?;
        }
        for finding in &self.findings {
            write_audit_finding(f, "FOUND", finding)?;
        }
        match self.findings.len() {
            0 => write!(f, "verdict: nothing found"),
            1 => write!(f, "verdict: 1 kind of finding"),
            kinds => write!(f, "verdict: {kinds} kinds of findings"),
        }
    }
}

impl fmt::Display for AuditedTopic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => write!(f, "none (publisher.kind is \"application\")"),
            Self::LeftOut => write!(f, "not read (--file-only)"),
            Self::Absent { name } => write!(f, "{name} does not exist"),
            Self::Read(TopicTotals {
                name,
                records,
                foreign_records,
                partitions,
                ..
            }) => {
                write!(
                    f,
                    "{name}, {records} records of this node, {foreign_records} of others"
                )?;
                for OffsetRange {
                    partition,
                    start,
                    end,
                } in partitions
                {
                    write!(f, "; partition {partition} from offset {start} to {end}")?;
                }
                Ok(())
            }
        }
    }
}

fn format_audit_counts(
    by_status: &BTreeMap<String, i64>,
    statuses: impl Iterator<Item = &'static str>,
) -> String {
    statuses
        .map(|status| format!("{} {status}", by_status.get(status).unwrap_or(&0)))
        .collect::<Vec<_>>()
        .join(", ")
}

fn write_audit_finding(f: &mut fmt::Formatter<'_>, rank: &str, finding: &Finding) -> fmt::Result {
    writeln!(
        f,
        "{rank} {}: {} {}",
        finding.kind, finding.count, finding.what
    )?;
    for example in &finding.examples {
        writeln!(f, "  {example}")?;
    }
    let more = finding.count - i64::try_from(finding.examples.len()).unwrap_or(finding.count);
    if more > 0 {
        writeln!(f, "  and {more} more")
    } else {
        Ok(())
    }
}
