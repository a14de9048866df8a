//! The queries of an audit: one for each kind of finding, and one for each kind of note.

use std::time::Duration;

/// A query that returns a row for each inconsistency, in words.
pub(super) struct Check {
    pub(super) kind: &'static str,
    pub(super) what: &'static str,
    pub(super) sql: &'static str,
}

/// Consistency of the database alone.
pub(super) const FILE: [Check; 10] = [
    Check {
        kind: "double-payment",
        what: "reservations with more than one COMPLETED payment",
        // Without the index, which may itself be damaged.
        sql: "SELECT 'reservation ' || reservation_id || ': ' || count(*) FROM payment NOT INDEXED \
              WHERE status = 'COMPLETED' GROUP BY reservation_id HAVING count(*) > 1",
    },
    Check {
        kind: "broken-chain",
        what: "payments that do not name their user's previous payment",
        sql: "SELECT 'payment ' || id || ' names ' || ifnull(previous_id, 'none') || ' instead \
            of ' || ifnull(previous, 'none') FROM (SELECT id, previous_id, lag(id) OVER \
            (PARTITION BY user_id ORDER BY id) AS previous FROM payment) \
            WHERE previous_id IS NOT previous",
    },
    Check {
        kind: "history-head",
        what: "users whose history does not begin at their newest payment",
        sql: "SELECT 'user ' || user_id || ': ' || ifnull(sum(named), 'none') || ' instead of ' \
            || ifnull(sum(newest), 'none') \
            FROM (SELECT user_id, last_payment_id AS named, NULL AS newest FROM user_history \
            UNION ALL SELECT user_id, NULL, max(id) FROM payment \
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
        what: "events that contradict their payment",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id FROM outbox o LEFT \
            JOIN payment p ON p.id = o.payment_id WHERE p.user_id IS NOT o.user_id \
            OR lower('payment.' || p.status) IS NOT o.type ORDER BY o.id",
    },
    Check {
        kind: "orphan-delivery",
        what: "deliveries without event",
        sql: "SELECT 'delivery of event ' || d.outbox_id FROM delivery d LEFT \
            JOIN outbox o ON o.id = d.outbox_id WHERE o.id IS NULL ORDER BY d.outbox_id",
    },
    Check {
        kind: "undeliverable",
        what: "deliveries that no notifier sends: of a channel that does not exist, or dead \
            without an open dead letter",
        sql: "SELECT 'delivery of event ' || d.outbox_id || ': ' || d.status || ', channel ' || \
            d.channel FROM delivery d WHERE (d.status IN ('PENDING', 'SENDING') \
            AND d.channel <> 'default' AND d.channel NOT IN (SELECT channel FROM route)) \
            OR (d.status = 'DEAD' AND NOT EXISTS (SELECT 1 FROM dead_letter l \
            WHERE l.outbox_id = d.outbox_id AND l.state = 'OPEN')) ORDER BY d.outbox_id",
    },
    Check {
        kind: "broken-idempotency-key",
        what: "idempotency keys whose response cannot be repeated: its payments do not exist, \
            or are not of one user",
        sql: "SELECT 'key ' || k.id || ': ' || count(p.id) || ' of ' || k.payment_count || ' \
            payments from ' || k.first_payment_id || ', of ' || count(DISTINCT p.user_id) || ' \
            users' FROM idempotency_key k LEFT JOIN payment p ON p.id >= k.first_payment_id \
            AND p.id < k.first_payment_id + k.payment_count GROUP BY k.id \
            HAVING count(p.id) <> k.payment_count OR count(DISTINCT p.user_id) <> 1 ORDER BY k.id",
    },
    Check {
        kind: "rejected",
        what: "events that Kafka rejects: they wait for an operator",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': ' || o.rejection \
            FROM outbox o WHERE o.status = 'REJECTED' AND NOT EXISTS (SELECT 1 FROM delivery d \
            WHERE d.outbox_id = o.id AND d.status = 'DISCARDED') ORDER BY o.id",
    },
    Check {
        kind: "id-reuse",
        what: "ids that may be given twice",
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
pub(in crate::store) const UNCONSUMED_KIND: &str = "unconsumed";

/// `?1` is the topic. Events that were published before `?2` should have arrived.
pub(super) const UNCONSUMED: Check = Check {
    kind: UNCONSUMED_KIND,
    what: "events that were published and have no delivery, for more than 60 s or although the \
        consumer has passed them",
    sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ifnull(', partition ' || \
        o.\"partition\" || ', offset ' || ifnull(o.\"offset\", r.\"offset\"), '') FROM outbox o \
        LEFT JOIN delivery d ON d.outbox_id = o.id LEFT JOIN topic_partition p ON p.topic = ?1 \
        AND p.\"partition\" = o.\"partition\" LEFT JOIN topic_record r ON r.outbox_id = o.id \
        AND r.\"partition\" = o.\"partition\" WHERE o.status = 'PUBLISHED' \
        AND d.outbox_id IS NULL AND o.id > (SELECT edge_through FROM node) \
        AND (o.\"partition\" IS NULL OR o.published_at < ?2 \
        OR ifnull(o.\"offset\", r.\"offset\") < p.consumed_to) GROUP BY o.id ORDER BY o.id",
};

/// How long a published event may need to arrive from the topic.
pub(super) const CONSUMED_WITHIN: Duration = Duration::from_mins(1);

/// Consistency of the database and the topic.
pub(super) const TOPIC: [Check; 4] = [
    Check {
        kind: "duplicate",
        what: "events that are on the topic more than once",
        sql: "SELECT 'event ' || outbox_id || ': partition/offset ' || group_concat(\"partition\" \
            || '/' || \"offset\", ', ') FROM topic_record GROUP BY outbox_id HAVING count(*) > 1",
    },
    Check {
        kind: "out-of-order",
        what: "events that are on the topic after a later one",
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
            OR EXISTS (SELECT 1 FROM outbox other WHERE other.id = r.payment_id \
            AND other.payment_id = r.payment_id) OR EXISTS (SELECT 1 FROM outbox other \
            WHERE other.payment_id = r.payment_id AND other.payment_id <> other.id)) \
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

/// `?1`: the newest event that was published before the topic was read. An event with an offset
/// must be there, if the broker still has that offset. An event without one must be somewhere, if
/// the broker still has every record. What a node has published as an edge is on another topic.
pub(super) const MISSING: Check = Check {
    kind: "missing",
    what: "events that were published and are not on the topic",
    sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': ' || CASE WHEN \
        r.outbox_id IS NOT NULL THEN 'partition ' || r.\"partition\" || ', offset ' || \
        r.\"offset\" || ', instead of ' ELSE 'not at ' END || 'partition ' || o.\"partition\" || \
        ', offset ' || ifnull(o.\"offset\", '(unknown)') FROM outbox o LEFT \
        JOIN extent e ON e.\"partition\" = o.\"partition\" LEFT \
        JOIN topic_record r ON r.outbox_id = o.id WHERE o.status = 'PUBLISHED' \
        AND o.\"partition\" IS NOT NULL AND (o.id > (SELECT published_before FROM incarnation) \
        OR r.outbox_id IS NOT NULL) AND NOT (SELECT role = 'single' AND o.id <= edge_through \
        AND NOT EXISTS (SELECT 1 FROM delivery d WHERE d.outbox_id = o.id) FROM node) \
        AND CASE WHEN e.\"partition\" IS NULL THEN o.id <= ?1 \
        WHEN o.\"offset\" IS NULL THEN o.id <= ?1 AND e.low = 0 AND r.outbox_id IS NULL \
        AND NOT EXISTS (SELECT 1 FROM undecodable u WHERE u.\"partition\" = o.\"partition\") \
        WHEN EXISTS (SELECT 1 FROM undecodable u WHERE u.\"partition\" = o.\"partition\" \
        AND o.\"offset\" >= u.low AND o.\"offset\" < u.\"end\") THEN 0 ELSE o.\"offset\" >= e.low \
        AND o.\"offset\" < e.\"end\" AND NOT EXISTS (SELECT 1 FROM topic_record h \
        WHERE h.\"partition\" = o.\"partition\" AND h.\"offset\" = o.\"offset\" \
        AND h.outbox_id = o.id) END GROUP BY o.id ORDER BY o.id",
};

/// Transactions of ours are visible when they are older than `?1`.
pub(super) const INVISIBLE: Check = Check {
    kind: "invisible",
    what: "events that were published and are not visible to read_committed consumers: a \
        transaction before them is open",
    sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': partition ' || \
        o.\"partition\" || ', offset ' || o.\"offset\" || ', last stable offset ' || e.\"end\" \
        FROM outbox o JOIN extent e ON e.\"partition\" = o.\"partition\" \
        WHERE o.status = 'PUBLISHED' AND o.\"offset\" >= e.\"end\" AND o.published_at < ?1 \
        AND o.id > (SELECT published_before FROM incarnation) ORDER BY o.id",
};

/// How long a transaction of ours may need to become visible.
pub(super) const VISIBLE_WITHIN: Duration = Duration::from_secs(5);

/// The kind of note for a copy.
pub const COPY_KIND: &str = "backup";

/// Facts that an operator may want to know, and that are no inconsistency.
pub(super) const NOTES: [Check; 6] = [
    Check {
        kind: "dead-letters",
        what: "dead letters are open: they wait for an operator",
        sql: "SELECT id || ': ' || reason FROM dead_letter WHERE state = 'OPEN' ORDER BY id",
    },
    Check {
        kind: "dropped-records",
        what: "count of records that are not events of this node and were dropped: \
            kafka.dead_records_max were open",
        sql: "SELECT records_dropped || ' records' FROM node WHERE records_dropped > 0",
    },
    Check {
        kind: "discarded",
        what: "events were rejected by Kafka and discarded by an operator: they are on no topic, \
            and no channel was notified",
        sql: "SELECT 'event ' || o.id || ' of payment ' || o.payment_id || ': ' || o.rejection \
            FROM outbox o JOIN delivery d ON d.outbox_id = o.id WHERE o.status = 'REJECTED' \
            AND d.status = 'DISCARDED' ORDER BY o.id",
    },
    Check {
        kind: "not-marked",
        what: "events are on the topic and not marked PUBLISHED yet: the publisher marks them",
        sql: "SELECT 'event ' || o.id FROM outbox o WHERE o.status = 'INIT' \
              AND EXISTS (SELECT 1 FROM topic_record r WHERE r.outbox_id = o.id) ORDER BY o.id",
    },
    Check {
        kind: "sent-again",
        what: "events are on the topic after later ones, because an operator replayed them \
            as dead letters",
        sql: "SELECT 'event ' || outbox_id || ' behind ' || before || ': partition ' || \
            \"partition\" || ', offset ' || \"offset\" FROM late WHERE sent_again",
    },
    Check {
        kind: COPY_KIND,
        what: "this is a backup that payrelay has not been started on",
        sql: "SELECT 'node ' || id FROM node WHERE backed_up_at IS NOT NULL",
    },
];

/// Records that the topic no longer has, and need not have: their events were consumed, or
/// backfilled from the outbox.
pub(super) const GONE: [Check; 4] = [
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

/// Tables for the records of the topic, and a view of the events that are after a later one. A
/// duplicate is not late.
pub(super) const TEMPORARY: &str = "
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
    CREATE TEMP TABLE extent (
        \"partition\" INTEGER PRIMARY KEY,
        low           INTEGER NOT NULL,
        \"end\"       INTEGER NOT NULL
    );
    CREATE TEMP TABLE undecodable (
        \"partition\" INTEGER NOT NULL,
        low           INTEGER NOT NULL,
        \"end\"       INTEGER NOT NULL
    );
    CREATE TEMP TABLE incarnation (published_before INTEGER NOT NULL);
    CREATE TEMP VIEW late AS
        SELECT r.*, EXISTS (
            SELECT 1 FROM main.dead_letter l
            JOIN main.dead_letter_action a ON a.dead_letter_id = l.id
            WHERE l.outbox_id = r.outbox_id AND a.action = 'replay'
        ) AS sent_again
        FROM (
            SELECT \"partition\", \"offset\", outbox_id, max(outbox_id) OVER (
                PARTITION BY \"partition\" ORDER BY \"offset\"
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) AS before
            FROM topic_record
        ) r
        WHERE r.outbox_id < r.before AND NOT EXISTS (
            SELECT 1 FROM topic_record e WHERE e.outbox_id = r.outbox_id
            AND (e.\"partition\", e.\"offset\") < (r.\"partition\", r.\"offset\")
        );
";
