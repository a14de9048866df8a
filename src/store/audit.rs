//! The SQL of an audit: what must hold between payments, outbox, deliveries and the topic, asked of
//! one snapshot.
//!
//! The connection cannot write. What was read from the topic lies in its temporary tables, which
//! SQLite keeps on the disk (<https://sqlite.org/tempfiles.html>), so that memory stays small
//! however long the topic is.

use super::engine::{files, open, open_error};
use super::{OpenError, StoreError};
use crate::domain::event::NodeId;
use crate::domain::timestamp::Timestamp;
use rusqlite::{Connection, ErrorCode, Params, Row, Transaction};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// A database that is looked at. It may be in use, and stays as it is.
pub struct AuditDatabase {
    connection: Connection,
    node: NodeId,
    /// The newest event that was published before the topic's ends were asked for.
    published_before: i64,
    /// What was published before this must be visible.
    visible_before: Timestamp,
}

/// A record of the topic that is one of this node's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopicEvent {
    /// Where it is.
    pub partition: i32,
    /// Where in the partition.
    pub offset: i64,
    /// Which event it says it is.
    pub outbox_id: i64,
    /// Its key, if that is a number.
    pub user_id: Option<i64>,
    /// Its value, if that is a number.
    pub payment_id: Option<i64>,
}

/// What was read of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OffsetRange {
    /// Which.
    pub partition: i32,
    /// The oldest offset.
    pub start: i64,
    /// The offset after the last one.
    pub end: i64,
}

/// What was read of the topic.
#[derive(Debug, Clone, Copy)]
pub struct TopicSnapshot<'a> {
    /// Which of its lives it is in; `None` where there is no such topic.
    pub id: Option<[u8; 16]>,
    /// By partition.
    pub ranges: &'a [OffsetRange],
}

/// How much there is of everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Payments, by status.
    pub payments: BTreeMap<String, i64>,
    /// Events in the outbox, by status.
    pub events: BTreeMap<String, i64>,
    /// Events that were delivered and purged.
    pub events_purged: i64,
    /// Deliveries, by status.
    pub deliveries: BTreeMap<String, i64>,
}

/// Something of a kind, so many times, with examples.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// One word for it.
    pub kind: &'static str,
    /// What it is.
    pub what: &'static str,
    /// How many there are.
    pub count: i64,
    /// The first of them.
    pub examples: Vec<String>,
}

/// What the checks have found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// How much there is.
    pub totals: Totals,
    /// What must not be.
    pub findings: Vec<Finding>,
    /// What may be, and is worth knowing.
    pub notes: Vec<Finding>,
}

/// A question to the database: a row for each thing that is wrong, in words.
struct Check {
    kind: &'static str,
    what: &'static str,
    sql: &'static str,
}

/// What must hold in the database by itself.
const FILE: [Check; 12] = [
    Check {
        kind: "paid-twice",
        what: "reservations with more than one COMPLETED payment",
        // Not by the index that says so: it may be what is damaged.
        sql: "SELECT 'reservation ' || reservation_id || ': ' || count(*) FROM payment NOT INDEXED \
              WHERE status = 'COMPLETED' GROUP BY reservation_id HAVING count(*) > 1",
    },
    Check {
        kind: "no-history",
        what: "payments without history",
        sql: "SELECT 'payment ' || p.id FROM payment p LEFT \
            JOIN payment_history h ON h.payment_id = p.id WHERE h.payment_id IS NULL \
            OR h.user_id <> p.user_id ORDER BY p.id",
    },
    Check {
        kind: "no-payment",
        what: "entries of the history without payment",
        sql: "SELECT 'history of payment ' || h.payment_id FROM payment_history h \
              LEFT JOIN payment p ON p.id = h.payment_id WHERE p.id IS NULL ORDER BY h.payment_id",
    },
    Check {
        kind: "broken-chain",
        what: "entries of the history that do not name the user's payment before them",
        sql: "SELECT 'payment ' || payment_id || ' names ' || ifnull(previous_id, 'none') || ' \
            instead of ' || ifnull(previous, 'none') \
            FROM (SELECT payment_id, previous_id, lag(payment_id) OVER (PARTITION BY user_id \
            ORDER BY payment_id) AS previous FROM payment_history) \
            WHERE previous_id IS NOT previous",
    },
    Check {
        kind: "broken-end",
        what: "users whose history does not begin at their newest payment",
        sql: "SELECT 'user ' || user_id || ': ' || ifnull(sum(named), 'none') || ' instead of ' \
            || ifnull(sum(newest), 'none') \
            FROM (SELECT user_id, last_payment_id AS named, NULL AS newest FROM user_history \
            UNION ALL SELECT user_id, NULL, max(payment_id) FROM payment_history \
            GROUP BY user_id) GROUP BY user_id HAVING sum(named) IS NOT sum(newest)",
    },
    Check {
        kind: "no-event",
        what: "payments whose events are neither in the outbox nor counted as purged",
        sql: "SELECT p || ' payments, ' || o || ' events, ' || n || ' purged' \
            FROM (SELECT (SELECT count(*) FROM payment) AS p, (SELECT count(*) \
            FROM outbox) AS o, (SELECT events_purged FROM node) AS n) WHERE p - o - n <> 0",
    },
    Check {
        kind: "wrong-event",
        what: "events that do not say what their payment is",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id FROM outbox o LEFT \
            JOIN payment p ON p.id = o.payment_id WHERE p.user_id IS NOT o.user_id \
            OR lower('payment.' || p.status) IS NOT o.type ORDER BY o.id",
    },
    Check {
        kind: "no-outbox",
        what: "deliveries without event",
        sql: "SELECT 'delivery of event ' || d.outbox_id FROM delivery d LEFT \
            JOIN outbox o ON o.id = d.outbox_id WHERE o.id IS NULL ORDER BY d.outbox_id",
    },
    Check {
        kind: "never-told",
        what: "deliveries that nobody tells: of a channel that is not there, or set aside without \
            an open dead letter",
        sql: "SELECT 'delivery of event ' || d.outbox_id || ': ' || d.status || ', channel ' || \
            d.channel FROM delivery d WHERE (d.status IN ('PENDING', 'SENDING') \
            AND d.channel <> 'default' AND d.channel NOT IN (SELECT channel FROM route)) \
            OR (d.status = 'DEAD' AND NOT EXISTS (SELECT 1 FROM dead_letter l \
            WHERE l.outbox_id = d.outbox_id AND l.state = 'OPEN')) ORDER BY d.outbox_id",
    },
    Check {
        kind: "lost-answer",
        what: "idempotency keys whose answer cannot be given again: its payments are not there, \
            or are not of one user",
        sql: "SELECT 'key ' || k.id || ': ' || count(p.id) || ' of ' || k.payment_count || ' \
            payments from ' || k.first_payment_id || ', of ' || count(DISTINCT p.user_id) || ' \
            users' FROM idempotency_key k LEFT JOIN payment p ON p.id >= k.first_payment_id \
            AND p.id < k.first_payment_id + k.payment_count GROUP BY k.id \
            HAVING count(p.id) <> k.payment_count OR count(DISTINCT p.user_id) <> 1 ORDER BY k.id",
    },
    Check {
        kind: "rejected",
        what: "events that Kafka does not take: they wait for a person",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': ' || o.rejection \
            FROM outbox o WHERE o.status = 'REJECTED' AND NOT EXISTS (SELECT 1 FROM delivery d \
            WHERE d.outbox_id = o.id AND d.status = 'DISCARDED') ORDER BY o.id",
    },
    Check {
        kind: "spent-id",
        what: "ids that may be given a second time",
        sql: "SELECT t.name || ' ' || t.last || ' with a sequence of ' || ifnull(s.seq, 'none') \
            FROM (SELECT 'payment' AS name, max(id) AS last FROM payment UNION ALL \
            SELECT 'outbox', max(id) FROM outbox UNION ALL SELECT 'dead_letter', max(id) \
            FROM dead_letter UNION ALL SELECT 'dead_letter_action', max(id) \
            FROM dead_letter_action UNION ALL SELECT 'idempotency_key', max(id) \
            FROM idempotency_key) t LEFT JOIN sqlite_sequence s ON s.name = t.name \
            WHERE t.last > ifnull(s.seq, 0)",
    },
];

/// The kind of finding for events that were published and have no delivery.
pub(super) const UNCONSUMED_KIND: &str = "unconsumed";

/// `?1` is the topic, `?2` a while ago: what was published before that should have come.
const UNCONSUMED: Check = Check {
    kind: UNCONSUMED_KIND,
    what: "events that were published and have no delivery, for more than 60 s or although the \
        consumer has passed them",
    sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ifnull(', partition ' || \
        o.\"partition\" || ', offset ' || ifnull(o.\"offset\", r.\"offset\"), '') FROM outbox o \
        LEFT JOIN delivery d ON d.outbox_id = o.id LEFT JOIN topic_partition p ON p.topic = ?1 \
        AND p.\"partition\" = o.\"partition\" LEFT JOIN topic_record r ON r.outbox_id = o.id \
        AND r.\"partition\" = o.\"partition\" WHERE o.status = 'PUBLISHED' \
        AND d.outbox_id IS NULL AND (o.\"partition\" IS NULL OR o.published_at < ?2 \
        OR ifnull(o.\"offset\", r.\"offset\") < p.consumed_to) GROUP BY o.id ORDER BY o.id",
};

/// How long a published event may take to come from the topic.
const CONSUMED_WITHIN: Duration = Duration::from_mins(1);

/// What must hold between database and topic.
const TOPIC: [Check; 4] = [
    Check {
        kind: "twice",
        what: "events that are on the topic more than once",
        sql: "SELECT 'event ' || outbox_id || ': partition/offset ' || group_concat(\"partition\" \
            || '/' || \"offset\", ', ') FROM topic_record GROUP BY outbox_id HAVING count(*) > 1",
    },
    Check {
        kind: "out-of-order",
        what: "events that are on the topic behind a later one",
        sql: "SELECT 'event ' || outbox_id || ' behind ' || before || ': partition ' || \
            \"partition\" || ', offset ' || \"offset\" FROM late WHERE NOT sent_again",
    },
    Check {
        kind: "unknown",
        what: "events of this node on the topic that the database does not know",
        sql: "SELECT 'event ' || r.outbox_id || ' of payment ' || ifnull(r.payment_id, '(none)') \
            || ': partition ' || r.\"partition\" || ', offset ' || r.\"offset\" \
            FROM topic_record r LEFT JOIN outbox o ON o.id = r.outbox_id LEFT \
            JOIN payment p ON p.id = r.payment_id WHERE o.id IS NULL AND (p.id IS NULL \
            OR r.outbox_id > ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0) \
            OR EXISTS (SELECT 1 FROM outbox other WHERE other.payment_id = r.payment_id)) \
            AND NOT EXISTS (SELECT 1 FROM restored_copy c WHERE r.outbox_id > c.last_outbox_id \
            AND r.outbox_id < c.first_new_id) ORDER BY r.\"partition\", r.\"offset\"",
    },
    Check {
        kind: "mismatch",
        what: "events whose record names another user or payment",
        sql: "SELECT 'event ' || r.outbox_id || ': user ' || ifnull(r.user_id, '(none)') || ' and \
            payment ' || ifnull(r.payment_id, '(none)') || ' instead of ' || ifnull(o.user_id, \
            p.user_id) || ' and ' || ifnull(o.payment_id, p.id) || ': partition ' || \
            r.\"partition\" || ', offset ' || r.\"offset\" FROM topic_record r LEFT \
            JOIN outbox o ON o.id = r.outbox_id LEFT JOIN payment p ON p.id = r.payment_id \
            WHERE (o.id IS NOT NULL AND (r.user_id IS NOT o.user_id \
            OR r.payment_id IS NOT o.payment_id)) OR (o.id IS NULL AND p.id IS NOT NULL \
            AND r.user_id IS NOT p.user_id AND r.outbox_id <= ifnull((SELECT seq \
            FROM sqlite_sequence WHERE name = 'outbox'), 0)) \
            ORDER BY r.\"partition\", r.\"offset\"",
    },
];

/// `?1`: the newest event that was published before the topic was looked at. What has an offset
/// must be there if the broker still has that offset; what has none must be somewhere if the broker
/// still has everything.
const MISSING: Check = Check {
    kind: "missing",
    what: "events that were published and are not on the topic",
    sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': ' || CASE WHEN \
        r.outbox_id IS NOT NULL THEN 'partition ' || r.\"partition\" || ', offset ' || \
        r.\"offset\" || ', instead of ' ELSE 'not at ' END || 'partition ' || o.\"partition\" || \
        ', offset ' || ifnull(o.\"offset\", '(unknown)') FROM outbox o LEFT \
        JOIN extent e ON e.\"partition\" = o.\"partition\" LEFT \
        JOIN topic_record r ON r.outbox_id = o.id WHERE o.status = 'PUBLISHED' \
        AND o.\"partition\" IS NOT NULL AND (o.id > (SELECT published_before FROM incarnation) \
        OR r.outbox_id IS NOT NULL) AND CASE WHEN e.\"partition\" IS NULL THEN o.id <= ?1 \
        WHEN o.\"offset\" IS NULL THEN o.id <= ?1 AND e.low = 0 AND r.outbox_id IS NULL \
        AND NOT EXISTS (SELECT 1 FROM undecodable u WHERE u.\"partition\" = o.\"partition\") \
        WHEN EXISTS (SELECT 1 FROM undecodable u WHERE u.\"partition\" = o.\"partition\" \
        AND o.\"offset\" >= u.low AND o.\"offset\" < u.\"end\") THEN 0 ELSE o.\"offset\" >= e.low \
        AND o.\"offset\" < e.\"end\" AND NOT EXISTS (SELECT 1 FROM topic_record h \
        WHERE h.\"partition\" = o.\"partition\" AND h.\"offset\" = o.\"offset\" \
        AND h.outbox_id = o.id) END GROUP BY o.id ORDER BY o.id",
};

/// `?1`: a while before the topic was looked at. A transaction of ours is visible within that time.
const INVISIBLE: Check = Check {
    kind: "invisible",
    what: "events that were published and are not visible to read_committed consumers: a \
        transaction before them is open",
    sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': partition ' || \
        o.\"partition\" || ', offset ' || o.\"offset\" || ', last stable offset ' || e.\"end\" \
        FROM outbox o JOIN extent e ON e.\"partition\" = o.\"partition\" \
        WHERE o.status = 'PUBLISHED' AND o.\"offset\" >= e.\"end\" AND o.published_at < ?1 \
        AND o.id > (SELECT published_before FROM incarnation) ORDER BY o.id",
};

/// How long a transaction of ours may take to become visible.
const VISIBLE_WITHIN: Duration = Duration::from_secs(5);

/// What a person may want to know, and is as it should be.
const NOTES: [Check; 6] = [
    Check {
        kind: "dead-letters",
        what: "dead letters are open: they wait for a person",
        sql: "SELECT id || ': ' || reason FROM dead_letter WHERE state = 'OPEN' ORDER BY id",
    },
    Check {
        kind: "dropped-records",
        what: "count of records that are not events of this node and were not kept: \
            kafka.dead_records_max were open",
        sql: "SELECT records_dropped || ' records' FROM node WHERE records_dropped > 0",
    },
    Check {
        kind: "discarded",
        what: "events were not taken by Kafka and discarded by a person: they are on no topic, \
            and nobody was told",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': ' || o.rejection \
            FROM outbox o JOIN delivery d ON d.outbox_id = o.id WHERE o.status = 'REJECTED' \
            AND d.status = 'DISCARDED' ORDER BY o.id",
    },
    Check {
        kind: "not-marked",
        what: "events are on the topic and not marked PUBLISHED yet: the publisher does that",
        sql: "SELECT 'event ' || o.id FROM outbox o WHERE o.status = 'INIT' \
              AND EXISTS (SELECT 1 FROM topic_record r WHERE r.outbox_id = o.id) ORDER BY o.id",
    },
    Check {
        kind: "sent-again",
        what: "events are on the topic behind later ones, because somebody sent them again after \
            they were set aside",
        sql: "SELECT 'event ' || outbox_id || ' behind ' || before || ': partition ' || \
            \"partition\" || ', offset ' || \"offset\" FROM late WHERE sent_again",
    },
    Check {
        kind: "backup",
        what: "this is a backup that nobody has started payrelay on",
        sql: "SELECT 'node ' || id FROM node WHERE backed_up_at IS NOT NULL",
    },
];

/// What the topic does not have any more, and need not have. The events were consumed, or taken
/// from the outbox.
const GONE: [Check; 4] = [
    Check {
        kind: "earlier-incarnation",
        what: "events were published to an earlier incarnation of the topic, which was deleted",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id FROM outbox o \
              WHERE o.status = 'PUBLISHED' AND o.\"partition\" IS NOT NULL \
              AND o.id <= (SELECT published_before FROM incarnation) \
              AND NOT EXISTS (SELECT 1 FROM topic_record r WHERE r.outbox_id = o.id) ORDER BY o.id",
    },
    Check {
        kind: "undecodable",
        what: "events were published, and their records cannot be decoded: a batch is damaged, or \
            holds too much",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': partition ' || \
            o.\"partition\" || ', offset ' || o.\"offset\" FROM outbox o \
            JOIN undecodable u ON u.\"partition\" = o.\"partition\" WHERE o.status = 'PUBLISHED' \
            AND o.\"offset\" >= u.low AND o.\"offset\" < u.\"end\" \
            AND o.id > (SELECT published_before FROM incarnation) ORDER BY o.id",
    },
    Check {
        kind: "lost-with-old-file",
        what: "payments are on the topic and not here: they were stored after the copy that was \
            restored",
        sql: "SELECT 'event ' || r.outbox_id || ' of payment ' || ifnull(r.payment_id, '(none)') \
            FROM topic_record r WHERE NOT EXISTS (SELECT 1 FROM outbox o \
            WHERE o.id = r.outbox_id) AND EXISTS (SELECT 1 FROM restored_copy c \
            WHERE r.outbox_id > c.last_outbox_id AND r.outbox_id < c.first_new_id) \
            GROUP BY r.outbox_id ORDER BY r.outbox_id",
    },
    Check {
        kind: "deleted-from-topic",
        what: "events were published, and the broker has deleted their records: retention, or \
            kafka-delete-records",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': partition ' || \
            o.\"partition\" || ', offset ' || o.\"offset\" FROM outbox o \
            JOIN extent e ON e.\"partition\" = o.\"partition\" WHERE o.status = 'PUBLISHED' \
            AND o.\"offset\" < e.low AND NOT (o.id <= (SELECT published_before FROM incarnation) \
            AND NOT EXISTS (SELECT 1 FROM topic_record r WHERE r.outbox_id = o.id)) ORDER BY o.id",
    },
];

/// What is read from the topic, and the events that are behind a later one. A second copy is not
/// late, but twice.
const TEMPORARY: &str = "
    PRAGMA temp_store = FILE;
    PRAGMA cache_size = -16384;
    CREATE TEMP TABLE topic_record (
        \"partition\" INTEGER NOT NULL,
        \"offset\"    INTEGER NOT NULL,
        outbox_id     INTEGER NOT NULL,
        user_id       INTEGER,
        payment_id    INTEGER,
        PRIMARY KEY (\"partition\", \"offset\")
    ) WITHOUT ROWID;
    CREATE TEMP TABLE extent (\"partition\" INTEGER PRIMARY KEY, low INTEGER NOT NULL, \"end\" INTEGER NOT NULL);
    CREATE TEMP TABLE undecodable (\"partition\" INTEGER NOT NULL, low INTEGER NOT NULL, \"end\" INTEGER NOT NULL);
    CREATE TEMP TABLE incarnation (published_before INTEGER NOT NULL);
    CREATE TEMP VIEW late AS SELECT r.*, EXISTS (SELECT 1 FROM main.dead_letter l \
        JOIN main.dead_letter_action a ON a.dead_letter_id = l.id WHERE l.outbox_id = r.outbox_id AND a.action = 'replay') AS sent_again \
        FROM (SELECT \"partition\", \"offset\", outbox_id, max(outbox_id) OVER (PARTITION BY \"partition\" \
        ORDER BY \"offset\" ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before FROM topic_record) r \
        WHERE r.outbox_id < r.before AND NOT EXISTS (SELECT 1 FROM topic_record e WHERE e.outbox_id = r.outbox_id \
        AND (e.\"partition\", e.\"offset\") < (r.\"partition\", r.\"offset\"));
";

impl AuditDatabase {
    /// Opens a database that some payrelay has made, for reading only.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let (connection, node) = open::open_to_read(&files::resolve(path)?)?;
        let failed = |source| open_error::open_error(path, source);
        connection.execute_batch(TEMPORARY).map_err(failed)?;
        Ok(Self {
            connection,
            node,
            published_before: 0,
            visible_before: Timestamp::from_micros(0),
        })
    }

    /// Who it belongs to.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// To be called before the topic's ends are asked for: what is published by now must be before
    /// them.
    pub fn begin(&mut self) -> Result<(), StoreError> {
        let sql = "SELECT ifnull(max(id), 0) FROM outbox WHERE status = 'PUBLISHED'";
        self.published_before = self.connection.query_row(sql, [], |row| row.get(0))?;
        self.visible_before = Timestamp::now().minus(VISIBLE_WITHIN);
        Ok(())
    }

    /// Keeps what was read from the topic.
    pub fn record(&mut self, records: &[TopicEvent]) -> Result<(), StoreError> {
        let tx = self.connection.transaction()?;
        {
            let mut insert = tx
                .prepare_cached("INSERT OR IGNORE INTO topic_record VALUES (?1, ?2, ?3, ?4, ?5)")?;
            for TopicEvent {
                partition,
                offset,
                outbox_id,
                user_id,
                payment_id,
            } in records
            {
                insert.execute((partition, offset, outbox_id, user_id, payment_id))?;
            }
        }
        Ok(tx.commit()?)
    }

    /// Keeps which records of the topic cannot be decoded.
    pub fn skip(&mut self, skipped: &[OffsetRange]) -> Result<(), StoreError> {
        for OffsetRange {
            partition,
            start,
            end,
        } in skipped
        {
            self.connection.execute(
                "INSERT INTO undecodable VALUES (?1, ?2, ?3)",
                (partition, start, end),
            )?;
        }
        Ok(())
    }

    /// Looks at everything, in one snapshot; at the topic as well if that was read. Each finding
    /// comes with at most `limit` examples.
    pub fn check(
        mut self,
        topic: &str,
        reading: Option<TopicSnapshot<'_>>,
        limit: usize,
    ) -> Result<CheckResult, StoreError> {
        self.connection
            .execute_batch("CREATE INDEX temp.topic_event ON topic_record (outbox_id)")?;
        for OffsetRange {
            partition,
            start,
            end,
        } in reading.map_or(&[][..], |reading| reading.ranges)
        {
            self.connection.execute(
                "INSERT INTO extent VALUES (?1, ?2, ?3)",
                (partition, start, end),
            )?;
        }
        self.connection.execute(
            "INSERT INTO incarnation SELECT ifnull(max(published_before), 0) \
                FROM topic_incarnation WHERE topic = ?1 AND topic_id = ?2",
            (topic, reading.and_then(|reading| reading.id)),
        )?;
        let published_before = self.published_before;
        let visible_before = self.visible_before;
        let tx = self.connection.transaction()?;
        let mut findings = Findings {
            tx: &tx,
            limit,
            found: Vec::new(),
        };
        findings.damage()?;
        findings.foreign_keys()?;
        for check in &FILE {
            findings.ask(check, [])?;
        }
        findings.ask(
            &UNCONSUMED,
            (topic, Timestamp::now().minus(CONSUMED_WITHIN).as_micros()),
        )?;
        if reading.is_some() {
            for check in &TOPIC {
                findings.ask(check, [])?;
            }
            findings.ask(&MISSING, [published_before])?;
            findings.ask(&INVISIBLE, [visible_before.as_micros()])?;
        }
        let found = findings.found;
        let mut notes = Findings {
            tx: &tx,
            limit,
            found: Vec::new(),
        };
        for check in &NOTES {
            notes.ask(check, [])?;
        }
        if reading.is_some() {
            for check in &GONE {
                notes.ask(check, [])?;
            }
        }
        let notes = notes.found;
        // Without its pages there is nothing to count.
        let totals = if found.iter().any(|seen| seen.kind == DAMAGED) {
            totals(&tx).ok()
        } else {
            Some(totals(&tx)?)
        };
        Ok(CheckResult {
            totals: totals.unwrap_or_default(),
            findings: found,
            notes,
        })
    }
}

const DAMAGED: &str = "damaged";
const DAMAGED_FILE: &str = "places where the file is damaged";

/// What is being found in a snapshot.
struct Findings<'a> {
    tx: &'a Transaction<'a>,
    limit: usize,
    found: Vec<Finding>,
}

impl Findings<'_> {
    fn ask(&mut self, check: &Check, params: impl Params) -> Result<(), StoreError> {
        self.collect(check.kind, check.what, check.sql, params, |row| {
            row.get(0).map(Some)
        })
    }

    /// Also what an index does not have: what it waits for would never be published, or told
    /// (<https://sqlite.org/pragma.html#pragma_integrity_check>).
    fn damage(&mut self) -> Result<(), StoreError> {
        self.collect(
            DAMAGED,
            DAMAGED_FILE,
            "PRAGMA main.integrity_check",
            [],
            |row| Ok(Some(row.get(0)?).filter(|line: &String| line != "ok")),
        )
    }

    /// What has a check of its own is told by that.
    fn foreign_keys(&mut self) -> Result<(), StoreError> {
        let sql = "SELECT \"table\", rowid, parent FROM pragma_foreign_key_check \
                   WHERE \"table\" NOT IN ('delivery', 'payment_history', 'idempotency_key')";
        self.collect(
            "no-parent",
            "rows that name one that is not there",
            sql,
            [],
            |row| {
                let (table, rowid, parent): (String, Option<i64>, String) =
                    (row.get(0)?, row.get(1)?, row.get(2)?);
                Ok(Some(format!(
                    "{table} {}, {parent}",
                    rowid.unwrap_or_default()
                )))
            },
        )
    }

    /// Told once, whichever check has met it.
    fn damaged(&mut self) -> &mut Finding {
        let known = self.found.iter().position(|seen| seen.kind == DAMAGED);
        let at = known.unwrap_or_else(|| {
            self.found.push(Finding {
                kind: DAMAGED,
                what: DAMAGED_FILE,
                count: 0,
                examples: Vec::new(),
            });
            self.found.len() - 1
        });
        &mut self.found[at]
    }

    /// Counts the rows of which there is something to show, and keeps the first.
    fn collect(
        &mut self,
        kind: &'static str,
        what: &'static str,
        sql: &str,
        params: impl Params,
        show: impl Fn(&Row<'_>) -> rusqlite::Result<Option<String>>,
    ) -> Result<(), StoreError> {
        let mut seen = Finding {
            kind,
            what,
            count: 0,
            examples: Vec::new(),
        };
        let walked = self.tx.prepare(sql).and_then(|mut statement| {
            let mut rows = statement.query(params)?;
            while let Some(row) = rows.next()? {
                let Some(example) = show(row)? else { continue };
                seen.count += 1;
                if seen.examples.len() < self.limit {
                    seen.examples.push(example);
                }
            }
            Ok(())
        });
        if seen.count > 0 {
            self.found.push(seen);
        }
        match walked {
            // That is an answer as well: the file is not what it was.
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt) => {
                let limit = self.limit;
                let damaged = self.damaged();
                damaged.count += 1;
                if damaged.examples.len() < limit {
                    damaged
                        .examples
                        .push(format!("looking for {what}: {error}"));
                }
                Ok(())
            }
            walked => Ok(walked?),
        }
    }
}

fn totals(tx: &Transaction<'_>) -> Result<Totals, StoreError> {
    let by_status = |table| -> rusqlite::Result<BTreeMap<String, i64>> {
        let mut statement = tx.prepare(&format!(
            "SELECT status, count(*) FROM {table} GROUP BY status"
        ))?;
        statement
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    };
    Ok(Totals {
        payments: by_status("payment")?,
        events: by_status("outbox")?,
        events_purged: tx.query_row("SELECT events_purged FROM node", [], |row| row.get(0))?,
        deliveries: by_status("delivery")?,
    })
}
