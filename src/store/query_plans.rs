//! How SQLite means to run every statement of the hot paths: by index, in order, without sorting
//! (<https://sqlite.org/eqp.html>). The statements are taken down as they run:
//! those of what is called here, whatever they become.

use super::arrival::{self, AcceptOutcome};
use super::backlog::BacklogCounter;
use super::delivery::{Carrier, Outcome};
use super::idempotency::{IdempotentRequest, Once};
use super::publication::{self, Destination, Receipt};
use super::replay::{self, Action, ResolveRequest, Selection};
use super::topic::{self, ConsumeBatch, PublishedOffsets, PublishedRecord, Reconciled};
use super::{
    channel, dead_letter, delivery, idempotency, outbox, payment, relay_action, route, timeline,
    unconsumed, visibility,
};
use crate::domain::event::{EventRef, NodeId};
use crate::domain::payment::{NewPayment, Reservation};
use crate::domain::timestamp::Timestamp;
use crate::domain::topic::Topic;
use rusqlite::trace::{TraceEvent, TraceEventCodes};
use rusqlite::{Connection, Transaction, TransactionBehavior};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

thread_local! {
    static SEEN: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "rusqlite asks for a function of this type"
)]
fn record_statement(event: TraceEvent<'_>) {
    if let TraceEvent::Stmt(_, sql) = event {
        SEEN.with_borrow_mut(|seen| seen.insert(sql.to_owned()));
    }
}

/// What may be walked: indexes that hold only what waits, of which a page is asked for; the routes,
/// the channels and the partitions, which are a handful; the node, which is one row; and SQLite's
/// own table with a row for each AUTOINCREMENT.
const SMALL: [&str; 14] = [
    "outbox_init",
    "delivery_waiting",
    "dead_letter_open",
    "sqlite_sequence",
    "SCAN r",
    "sqlite_autoindex_route_1",
    "SCAN route",
    "SCAN c",
    "SCAN node",
    "SCAN topic_partition",
    "SCAN topic_unseen",
    "SCAN CONSTANT ROW",
    // Its last row.
    "SCAN channel_action",
    // At most as many rows as the limit within.
    "SCAN (subquery-1)",
];

fn uses_index(step: &str) -> bool {
    let walks = step.starts_with("SCAN");
    // An automatic index is a scan and a sort for each execution.
    !step.contains("TEMP B-TREE")
        && !step.contains("AUTOMATIC")
        && (!walks || SMALL.iter().any(|index| step.ends_with(index)))
}

/// A request, its event published and taken from the topic, told, looked at and purged.
fn run_the_hot_paths(connection: &mut Connection) -> rusqlite::Result<()> {
    let now = Timestamp::from_micros(1000);
    let node = NodeId::parse("n").unwrap();
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    let new = NewPayment {
        user_id: 1,
        reservations: vec![Reservation {
            reservation_id: 1,
            seat_price: 1,
        }],
    };
    payment::execute(&tx, &new, "KRW", None, now)?;
    let pay = |key: &str| {
        let keyed = IdempotentRequest {
            client: String::new(),
            key: key.to_owned(),
            body_hash: [0; 32],
        };
        idempotency::execute_once(&tx, &keyed, 1, Duration::from_millis(1), || {
            payment::execute(&tx, &new, "KRW", None, now)
        })
    };
    assert!(
        matches!((pay("first")?, pay("first")?), (Once::Executed(first), Once::Replayed(again)) if first == again)
    );
    assert!(payment::of_reservation(&tx, 1)?.is_some());
    assert_eq!(outbox::unpublished(&tx, 0, 10)?.len(), 2);
    let place = Destination::Topic {
        partition: 0,
        offset: Some(0),
    };
    let receipts = [
        Receipt {
            outbox_id: 1,
            place,
        },
        Receipt {
            outbox_id: 2,
            place: Destination::Delivery,
        },
    ];
    publication::mark_published(&tx, &receipts, now)?;
    arrival::accept(
        &tx,
        EventRef {
            outbox_id: 1,
            payment_id: 1,
            created_at: Some(now),
        },
        now,
    )?;
    arrival::accept(
        &tx,
        EventRef {
            outbox_id: 9,
            payment_id: 9,
            created_at: Some(now),
        },
        now,
    )?;
    let topic = Topic {
        name: "t".into(),
        id: [0; 16],
    };
    let found = PublishedRecord {
        notice: EventRef {
            outbox_id: 1,
            payment_id: 1,
            created_at: Some(now),
        },
        partition: 0,
        offset: 0,
    };
    let reached = PublishedOffsets {
        topic: topic.clone(),
        offsets: [(0, 1)].into(),
    };
    assert_eq!(
        topic::reconcile(&tx, &[found], &reached, now)?,
        Reconciled::default()
    );
    look_at_what_is_visible(&tx, &topic, &receipts)?;
    let mut batch = ConsumeBatch::begin(&tx, &topic)?;
    batch.add(0, 3, Some((2, AcceptOutcome::Accepted)));
    batch.finish(1)?;
    assert_eq!(topic::partitions(&tx, &topic)?[0].consumed_to, Some(4));
    topic::set_positions(&tx, &topic, &[(0, 5)])?;
    assert_eq!(topic::partitions_by_name(&tx, "t")?[0].consumed_to, Some(5));
    assert!(delivery::more_than(&tx, "default", 1)?);
    assert_eq!(delivery::waiting(&tx, "default", 10)?.len(), 2);
    assert_eq!(
        BacklogCounter::new(&["default".to_owned()])
            .count(&tx)?
            .undelivered()
            .count,
        2
    );
    assert!(!unconsumed::is_behind(&tx)?);
    assert_eq!(unconsumed::count(&tx)?.count, 0);
    assert_eq!(unconsumed::backfill(&tx, Some(&topic), &[1], now)?, 0);
    delivery::mark_sending(&tx, &[1, 2])?;
    let settle = |outcome| delivery::settle(&tx, "default", 9, &outcome, 10, now);
    assert_eq!(settle(Outcome::Requeued)?, 2);
    assert_eq!(delivery::begin_sending(&tx, "default", 0, 10)?.len(), 2);
    assert_eq!(settle(Outcome::Unknown("no".to_owned()))?, 2);
    let asked = channel::ask(&tx, "default", &channel::Action::Resume, "test", now)?;
    assert_eq!(
        (
            channel::last_action(&tx)?,
            channel::next_action(&tx, "default", asked)?
        ),
        (asked, None)
    );
    channel::finish(&tx, asked, "resumed")?;
    delivery::bury(&tx, 2, Some("poison"), now)?;
    let order = ResolveRequest {
        action: Action::Replay,
        which: Selection::Open { after: 0, limit: 9 },
        dry_run: false,
        node: &node,
        origin: "",
        now,
    };
    assert_eq!(replay::resolve(&tx, order)?.len(), 1);
    assert_eq!(
        (
            dead_letter::list(&tx, true, 0, 9)?.len(),
            dead_letter::list(&tx, false, 0, 9)?.len()
        ),
        (0, 1)
    );
    delivery::mark_delivered(&tx, &[1, 2], Carrier::Single, now)?;
    assert!(timeline::find(&tx, 1)?.is_some());
    assert_eq!(
        payment::history(&tx, 1, Some(2), 10)?.map(|page| page.len()),
        Some(1)
    );
    assert_eq!(outbox::purge(&tx, Timestamp::from_micros(2000), 10)?, 2);
    assert!(matches!(pay("second")?, Once::Executed(_)));
    assert_eq!(idempotency::purge(&tx, Duration::from_millis(2), 1, 10)?, 1);
    assert_eq!(dead_letter::open_records(&tx)?, 0);
    dead_letter::drop_records(&tx, 1)?;
    assert_eq!(dead_letter::purge(&tx, now, 10)?, 0);
    // Each start does this, with millions of rows that are finished.
    delivery::recover(&tx)?;
    route::replace(&tx, &[])?;
    assert!(!topic::abandon_others(&tx, Some(&topic))?);
    tx.commit()
}

fn look_at_what_is_visible(
    tx: &Transaction<'_>,
    topic: &Topic,
    receipts: &[Receipt],
) -> rusqlite::Result<()> {
    visibility::note(tx, topic, receipts)?;
    assert!(visibility::is_any_unseen(tx)?);
    let noted = visibility::unseen(tx, topic)?;
    visibility::saw(tx, topic, &[(0, noted.first().copied())].into())?;
    let requeued = visibility::requeue_hidden(tx, &noted, &[(0, 0..9)].into(), &[1].into())?;
    assert_eq!(requeued, 0);
    visibility::saw(tx, topic, &[(0, None)].into())?;
    outbox::renumber(tx, 1 << 50)?;
    assert_eq!(relay_action::last_resume(tx)?, 0);
    Ok(())
}

#[test]
fn no_hot_statement_scans_or_sorts() {
    let dir = tempfile::tempdir().unwrap();
    let (mut connection, _) =
        crate::store::engine::open::open(&dir.path().join("a.db"), None).unwrap();
    connection.trace_v2(TraceEventCodes::SQLITE_TRACE_STMT, Some(record_statement));
    run_the_hot_paths(&mut connection).unwrap();
    connection.trace_v2(TraceEventCodes::empty(), None);
    let seen = SEEN.take();
    let statements: Vec<_> = seen.iter().filter(|sql| !sql.starts_with("--")).collect();
    assert!(statements.len() > 20, "{statements:#?}");
    let mut uses_payment_paid = false;
    for sql in statements {
        let mut explain = connection
            .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
            .unwrap();
        let parameters = explain.parameter_count();
        let steps = explain
            .query_map(rusqlite::params_from_iter(vec![1_i64; parameters]), |row| {
                row.get(3)
            })
            .unwrap();
        for step in steps {
            let step: String = step.unwrap();
            assert!(uses_index(&step), "{sql}\n  {step}");
            uses_payment_paid |= step.contains("payment_paid");
        }
    }
    assert!(uses_payment_paid, "which payment has paid a reservation");
}

#[test]
fn what_is_slow_is_told() {
    for step in [
        "SCAN outbox",
        "SCAN d USING INDEX delivery_delivered",
        "USE TEMP B-TREE FOR ORDER BY",
    ] {
        assert!(!uses_index(step), "{step}");
    }
    assert!(uses_index("SCAN outbox USING COVERING INDEX outbox_init"));
}
