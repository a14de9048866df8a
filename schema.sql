-- payrelay's database, version 7. Applied as one transaction to an empty file. A change adds a step
-- to src/store/engine/schema.rs, which upgrades existing files and sets PRAGMA user_version. A file
-- from before 0.2.0 is refused.
--
-- Times are microseconds since 1970-01-01 UTC. Ids are AUTOINCREMENT: an id is never used again,
-- even after a purge (https://sqlite.org/autoinc.html). There is one writer, so id order is commit
-- order.

-- Who this database belongs to: one row, written at the first start.
CREATE TABLE node (
    id            TEXT    NOT NULL PRIMARY KEY,
    created_at    INTEGER NOT NULL,
    backed_up_at  INTEGER, -- set in a backup only: its next start must not give ids again
    restored_by   TEXT,    -- with it: the user who restored the copy
    -- With it: the largest id that the replaced file had given, if that could be read.
    given_before  INTEGER,
    events_purged INTEGER NOT NULL DEFAULT 0, -- payments = outbox rows + these
    -- Not kept as dead letters, because kafka.dead_records_max were open.
    records_dropped INTEGER NOT NULL DEFAULT 0,
    -- The low-water mark of the deliveries. Every event up to this id has one, is REJECTED, was
    -- purged, or is delivered by others.
    consumed_through INTEGER NOT NULL DEFAULT 0,
    -- node.role at the last start. Others deliver the events of an edge.
    role             TEXT    NOT NULL DEFAULT 'single' CHECK (role IN ('single', 'edge')),
    -- Every event up to this id without a delivery was published by an edge.
    edge_through     INTEGER NOT NULL DEFAULT 0
) STRICT;

-- The copies that were restored. The ids between the last one in the copy and the first new one
-- were given by the replaced file. The payments with these ids are not in this database.
CREATE TABLE restored_copy (
    id              INTEGER PRIMARY KEY,
    copied_at       INTEGER NOT NULL,
    started_at      INTEGER NOT NULL,
    restored_by     TEXT, -- NULL: the file was put in its place without `payrelay restore`
    last_payment_id INTEGER NOT NULL,
    last_outbox_id  INTEGER NOT NULL,
    first_new_id    INTEGER NOT NULL
) STRICT;

-- A row for each reservation that a client tried to pay. Never changed, never deleted.
CREATE TABLE payment (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id        INTEGER NOT NULL CHECK (user_id >= 0),
    reservation_id INTEGER NOT NULL CHECK (reservation_id >= 0),
    amount         INTEGER NOT NULL CHECK (amount >= 0), -- in the currency's smallest unit
    currency       TEXT    NOT NULL,
    status         TEXT    NOT NULL CHECK (status IN ('COMPLETED', 'FAILED')),
    failure        TEXT    CHECK ((failure IS NOT NULL) = (status = 'FAILED')),
    executed_at    INTEGER NOT NULL,
    -- The history of its user: the user's payment before this one. NULL: the first.
    previous_id    INTEGER
) STRICT;

-- A reservation is paid once.
CREATE UNIQUE INDEX payment_paid ON payment (reservation_id) WHERE status = 'COMPLETED';

-- Where a user's history begins, at its newest end: small, and changed once for a request. From
-- here payment.previous_id leads back. An index by user would change, log and sync another page of
-- a large index for nearly every payment (benches/growth.rs).
CREATE TABLE user_history (
    user_id         INTEGER PRIMARY KEY,
    last_payment_id INTEGER NOT NULL REFERENCES payment (id)
) STRICT;

-- The requests that named an Idempotency-Key. A payment never changes, and those of a request have
-- consecutive ids. So the response is written again from them, byte for byte. Ids are in the order
-- of arrival, which the purge follows.
CREATE TABLE idempotency_key (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    client           TEXT    NOT NULL, -- the name of the client's token, or '' without tokens
    "key"            TEXT    NOT NULL,
    body_hash        BLOB    NOT NULL, -- SHA-256 of the request's body
    first_payment_id INTEGER NOT NULL REFERENCES payment (id),
    payment_count    INTEGER NOT NULL,
    -- Microseconds for which this database had been served, independent of the system clock.
    arrived_at       INTEGER NOT NULL,
    UNIQUE (client, "key")
) STRICT;

-- A row for each event, written with its payment. It is INIT until the publisher has its
-- acknowledgement, then PUBLISHED. It is REJECTED if the broker refuses this very record, until an
-- operator replays it.
CREATE TABLE outbox (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    payment_id   INTEGER NOT NULL REFERENCES payment (id),
    user_id      INTEGER NOT NULL,
    type         TEXT    NOT NULL CHECK (type IN ('payment.completed', 'payment.failed')),
    traceparent  TEXT,
    tracestate   TEXT,
    status       TEXT    NOT NULL DEFAULT 'INIT'
                 CHECK (status IN ('INIT', 'PUBLISHED', 'REJECTED')),
    rejection    TEXT    CHECK ((rejection IS NOT NULL) = (status = 'REJECTED')),
    created_at   INTEGER NOT NULL,
    published_at INTEGER CHECK ((published_at IS NOT NULL) = (status = 'PUBLISHED')),
    "partition"  INTEGER, -- NULL with the application publisher
    "offset"     INTEGER
) STRICT;

-- A payment and its event nearly always get the same id. These are the others: those that were
-- written after the outbox skipped ids that the topic already had.
CREATE UNIQUE INDEX outbox_payment ON outbox (payment_id) WHERE payment_id <> id;

-- What the relay reads. Only unpublished rows are in it, so it stays small however large the table.
CREATE INDEX outbox_init ON outbox (id) WHERE status = 'INIT';

-- What the sampler counts: rejected events are few, or none.
CREATE INDEX outbox_rejected ON outbox (id) WHERE status = 'REJECTED';

-- How far each partition of the topic is published and consumed. Written in the transactions that
-- mark published events and store consumed ones, so neither is ever ahead of the rows.
CREATE TABLE topic_partition (
    topic          TEXT    NOT NULL,
    topic_id       BLOB    NOT NULL, -- of the cluster: a recreated topic has another one
    "partition"    INTEGER NOT NULL,
    published_to   INTEGER NOT NULL DEFAULT 0, -- every event of ours before this offset is marked
    consumed_to    INTEGER,                    -- the next offset to consume; NULL: not known
    last_outbox_id INTEGER NOT NULL DEFAULT 0, -- the largest id that was consumed
    duplicates     INTEGER NOT NULL DEFAULT 0, -- records of events that had a delivery already
    gaps           INTEGER NOT NULL DEFAULT 0, -- events that were backfilled from the outbox
    inversions     INTEGER NOT NULL DEFAULT 0, -- events that came after a later one
    PRIMARY KEY (topic, topic_id, "partition")
) STRICT, WITHOUT ROWID;

-- The first acknowledged event of a partition that read_committed consumers may not see yet.
CREATE TABLE topic_unseen (
    topic       TEXT    NOT NULL,
    topic_id    BLOB    NOT NULL,
    "partition" INTEGER NOT NULL,
    "offset"    INTEGER NOT NULL, -- of the first such event
    outbox_id   INTEGER NOT NULL, -- no such event has a smaller id
    PRIMARY KEY (topic, topic_id, "partition")
) STRICT, WITHOUT ROWID;

-- The incarnations of a topic that this node has published to: a recreated topic has another id
-- (KIP-516). Written before the first event is published to it.
CREATE TABLE topic_incarnation (
    topic            TEXT    NOT NULL,
    topic_id         BLOB    NOT NULL,
    -- The largest id of an event that was published to an earlier incarnation.
    published_before INTEGER NOT NULL,
    first_seen_at    INTEGER NOT NULL,
    -- The largest id of an event of ours that is known to be on it.
    last_published   INTEGER NOT NULL DEFAULT 0,
    -- With kafka.key = "node": where the events go, whatever partitions are added.
    "partition"      INTEGER,
    PRIMARY KEY (topic, topic_id)
) STRICT, WITHOUT ROWID;

-- The channel of a payment: the first route that matches, by position; else the channel "default".
-- Written again at every start, from the configuration.
CREATE TABLE route (
    position   INTEGER PRIMARY KEY,
    channel    TEXT    NOT NULL UNIQUE,
    status     TEXT    CHECK (status IN ('COMPLETED', 'FAILED')), -- NULL: either
    amount_min INTEGER NOT NULL,
    amount_max INTEGER NOT NULL,
    user_min   INTEGER NOT NULL,
    user_max   INTEGER NOT NULL
) STRICT;

-- The sink of each channel at the last start: its webhook, or payrelay's log.
CREATE TABLE channel_sink (
    channel TEXT PRIMARY KEY,
    sink    TEXT NOT NULL CHECK (sink IN ('webhook', 'log'))
) STRICT, WITHOUT ROWID;

-- The actions of operators on a channel. Its notifier looks for new rows.
CREATE TABLE channel_action (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    channel  TEXT    NOT NULL,
    action   TEXT    NOT NULL CHECK (action IN ('pause', 'resume', 'skip')),
    origin   TEXT    NOT NULL, -- 'http, token NAME' or 'local user NAME'
    reason   TEXT,
    outcome  TEXT, -- NULL: the notifier has not seen it yet
    acted_at INTEGER NOT NULL
) STRICT;

-- The deliveries. The key is the event's, so a duplicate of an event changes nothing. SENDING is
-- written before the POST: a row that still says so after a crash may have been shown.
CREATE TABLE delivery (
    outbox_id        INTEGER PRIMARY KEY REFERENCES outbox (id),
    channel          TEXT    NOT NULL,
    status           TEXT    NOT NULL DEFAULT 'PENDING'
                     CHECK (status IN ('PENDING', 'SENDING', 'DELIVERED', 'DEAD', 'DISCARDED')),
    attempts         INTEGER NOT NULL DEFAULT 0,
    unknown_outcomes INTEGER NOT NULL DEFAULT 0, -- POSTs whose answer was lost
    created_at       INTEGER NOT NULL,
    delivered_at     INTEGER CHECK ((delivered_at IS NOT NULL) = (status = 'DELIVERED')),
    -- The kind of message that carried it.
    delivered_in     TEXT    CHECK (delivered_in IN ('single', 'digest', 'summary')),
    last_error       TEXT
) STRICT;

-- What a notifier reads: a channel's waiting rows, in commit order.
CREATE INDEX delivery_waiting ON delivery (channel, outbox_id)
    WHERE status IN ('PENDING', 'SENDING');

-- What the purge reads.
CREATE INDEX delivery_delivered ON delivery (delivered_at) WHERE status = 'DELIVERED';

-- A dead letter is a record that could not be consumed, or an event. The event could not be
-- published (its outbox row is REJECTED) or delivered (its delivery is DEAD).
CREATE TABLE dead_letter (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    outbox_id   INTEGER UNIQUE, -- an event
    payment_id  INTEGER,        -- its payment
    topic       TEXT,           -- a record: where it was read, and what it was
    "partition" INTEGER,
    "offset"    INTEGER,
    -- The record's timestamp, in milliseconds since 1970: another record may get the same offset.
    written_at  INTEGER,
    "key"       BLOB,
    value       BLOB,
    headers     TEXT,           -- JSON array of [name, value]
    reason      TEXT    NOT NULL,
    count       INTEGER NOT NULL DEFAULT 1, -- how often it came to this
    state       TEXT    NOT NULL DEFAULT 'OPEN'
                CHECK (state IN ('OPEN', 'REPLAYED', 'DISCARDED')),
    received_at INTEGER NOT NULL,
    closed_at   INTEGER CHECK ((closed_at IS NULL) OR state <> 'OPEN'),
    UNIQUE (topic, "partition", "offset", written_at),
    CHECK ((outbox_id IS NULL) = (topic IS NOT NULL))
) STRICT;

CREATE INDEX dead_letter_open ON dead_letter (id) WHERE state = 'OPEN';

CREATE INDEX dead_letter_open_record ON dead_letter (id)
    WHERE state = 'OPEN' AND outbox_id IS NULL;

CREATE INDEX dead_letter_closed ON dead_letter (closed_at) WHERE closed_at IS NOT NULL;

-- The actions of operators on dead letters.
CREATE TABLE dead_letter_action (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    dead_letter_id INTEGER NOT NULL REFERENCES dead_letter (id),
    action         TEXT    NOT NULL CHECK (action IN ('replay', 'discard')),
    origin         TEXT    NOT NULL, -- 'http, token NAME' or 'local user NAME'
    reason         TEXT, -- why, in the operator's words
    outcome        TEXT    NOT NULL,
    acted_at       INTEGER NOT NULL
) STRICT;

CREATE INDEX dead_letter_action_letter ON dead_letter_action (dead_letter_id);

-- The actions of operators on the relay.
CREATE TABLE relay_action (
    id       INTEGER PRIMARY KEY,
    action   TEXT    NOT NULL CHECK (action IN ('resume', 'wake')),
    origin   TEXT    NOT NULL, -- 'http, token NAME' or 'local user NAME'
    reason   TEXT, -- why, in the operator's words
    acted_at INTEGER NOT NULL
) STRICT;

-- What a fenced relay looks for.
CREATE INDEX relay_action_resume ON relay_action (id) WHERE action = 'resume';

-- The commands that an operator must not forget.
CREATE TABLE operation (
    id        INTEGER PRIMARY KEY,
    operation TEXT    NOT NULL CHECK (operation IN ('backup', 'audit', 'restore')),
    outcome   TEXT    NOT NULL CHECK (outcome IN ('ok', 'failed', 'findings')),
    origin    TEXT    NOT NULL, -- 'local user NAME'
    findings  INTEGER,          -- of an audit: how many kinds
    file_only INTEGER CHECK (file_only IN (0, 1)), -- of an audit: 1 if it did not read the topic
    ended_at  INTEGER NOT NULL
) STRICT;

CREATE INDEX operation_last ON operation (operation, outcome, id);
