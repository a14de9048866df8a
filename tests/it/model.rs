//! The store against a plain model: random jobs, alone and many in one commit, jobs that fail,
//! crashes between and in the midst of them. After each step all that can be seen of the store is
//! what the model says.
//!
//! A crash is a copy of the database file and its log as they lie on the disk while the store
//! works. What was answered before must be in it; of the jobs in progress the first ones,
//! whole.
//!
//! `PAYRELAY_MODEL_CASES=2000 cargo test --test it model::` is the long form. What was found once
//! is tried first, from proptest-regressions/model.txt.

mod reference;

use std::env;
use std::ops::RangeInclusive;
use std::process::Command;
use std::time::Duration;

use payrelay::config::Route;
use payrelay::domain::event::{Event, EventRef};
use payrelay::domain::node_id::NodeId;
use payrelay::domain::payment::{NewPayment, Payment, Reservation, Status};
use payrelay::domain::payment_record::RecordFormat;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::arrival::{self, AcceptOutcome};
use payrelay::store::backlog::{Backlog, BacklogCounter};
use payrelay::store::dead_letter::{self, DeadLetterFilter, DeadRecord};
use payrelay::store::dead_letter_action::{
    self, DeadLetterAction, DeadLetterOutcome, DeadLetterRequest, Selection,
};
use payrelay::store::delivery::{self, Carrier, DeliveryOutcome, PendingDelivery};
use payrelay::store::outbox;
use payrelay::store::payment::{self, HistoryPage};
use payrelay::store::publication::{self, Destination, Receipt};
use payrelay::store::timeline::{self, PaymentTimeline};
use payrelay::store::waiting;
use payrelay::store::{PendingWrite, SqlResult, Store, Transaction, route};
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};
use serde_json::Value;

use self::reference::Model;
use testkit::random::proptest_config;
use testkit::store::Database;

const USERS: std::ops::Range<i64> = 0..3;
const CURRENCY: &str = "KRW";
const TOPIC: &str = "payment-event";
const ORIGIN: &str = "http";

/// The payments of a page that has a beginning.
fn history_page(page: HistoryPage) -> Vec<Payment> {
    match page {
        HistoryPage::Payments(payments) => payments,
        HistoryPage::NotOfUser => panic!("it does not continue from its own payment"),
    }
}

/// How many cases are tried where the environment does not say.
const CASES: u32 = 24;

/// What the writer is asked to do.
#[derive(Debug, Clone)]
enum Job {
    Pay(NewPayment),
    Publish(Vec<Receipt>),
    Accept(EventRef),
    Send(Vec<i64>),
    Release(Vec<i64>),
    Deliver(Vec<i64>),
    Fail {
        ids: Vec<i64>,
        error: String,
        unknown: bool,
    },
    Recover,
    Bury {
        id: i64,
        reason: Option<String>,
    },
    Keep {
        offset: i64,
        event_id: Option<String>,
        value: Option<Vec<u8>>,
    },
    Act {
        action: DeadLetterAction,
        which: Selection,
        dry_run: bool,
    },
    Route(Vec<Route>),
    Purge {
        cutoff: Timestamp,
        limit: usize,
    },
    /// Pays, and then fails.
    Spoil(NewPayment),
}

/// What comes of it.
#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Done,
    Count(usize),
    Payments(Vec<Payment>),
    Arrival(AcceptOutcome),
    Outcomes(Vec<DeadLetterOutcome>),
    Refused,
}

/// All that can be seen of a store.
#[derive(Debug, PartialEq)]
struct View {
    ways: Vec<Option<PaymentTimeline>>,
    histories: Vec<(i64, Vec<Payment>)>,
    unpublished: Vec<Event>,
    channels: Vec<ChannelView>,
    backlog: Backlog,
    /// Their names say which they are.
    routes: Vec<String>,
    /// The largest ids that were ever given.
    sequences: Vec<i64>,
    letters: Vec<Value>,
}

#[derive(Debug, PartialEq)]
struct ChannelView {
    channel: String,
    waiting: Vec<PendingDelivery>,
    more: Vec<bool>,
}

/// The one place where the model's jobs become calls of the store.
fn run(job: &Job, tx: &Transaction<'_>, node: &NodeId, now: Timestamp) -> SqlResult<Answer> {
    let done = |result: SqlResult<()>| result.map(|()| Answer::Done);
    let outcome = |ids: &[i64], outcome: DeliveryOutcome| {
        done(delivery::record_delivery_outcome(tx, ids, &outcome, now))
    };
    match job {
        Job::Pay(new) => {
            payment::execute_payments(tx, new, CURRENCY, None, now).map(Answer::Payments)
        }
        Job::Publish(receipts) => done(publication::record_publications(tx, receipts, now)),
        Job::Accept(notice) => arrival::accept_arrival(tx, *notice, now).map(Answer::Arrival),
        Job::Send(ids) => done(delivery::mark_deliveries_sending(tx, ids)),
        Job::Release(ids) => outcome(ids, DeliveryOutcome::Requeued),
        Job::Deliver(ids) => done(delivery::mark_deliveries_delivered(
            tx,
            ids,
            Carrier::Single,
            now,
        )),
        Job::Fail {
            ids,
            error,
            unknown: true,
        } => outcome(ids, DeliveryOutcome::Unknown(error.clone())),
        Job::Fail {
            ids,
            error,
            unknown: false,
        } => outcome(ids, DeliveryOutcome::Failed(error.clone())),
        Job::Recover => delivery::recover_deliveries(tx).map(Answer::Count),
        Job::Bury { id, reason } => done(delivery::mark_delivery_dead(
            tx,
            *id,
            reason.as_deref(),
            now,
        )),
        Job::Keep {
            offset,
            event_id,
            value,
        } => {
            let record = dead_record(*offset, event_id.as_ref(), value.as_ref());
            done(dead_letter::insert_dead_record(tx, &record, now))
        }
        Job::Act {
            action,
            which,
            dry_run,
        } => {
            let request = DeadLetterRequest {
                action: *action,
                which: *which,
                dry_run: *dry_run,
                node,
                origin: ORIGIN,
                reason: None,
                now,
            };
            dead_letter_action::act_on_dead_letters(tx, request).map(Answer::Outcomes)
        }
        Job::Route(routes) => done(route::replace_routes(tx, routes)),
        Job::Purge { cutoff, limit } => {
            outbox::purge_outbox(tx, *cutoff, *limit).map(Answer::Count)
        }
        Job::Spoil(new) => {
            payment::execute_payments(tx, new, CURRENCY, None, now)?;
            done(tx.execute_batch("INSERT INTO nowhere VALUES (1)"))
        }
    }
}

fn dead_record(offset: i64, event_id: Option<&String>, value: Option<&Vec<u8>>) -> DeadRecord {
    DeadRecord {
        topic: TOPIC.to_owned(),
        partition: 0,
        offset,
        written_at_ms: 1,
        reason: "kept".to_owned(),
        key: None,
        value: value.cloned(),
        headers: event_id
            .map(|id| ("ce_id".to_owned(), Some(id.clone())))
            .into_iter()
            .collect(),
    }
}

fn unpublished(
    connection: &payrelay::store::Connection,
    after: i64,
    limit: usize,
) -> SqlResult<Vec<Event>> {
    outbox::unpublished_outbox_events(connection, after, limit, RecordFormat::Id)
}

fn view(store: &Store, model: &Model) -> View {
    let look = |connection: &payrelay::store::Connection| -> SqlResult<View> {
        let mut ways = Vec::new();
        loop {
            ways.push(timeline::find_payment_timeline(
                connection,
                i64::try_from(ways.len()).unwrap() + 1,
            )?);
            if ways.last().is_some_and(Option::is_none) {
                break;
            }
        }
        let history = |user| {
            Ok((
                user,
                history_page(payment::payment_history(
                    connection,
                    user,
                    None,
                    usize::MAX,
                )?),
            ))
        };
        let channel = |channel: String| {
            Ok(ChannelView {
                waiting: delivery::pending_deliveries(connection, &channel, usize::MAX)?,
                more: (0..4)
                    .map(|n| delivery::has_more_deliveries_than(connection, &channel, n))
                    .collect::<SqlResult<_>>()?,
                channel,
            })
        };
        let given = |table| {
            let sql = "SELECT seq FROM sqlite_sequence WHERE name = ?1 AND seq > 0";
            connection
                .prepare_cached(sql)?
                .query_map([table], |row| row.get(0))?
                .collect::<SqlResult<Vec<i64>>>()
        };
        let letters =
            dead_letter::list_dead_letters(connection, DeadLetterFilter::All, 0, usize::MAX)?;
        Ok(View {
            ways,
            histories: USERS.map(history).collect::<SqlResult<_>>()?,
            unpublished: unpublished(connection, 0, usize::MAX)?,
            channels: model
                .channels()
                .into_iter()
                .map(channel)
                .collect::<SqlResult<_>>()?,
            // Which events the consumer has to bring is not part of the model.
            backlog: Backlog {
                unconsumed: waiting::Waiting::default(),
                ..BacklogCounter::new(&model.channels()).count(connection)?
            },
            routes: connection
                .prepare_cached("SELECT channel FROM route ORDER BY position")?
                .query_map([], |row| row.get(0))?
                .collect::<SqlResult<_>>()?,
            sequences: [given("payment")?, given("outbox")?, given("dead_letter")?].concat(),
            letters: letters
                .iter()
                .map(|letter| serde_json::to_value(letter).unwrap())
                .collect(),
        })
    };
    store.read(look).expect("the store can be read")
}

/// Pages of a history, of what is unpublished and of the open letters are slices of the whole.
fn assert_pages(store: &Store, model: &Model, whole: &View) {
    let read = |connection: &payrelay::store::Connection| -> SqlResult<()> {
        for (user, payments) in &whole.histories {
            let mut pages = Vec::new();
            let mut before = None;
            loop {
                let page = history_page(payment::payment_history(connection, *user, before, 2)?);
                let Some(last) = page.last() else { break };
                before = Some(last.id);
                pages.extend(page);
            }
            assert_eq!(&pages, payments, "user {user}, in pages of two");
            let foreign = whole
                .ways
                .iter()
                .flatten()
                .find(|way| way.payment.user_id != *user);
            if let Some(way) = foreign {
                assert_eq!(
                    payment::payment_history(connection, *user, Some(way.payment.id), 2)?,
                    HistoryPage::NotOfUser
                );
            }
        }
        let after = model.last_event() / 2;
        let rest: Vec<_> = whole
            .unpublished
            .iter()
            .filter(|event| event.outbox_id > after)
            .take(3)
            .cloned()
            .collect();
        assert_eq!(unpublished(connection, after, 3)?, rest);
        let open = dead_letter::list_dead_letters(connection, DeadLetterFilter::Open, 1, 2)?;
        let open: Vec<_> = open
            .iter()
            .map(|letter| serde_json::to_value(letter).unwrap())
            .collect();
        let expected = whole
            .letters
            .iter()
            .filter(|letter| letter["state"] == "OPEN" && letter["id"] != 1);
        assert_eq!(open, expected.take(2).cloned().collect::<Vec<_>>());
        Ok(())
    };
    store.read(read).expect("the store can be read");
}

/// A job before it is known what is there: numbers choose among that.
#[derive(Debug, Clone)]
enum Wish {
    Pay {
        user: i64,
        reservations: Vec<(i64, i64)>,
    },
    PublishNext {
        count: usize,
        to: To,
    },
    PublishAny {
        picks: Vec<u8>,
        to: To,
    },
    Accept {
        pick: u8,
        of_another: bool,
    },
    Send(Vec<u8>),
    Release(Vec<u8>),
    Deliver(Vec<u8>),
    Fail {
        picks: Vec<u8>,
        unknown: bool,
    },
    Recover,
    Bury {
        pick: u8,
        reason: bool,
    },
    Keep {
        offset: i64,
        what: Kept,
    },
    Act {
        discard: bool,
        one: Option<u8>,
        dry_run: bool,
    },
    Route(u8),
    Purge {
        age_s: u64,
        limit: usize,
    },
    Spoil {
        user: i64,
        reservation: i64,
    },
}

#[derive(Debug, Clone, Copy)]
enum To {
    Application,
    Topic { reports_offset: bool },
    Nowhere,
}

#[derive(Debug, Clone, Copy)]
enum Kept {
    Ours { pick: u8, of_another: bool },
    NotOwnEvent,
    NoId,
    NoText,
}

#[derive(Debug, Clone)]
enum Step {
    /// Jobs at once; each some seconds after the one before, or before it.
    Jobs(Vec<(Wish, i8)>),
    /// The process ends while these are in progress; the store that is opened then is the copy.
    Crash(Vec<(Wish, i8)>),
    /// An orderly stop, and a start.
    Restart,
}

fn wish() -> impl Strategy<Value = Wish> {
    let picks = || proptest::collection::vec(any::<u8>(), 1..4);
    let to = prop_oneof![
        Just(To::Application),
        any::<bool>().prop_map(|reports_offset| To::Topic { reports_offset }),
        Just(To::Nowhere),
    ];
    let kept = prop_oneof![
        4 => (any::<u8>(), any::<bool>())
            .prop_map(|(pick, of_another)| Kept::Ours { pick, of_another }),
        1 => Just(Kept::NotOwnEvent),
        1 => Just(Kept::NoId),
        1 => Just(Kept::NoText),
    ];
    let reservations = proptest::collection::vec((0..12_i64, 0..5_i64), 1..4);
    prop_oneof![
        8 => (USERS, reservations)
            .prop_map(|(user, reservations)| Wish::Pay { user, reservations }),
        5 => (1..5_usize, to.clone()).prop_map(|(count, to)| Wish::PublishNext { count, to }),
        1 => (picks(), to).prop_map(|(picks, to)| Wish::PublishAny { picks, to }),
        5 => (any::<u8>(), proptest::bool::weighted(0.2))
            .prop_map(|(pick, of_another)| Wish::Accept { pick, of_another }),
        3 => picks().prop_map(Wish::Send),
        1 => picks().prop_map(Wish::Release),
        5 => picks().prop_map(Wish::Deliver),
        2 => (picks(), any::<bool>()).prop_map(|(picks, unknown)| Wish::Fail { picks, unknown }),
        1 => Just(Wish::Recover),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(pick, reason)| Wish::Bury { pick, reason }),
        2 => (0..4_i64, kept).prop_map(|(offset, what)| Wish::Keep { offset, what }),
        4 => (proptest::bool::weighted(0.3), any::<Option<u8>>(), proptest::bool::weighted(0.3))
            .prop_map(|(discard, one, dry_run)| Wish::Act { discard, one, dry_run }),
        1 => any::<u8>().prop_map(Wish::Route),
        2 => (0..60_u64, 0..5_usize).prop_map(|(age_s, limit)| Wish::Purge { age_s, limit }),
        1 => (USERS, 0..12_i64).prop_map(|(user, reservation)| Wish::Spoil { user, reservation }),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let jobs = |count: RangeInclusive<usize>| proptest::collection::vec((wish(), -2..20_i8), count);
    let step = prop_oneof![
        20 => jobs(1..=1).prop_map(Step::Jobs),
        6 => jobs(2..=6).prop_map(Step::Jobs),
        2 => jobs(0..=5).prop_map(Step::Crash),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..50)
}

/// A store, and what it is to be.
struct Pair {
    /// `None` only between two stores.
    database: Option<Database>,
    model: Model,
    now: Timestamp,
}

impl Pair {
    fn new() -> Self {
        let database = Database::open();
        let model = Model::new(database.store().node().clone());
        Self {
            database: Some(database),
            model,
            now: Timestamp::from_micros(1_795_341_600_000_000),
        }
    }

    fn database(&self) -> &Database {
        self.database.as_ref().expect("a store is open")
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Jobs(wishes) => {
                let begun = self.begin(wishes);
                self.finish(begun);
            }
            Step::Crash(wishes) => self.crash(wishes),
            Step::Restart => {
                let dir = self.database.take().expect("a store is open").close();
                self.database = Some(Database::open_in(dir));
            }
        }
        self.assert_equal();
    }

    /// Hands jobs over; what each is to answer, and the model after it.
    fn begin(&mut self, wishes: Vec<(Wish, i8)>) -> Vec<Begun> {
        let mut begun = Vec::new();
        for (wish, later) in wishes {
            // The clock may go back, but never stands: so no order is left to chance.
            let step = i64::from(later) * 1_000_000 + 1;
            self.now = Timestamp::from_micros(self.now.as_micros() + step);
            let job = self.resolve(wish);
            let now = self.now;
            let expected = self.model.apply(&job, now);
            let node = self.model.node().clone();
            let shown = format!("{job:?}");
            let work = move |tx: &Transaction<'_>| run(&job, tx, &node, now);
            let writing = self
                .database()
                .store()
                .begin_write(work)
                .expect("the store is open");
            begun.push(Begun {
                shown,
                expected,
                writing,
                after: self.model.clone(),
            });
        }
        begun
    }

    fn finish(&self, begun: Vec<Begun>) {
        for Begun {
            shown,
            expected,
            writing,
            ..
        } in begun
        {
            let answer = writing.wait().unwrap_or(Answer::Refused);
            assert_eq!(answer, expected, "{shown} at {}", self.now);
        }
    }

    /// The copy has what was answered before, and the first ones of those in progress.
    fn crash(&mut self, wishes: Vec<(Wish, i8)>) {
        let before = self.model.clone();
        let begun = self.begin(wishes);
        let copy = tempfile::tempdir().expect("the machine has space for a folder");
        // By another process: closing the file in this one would drop SQLite's locks on it.
        let path = self.database().path();
        let log = path.with_extension("db-wal");
        let status = Command::new("cp")
            .args([&path, &log])
            .arg(copy.path())
            .status()
            .expect("there is a cp");
        assert!(status.success(), "cp: {status}");
        let mut candidates = vec![before];
        candidates.extend(begun.iter().map(|one| one.after.clone()));
        self.finish(begun);
        drop(self.database.take());
        let database = Database::open_in(copy);
        let views: Vec<_> = candidates
            .iter()
            .map(|model| (view(database.store(), model), model.view()))
            .collect();
        // Those that look the same are the same: all that a model has is in its view.
        let survived = views
            .iter()
            .rposition(|(found, expected)| found == expected);
        let count = candidates.len() - 1;
        let Some(survived) = survived else {
            panic!(
                "after a crash with {count} jobs in progress nothing fits:\n{:#?}\nwas:\n{:#?}",
                views[0].0, views[0].1
            );
        };
        self.model = candidates.swap_remove(survived);
        self.database = Some(database);
    }

    fn assert_equal(&self) {
        let found = view(self.database().store(), &self.model);
        let expected = self.model.view();
        assert_eq!(found.ways, expected.ways, "payments");
        assert_eq!(found.histories, expected.histories, "histories");
        assert_eq!(found.unpublished, expected.unpublished, "unpublished");
        assert_eq!(found.channels, expected.channels, "channels");
        assert_eq!(found.backlog, expected.backlog, "backlog");
        assert_eq!(
            (&found.routes, &found.sequences),
            (&expected.routes, &expected.sequences),
            "routes, largest ids"
        );
        assert_eq!(found.letters, expected.letters, "letters");
        assert_pages(self.database().store(), &self.model, &found);
    }

    /// Chooses among what is there now, and a little beyond it.
    fn resolve(&self, wish: Wish) -> Job {
        match wish {
            Wish::Pay { user, reservations } => Job::Pay(new_payment(user, reservations)),
            Wish::PublishNext { count, to } => self.publish_next(count, to),
            Wish::PublishAny { picks, to } => self.publish_any(picks, to),
            Wish::Accept { pick, of_another } => Job::Accept(self.notice(pick, of_another)),
            Wish::Send(picks) => Job::Send(self.events(picks)),
            Wish::Release(picks) => Job::Release(self.events(picks)),
            Wish::Deliver(picks) => Job::Deliver(self.events(picks)),
            Wish::Fail { picks, unknown } => Job::Fail {
                ids: self.events(picks),
                error: format!("failed at {}", self.now),
                unknown,
            },
            Wish::Recover => Job::Recover,
            Wish::Bury { pick, reason } => Job::Bury {
                id: self.event(pick),
                reason: reason.then(|| format!("refused at {}", self.now)),
            },
            Wish::Keep { offset, what } => self.keep(offset, what),
            Wish::Act {
                discard,
                one,
                dry_run,
            } => self.act(discard, one, dry_run),
            Wish::Route(which) => Job::Route(routes(which)),
            Wish::Purge { age_s, limit } => Job::Purge {
                cutoff: self.now.minus(Duration::from_secs(age_s)),
                limit,
            },
            Wish::Spoil { user, reservation } => {
                Job::Spoil(new_payment(user, vec![(reservation, 1)]))
            }
        }
    }

    fn event(&self, pick: u8) -> i64 {
        1 + i64::from(pick) % (self.model.last_event() + 2)
    }

    fn events(&self, picks: Vec<u8>) -> Vec<i64> {
        picks.into_iter().map(|pick| self.event(pick)).collect()
    }

    fn notice(&self, pick: u8, of_another: bool) -> EventRef {
        let outbox_id = self.event(pick);
        // A purged event's payment is not known any more.
        let payment_id = self.model.payment_of(outbox_id).unwrap_or(outbox_id);
        EventRef {
            outbox_id,
            payment_id: payment_id + i64::from(of_another),
            created_at: None,
        }
    }

    fn publish_next(&self, count: usize, to: To) -> Job {
        let unpublished = self.model.view().unpublished.into_iter();
        let next = unpublished.take(count).map(|event| event.outbox_id);
        Job::Publish(next.map(|id| receipt(id, to)).collect())
    }

    fn publish_any(&self, picks: Vec<u8>, to: To) -> Job {
        let there = self.model.event_ids();
        let ids = picks.into_iter().filter_map(|pick| match to {
            // The application publisher is handed what is in the outbox.
            To::Application => there.get(usize::from(pick) % there.len().max(1)).copied(),
            To::Topic { .. } | To::Nowhere => Some(self.event(pick)),
        });
        Job::Publish(ids.map(|id| receipt(id, to)).collect())
    }

    fn keep(&self, offset: i64, what: Kept) -> Job {
        let node = self.model.node();
        let (event_id, value) = match what {
            Kept::Ours { pick, of_another } => {
                let notice = self.notice(pick, of_another);
                (
                    Some(node.event_id(notice.outbox_id)),
                    Some(notice.payment_id.to_string().into_bytes()),
                )
            }
            Kept::NotOwnEvent => (Some("elsewhere-1".to_owned()), Some(b"1".to_vec())),
            Kept::NoId => (None, Some(b"1".to_vec())),
            Kept::NoText => (Some(node.event_id(1)), Some(vec![0xff, 0x00])),
        };
        Job::Keep {
            offset,
            event_id,
            value,
        }
    }

    fn act(&self, discard: bool, one: Option<u8>, dry_run: bool) -> Job {
        let letter = |pick: u8| 1 + i64::from(pick) % (self.model.last_letter() + 1);
        Job::Act {
            action: if discard {
                DeadLetterAction::Discard
            } else {
                DeadLetterAction::Replay
            },
            which: one.map_or(Selection::Open { after: 0, limit: 3 }, |pick| {
                Selection::Id(letter(pick))
            }),
            dry_run,
        }
    }
}

fn new_payment(user_id: i64, mut reservations: Vec<(i64, i64)>) -> NewPayment {
    // None twice in a request: its parser refuses that.
    reservations.sort_unstable();
    reservations.dedup_by_key(|(id, _)| *id);
    let reservations = reservations.into_iter().map(|(id, price)| Reservation {
        reservation_id: id,
        seat_price: price,
    });
    NewPayment {
        user_id,
        reservations: reservations.collect(),
    }
}

struct Begun {
    shown: String,
    expected: Answer,
    writing: PendingWrite<Answer>,
    after: Model,
}

fn receipt(outbox_id: i64, to: To) -> Receipt {
    let place = match to {
        To::Application => Destination::Delivery,
        To::Nowhere => Destination::Rejected("too large".into()),
        To::Topic { reports_offset } => Destination::Topic {
            partition: 0,
            offset: reports_offset.then_some(outbox_id * 10),
        },
    };
    Receipt { outbox_id, place }
}

/// None to three channels, some of them in another order.
fn routes(which: u8) -> Vec<Route> {
    let all = 0..=i64::MAX;
    let route =
        |name: &str, status, amount: &RangeInclusive<i64>, user: &RangeInclusive<i64>| Route {
            name: name.to_owned(),
            webhook_url: None,
            status,
            amount: amount.clone(),
            user: user.clone(),
            messages_per_second: 1.0,
        };
    let failed = route("failed", Some(Status::Failed), &all, &all);
    let large = route("large", None, &(3..=i64::MAX), &all);
    let first = route("first", Some(Status::Completed), &all, &(0..=0));
    match which % 5 {
        0 => vec![],
        1 => vec![failed],
        2 => vec![large, failed],
        3 => vec![first, large],
        _ => vec![failed, first, large],
    }
}

#[test]
fn the_store_matches_the_reference_model() {
    let cases = env::var("PAYRELAY_MODEL_CASES")
        .map_or(CASES, |text| text.parse().expect("a number of cases"));
    let mut runner = TestRunner::new(Config {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(
            "proptest-regressions/model.txt",
        ))),
        source_file: Some(file!()),
        test_name: Some("the_store_matches_the_reference_model"),
        ..proptest_config(cases)
    });
    let outcome = runner.run(&steps(), |steps| {
        let mut pair = Pair::new();
        for step in steps {
            pair.take(step);
        }
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}
