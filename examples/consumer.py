#!/usr/bin/env python3
"""Reads payrelay's topic, each event once.

    pip install confluent-kafka
    python3 consumer.py kafka-1:9092

It reads committed records only, so it sees no event of an aborted transaction. A record may still
come twice: after a crash of this program, or with kafka.delivery = "at-least-once". So it stores
each event id (ce_id) in the same transaction as the effect of the event, and drops known ids.
Here the effect is a row in a SQLite file.

It reads both values of kafka.format: the payment id as text, and the payment as JSON.
"""

import json
import signal
import sqlite3
import sys

from confluent_kafka import Consumer, KafkaException

TOPIC = "payment-event"
# Not payment-group: that one is payrelay's own.
GROUP = "payment-report"


def open_database(path):
    database = sqlite3.connect(path)
    database.execute(
        "CREATE TABLE IF NOT EXISTS seen (event_id TEXT PRIMARY KEY, payment_id INTEGER, type TEXT)"
    )
    return database


def handle(database, message):
    """Stores an event, unless it is there. Returns whether it was new."""
    headers = {name: (value or b"").decode() for name, value in message.headers() or []}
    # Another program may have written to the topic.
    if message.value() is None or "ce_id" not in headers:
        return False
    if headers.get("content-type") == "application/json":
        payment = json.loads(message.value())  # Python's integers are exact
        payment_id = payment["payment_id"]
        shown = f"{payment['status']} {payment['amount']} {payment['currency']}"
    else:
        payment_id = int(message.value())
        shown = headers["ce_type"]
    with database:  # one transaction
        inserted = database.execute(
            "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)",
            (headers["ce_id"], payment_id, headers["ce_type"]),
        )
    if inserted.rowcount == 0:
        return False
    print(f"{headers['ce_id']} {shown}", flush=True)
    return True


def main():
    servers = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9092"
    database = open_database(sys.argv[2] if len(sys.argv) > 2 else "seen.db")
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": GROUP,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            # The offset is committed after the event is stored.
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([TOPIC])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            message = consumer.poll(1.0)
            if message is None:
                continue
            if message.error():
                if message.error().fatal():
                    raise KafkaException(message.error())
                print(f"kafka: {message.error()}", file=sys.stderr)
                continue
            handle(database, message)
            consumer.commit(message, asynchronous=True)
    except KeyboardInterrupt:
        pass
    finally:
        consumer.close()


if __name__ == "__main__":
    main()
