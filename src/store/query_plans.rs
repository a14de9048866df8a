//! The query plan of every statement of the hot paths: by index, in order, without sorting
//! (<https://sqlite.org/eqp.html>). The test records the statements as they run.

use super::action_watch::ActionWatch;
use super::arrival::{self, AcceptOutcome};
use super::backlog::BacklogCounter;
use super::consume_batch::ConsumeBatch;
use super::dead_letter::DeadLetterFilter;
use super::dead_letter_action::{self, DeadLetterAction, DeadLetterRequest, Selection};
use super::delivery::{Carrier, DeliveryOutcome};
use super::gauges::read_stored_gauges;
use super::idempotency::{IdempotentOutcome, IdempotentRequest};
use super::operation::{self, Operation, OperationOutcome, OperationRecord};
use super::outbox_view::{self, OutboxFilter};
use super::payment::HistoryPage;
use super::publication::{self, Destination, Receipt};
use super::relay_action::{self, RelayAction};
use super::takings::{self, TakingsFilter};
use super::topic::{self, PublishedOffsets, PublishedRecord, Reconciled};
use super::{
    channel_action, dead_letter, delivery, idempotency, outbox, payment, route, timeline,
    unconsumed, unseen,
};
use crate::domain::event::EventRef;
use crate::domain::node_id::NodeId;
use crate::domain::payment::{NewPayment, Reservation};
use crate::domain::payment_record::RecordFormat;
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
fn record_query_statement(event: TraceEvent<'_>) {
    if let TraceEvent::Stmt(_, sql) = event {
        SEEN.with_borrow_mut(|seen| seen.insert(sql.to_owned()));
    }
}

/// What may be scanned because it is small, or because a statement reads a page of it. Of the
/// indexes of waiting rows a page is read. The routes, the channels and the partitions are a
/// handful. The node is one row, and `sqlite_sequence` has a row for each AUTOINCREMENT.
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

fn plan_step_uses_index(step: &str) -> bool {
    let scans = step.starts_with("SCAN");
    // An automatic index is a scan and a sort for each execution.
    !step.contains("TEMP B-TREE")
        && !step.contains("AUTOMATIC")
        && (!scans || SMALL.iter().any(|index| step.ends_with(index)))
}

fn plan_event(id: i64) -> EventRef {
    EventRef {
        outbox_id: id,
        payment_id: id,
        created_at: Some(NOW),
    }
}

const NOW: Timestamp = Timestamp::from_micros(1000);

/// Two payments, from the request to the purge.
fn record_query_plans(connection: &mut Connection) -> rusqlite::Result<()> {
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    let topic = Topic {
        name: "t".into(),
        id: [0; 16],
    };
    plan_executing_payments(&tx)?;
    plan_publishing(&tx, &topic)?;
    plan_consuming(&tx, &topic)?;
    plan_delivering(&tx)?;
    plan_acting_on_dead_letter(&tx)?;
    delivery::mark_deliveries_delivered(&tx, &[1, 2], Carrier::Single, NOW)?;
    plan_showing(&tx)?;
    plan_purging(&tx)?;
    // Each start does this, with millions of finished rows.
    delivery::recover_deliveries(&tx)?;
    route::replace_routes(&tx, &[])?;
    assert!(!topic::abandon_other_topics(&tx, Some(&topic))?);
    tx.commit()
}

fn plan_paying(tx: &Transaction<'_>, key: &str) -> rusqlite::Result<IdempotentOutcome> {
    let keyed = IdempotentRequest {
        client: String::new(),
        key: key.to_owned(),
        body_hash: [0; 32],
    };
    idempotency::execute_once_per_key(tx, &keyed, 1, Duration::from_millis(1), || {
        payment::execute_payments(tx, &plan_payment(), "KRW", None, NOW)
    })
}

fn plan_payment() -> NewPayment {
    NewPayment {
        user_id: 1,
        reservations: vec![Reservation {
            reservation_id: 1,
            seat_price: 1,
        }],
    }
}

fn plan_executing_payments(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    payment::execute_payments(tx, &plan_payment(), "KRW", None, NOW)?;
    let first = plan_paying(tx, "first")?;
    let again = plan_paying(tx, "first")?;
    let (IdempotentOutcome::Executed(first), IdempotentOutcome::Replayed(again)) = (first, again)
    else {
        panic!("the second request is a replay of the first");
    };
    assert_eq!(first, again);
    assert!(payment::find_payment_of_reservation(tx, 1)?.is_some());
    for format in RecordFormat::ALL {
        let events = outbox::unpublished_outbox_events(tx, 0, 10, *format)?;
        assert_eq!(events.len(), 2);
    }
    Ok(())
}

fn plan_publishing(tx: &Transaction<'_>, topic: &Topic) -> rusqlite::Result<()> {
    let receipts = [
        Receipt {
            outbox_id: 1,
            place: Destination::Topic {
                partition: 0,
                offset: Some(0),
            },
        },
        Receipt {
            outbox_id: 2,
            place: Destination::Delivery,
        },
    ];
    publication::record_publications(tx, &receipts, NOW)?;
    arrival::accept_arrival(tx, plan_event(1), NOW)?;
    arrival::accept_arrival(tx, plan_event(9), NOW)?;
    let found = PublishedRecord {
        notice: plan_event(1),
        partition: 0,
        offset: 0,
    };
    let published = PublishedOffsets {
        topic: topic.clone(),
        offsets: [(0, 1)].into(),
        last_published: 1,
    };
    let reconciled = topic::reconcile_topic(tx, &[found], &published, NOW)?;
    assert_eq!(reconciled, Reconciled::default());
    plan_unseen_events(tx, topic, &receipts)
}

fn plan_consuming(tx: &Transaction<'_>, topic: &Topic) -> rusqlite::Result<()> {
    let mut batch = ConsumeBatch::begin(tx, topic)?;
    batch.add(0, 3, Some((2, AcceptOutcome::Accepted)));
    batch.finish(1)?;
    assert_eq!(topic::topic_partitions(tx, topic)?[0].consumed_to, Some(4));
    topic::set_topic_positions(tx, topic, &[(0, 5)])?;
    assert_eq!(
        topic::topic_partitions_by_name(tx, "t")?[0].consumed_to,
        Some(5)
    );
    assert!(!unconsumed::is_unconsumed_mark_behind(tx)?);
    assert_eq!(unconsumed::count_unconsumed(tx)?.count, 0);
    assert_eq!(
        unconsumed::backfill_unconsumed(tx, Some(topic), &[1], NOW)?,
        0
    );
    Ok(())
}

fn plan_delivering(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    assert!(delivery::has_more_deliveries_than(tx, "default", 1)?);
    assert_eq!(delivery::pending_deliveries(tx, "default", 10)?.len(), 2);
    assert_eq!(delivery::unsent_deliveries(tx, "default", 10)?.len(), 2);
    let backlog = BacklogCounter::new(&["default".to_owned()]).count(tx)?;
    assert_eq!(backlog.undelivered().count, 2);
    delivery::mark_deliveries_sending(tx, &[1, 2])?;
    let save = |outcome| delivery::save_delivery_outcomes(tx, "default", 9, &outcome, 10, NOW);
    assert_eq!(save(DeliveryOutcome::Requeued)?, 2);
    assert_eq!(
        delivery::begin_sending_deliveries(tx, "default", 0, 10)?.len(),
        2
    );
    assert_eq!(save(DeliveryOutcome::Unknown("no".to_owned()))?, 2);
    let action = channel_action::request_channel_action(
        tx,
        "default",
        &channel_action::ChannelAction::Resume(None),
        "test",
        NOW,
    )?;
    assert_eq!(channel_action::last_channel_action(tx)?, action);
    assert_eq!(
        channel_action::next_channel_action(tx, "default", action)?,
        None
    );
    channel_action::finish_channel_action(tx, action, "resumed")
}

fn plan_acting_on_dead_letter(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    delivery::mark_delivery_dead(tx, 2, Some("poison"), NOW)?;
    let request = DeadLetterRequest {
        action: DeadLetterAction::Replay,
        which: Selection::Open { after: 0, limit: 9 },
        dry_run: false,
        node: &NodeId::parse("n").unwrap(),
        origin: "http",
        reason: None,
        now: NOW,
    };
    assert_eq!(
        dead_letter_action::act_on_dead_letters(tx, request)?.len(),
        1
    );
    assert_eq!(
        dead_letter::list_dead_letters(tx, DeadLetterFilter::Open, 0, 9)?.len(),
        0
    );
    assert_eq!(
        dead_letter::list_dead_letters(tx, DeadLetterFilter::All, 0, 9)?.len(),
        1
    );
    Ok(())
}

fn plan_showing(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    assert!(timeline::find_payment_timeline(tx, 1)?.is_some());
    let page = payment::payment_history(tx, 1, Some(2), 10)?;
    assert!(matches!(page, HistoryPage::Payments(page) if page.len() == 1));
    let filter = TakingsFilter {
        since: Timestamp::from_micros(0),
        until: Timestamp::from_micros(2000),
        status: None,
    };
    assert_eq!(takings::payments_of_time(tx, filter, 0, 10)?.len(), 2);
    let node = NodeId::parse("n").unwrap();
    let waiting = outbox_view::list_outbox_events(tx, &node, OutboxFilter::Init, 0, 10)?;
    assert_eq!(waiting.len(), 0);
    let mut actions = ActionWatch::default();
    actions.look(tx)?;
    let gauges = read_stored_gauges(tx, Some("t"))?;
    assert_eq!(gauges.partitions.len(), 1);
    assert_eq!(payment::last_payment_time(tx)?, Some(NOW));
    let record = OperationRecord {
        ended_at: NOW,
        origin: "local".to_owned(),
    };
    let outcome = OperationOutcome::Succeeded;
    for operation in Operation::ALL {
        operation::record_operation(tx, *operation, outcome, None, &record)?;
    }
    assert!(operation::last_backup(tx)?.is_some() && operation::last_audit(tx)?.is_some());
    relay_action::record_relay_action(tx, RelayAction::Wake, "local", Some("why"), NOW)?;
    Ok(())
}

fn plan_purging(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    assert_eq!(
        outbox::purge_outbox(tx, Timestamp::from_micros(2000), 10)?,
        2
    );
    assert!(matches!(
        plan_paying(tx, "second")?,
        IdempotentOutcome::Executed(_)
    ));
    assert_eq!(
        idempotency::purge_idempotency_keys(tx, Duration::from_millis(2), 1, 10)?,
        1
    );
    assert_eq!(dead_letter::count_open_dead_records(tx)?, 0);
    dead_letter::count_dropped_dead_records(tx, 1)?;
    assert_eq!(dead_letter::purge_dead_letters(tx, NOW, 10)?, 0);
    Ok(())
}

fn plan_unseen_events(
    tx: &Transaction<'_>,
    topic: &Topic,
    receipts: &[Receipt],
) -> rusqlite::Result<()> {
    unseen::note_unseen(tx, topic, receipts)?;
    assert!(unseen::has_unseen(tx)?);
    let noted = unseen::unseen_of_topic(tx, topic)?;
    unseen::shorten_unseen(tx, topic, &[(0, noted.first().copied())].into())?;
    let requeued = unseen::requeue_unseen(tx, &noted, &[(0, 0..9)].into(), &[1].into())?;
    assert_eq!(requeued, 0);
    unseen::shorten_unseen(tx, topic, &[(0, None)].into())?;
    outbox::renumber_outbox(tx, 1 << 50)?;
    assert_eq!(relay_action::last_relay_resume(tx)?, 0);
    Ok(())
}

#[test]
fn no_query_plan_of_a_hot_path_scans_or_sorts() {
    let dir = tempfile::tempdir().unwrap();
    let (mut connection, _) =
        crate::store::engine::open::open_database(&dir.path().join("a.db"), None).unwrap();
    connection.trace_v2(
        TraceEventCodes::SQLITE_TRACE_STMT,
        Some(record_query_statement),
    );
    record_query_plans(&mut connection).unwrap();
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
            assert!(plan_step_uses_index(&step), "{sql}\n  {step}");
            uses_payment_paid |= step.contains("payment_paid");
        }
    }
    assert!(uses_payment_paid, "the index of paid reservations is used");
}

#[test]
fn slow_steps_of_a_query_plan_are_recognized() {
    for step in [
        "SCAN outbox",
        "SCAN d USING INDEX delivery_delivered",
        "USE TEMP B-TREE FOR ORDER BY",
    ] {
        assert!(!plan_step_uses_index(step), "{step}");
    }
    assert!(plan_step_uses_index(
        "SCAN outbox USING COVERING INDEX outbox_init"
    ));
}
