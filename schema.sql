-- payrelay's database, version 1. Applied as one transaction to an empty file; src/store/schema.rs sets
-- PRAGMA user_version and holds the migrations that come after.
--
-- Times are microseconds since 1970-01-01 UTC. Ids are AUTOINCREMENT: an id is never used again, even
-- after a purge (https://sqlite.org/autoinc.html). There is one writer, so id order is commit order.

-- Who this database belongs to: one row, written at the first start.
CREATE TABLE node (
    id         TEXT    NOT NULL PRIMARY KEY,
    created_at INTEGER NOT NULL
) STRICT;

-- One row a reservation that somebody tried to pay. Never changed, never deleted.
CREATE TABLE payment (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id        INTEGER NOT NULL CHECK (user_id >= 0),
    reservation_id INTEGER NOT NULL CHECK (reservation_id >= 0),
    amount         INTEGER NOT NULL CHECK (amount >= 0), -- in the currency's smallest unit
    currency       TEXT    NOT NULL,
    status         TEXT    NOT NULL CHECK (status IN ('COMPLETED', 'FAILED')),
    failure        TEXT    CHECK ((failure IS NOT NULL) = (status = 'FAILED')),
    executed_at    INTEGER NOT NULL
) STRICT;

-- A reservation is paid once.
CREATE UNIQUE INDEX payment_paid ON payment (reservation_id) WHERE status = 'COMPLETED';

-- A user's payments, each with the one before it. Rows are only ever appended: if they were ordered by user, a page of
-- this large table would be changed, logged and synced for nearly every payment (benches/growth.rs).
CREATE TABLE payment_history (
    payment_id  INTEGER PRIMARY KEY REFERENCES payment (id),
    user_id     INTEGER NOT NULL,
    previous_id INTEGER, -- NULL: the user's first
    recorded_at INTEGER NOT NULL
) STRICT;

-- Where a user's history begins, at its newest end: small, and changed once for a request.
CREATE TABLE user_history (
    user_id         INTEGER PRIMARY KEY,
    last_payment_id INTEGER NOT NULL REFERENCES payment_history (payment_id)
) STRICT;

-- One row an event, written with its payment: INIT until the publisher has it, then PUBLISHED.
CREATE TABLE outbox (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    payment_id   INTEGER NOT NULL REFERENCES payment (id),
    user_id      INTEGER NOT NULL,
    type         TEXT    NOT NULL CHECK (type IN ('payment.completed', 'payment.failed')),
    traceparent  TEXT,
    status       TEXT    NOT NULL DEFAULT 'INIT' CHECK (status IN ('INIT', 'PUBLISHED')),
    created_at   INTEGER NOT NULL,
    published_at INTEGER CHECK ((published_at IS NOT NULL) = (status = 'PUBLISHED')),
    "partition"  INTEGER, -- NULL with the application publisher
    "offset"     INTEGER
) STRICT;

CREATE UNIQUE INDEX outbox_payment ON outbox (payment_id);

-- What the relay reads: only unpublished rows are in it, so it stays small however large the table.
CREATE INDEX outbox_init ON outbox (id) WHERE status = 'INIT';

-- What is to be told to Slack. Its key is the event's, so a second copy of an event changes nothing.
CREATE TABLE delivery (
    outbox_id       INTEGER PRIMARY KEY REFERENCES outbox (id),
    status          TEXT    NOT NULL DEFAULT 'PENDING' CHECK (status IN ('PENDING', 'DELIVERED')),
    attempts        INTEGER NOT NULL DEFAULT 0,
    created_at      INTEGER NOT NULL,
    next_attempt_at INTEGER NOT NULL,
    delivered_at    INTEGER CHECK ((delivered_at IS NOT NULL) = (status = 'DELIVERED')),
    last_error      TEXT
) STRICT;

CREATE INDEX delivery_pending ON delivery (outbox_id) WHERE status = 'PENDING';

-- What the purge reads.
CREATE INDEX delivery_delivered ON delivery (delivered_at) WHERE status = 'DELIVERED';

-- Records of the topic that are not ours or cannot be read, kept as they came.
CREATE TABLE dead_letter (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    topic       TEXT    NOT NULL,
    "partition" INTEGER NOT NULL,
    "offset"    INTEGER NOT NULL,
    reason      TEXT    NOT NULL,
    "key"       BLOB,
    value       BLOB,
    headers     TEXT    NOT NULL, -- JSON array of [name, value]
    received_at INTEGER NOT NULL,
    UNIQUE (topic, "partition", "offset")
) STRICT;
