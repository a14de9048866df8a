//! What the store is to do, written as plainly as can be: maps in memory, no SQL, no threads, no
//! crashes.

use std::collections::{BTreeMap, BTreeSet};

use payrelay::config::{DEFAULT_CHANNEL, Route};
use payrelay::domain::event::{Event, EventRef, EventType};
use payrelay::domain::node_id::NodeId;
use payrelay::domain::payment::{NewPayment, Payment, Status};
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::arrival::AcceptOutcome;
use payrelay::store::backlog::Backlog;
use payrelay::store::dead_letter_action::{DeadLetterAction, DeadLetterOutcome, Selection};
use payrelay::store::delivery::{Carrier, DeliveryStatus, Notification, PendingDelivery};
use payrelay::store::outbox::{EventState, EventStatus};
use payrelay::store::publication::{Destination, Receipt};
use payrelay::store::timeline::PaymentTimeline;
use payrelay::store::waiting::Waiting as Waits;
use serde_json::{Value, json};

use super::{Answer, CURRENCY, Job, ORIGIN, View};

/// Everything that the store keeps.
#[derive(Clone)]
pub struct Model {
    node: NodeId,
    /// By id, from 1.
    payments: Vec<Payment>,
    paid: BTreeSet<i64>,
    events: BTreeMap<i64, EventRow>,
    last_event: i64,
    deliveries: BTreeMap<i64, Delivery>,
    routes: Vec<Route>,
    letters: BTreeMap<i64, Letter>,
    /// SQLite takes an id for an insert that then meets a row that is there.
    last_letter: i64,
    /// The time of the last job.
    now: Timestamp,
}

#[derive(Clone)]
struct EventRow {
    payment_id: i64,
    created_at: Timestamp,
    published: Option<(Timestamp, Option<i32>, Option<i64>)>,
    rejection: Option<String>,
}

impl EventRow {
    fn waits(&self) -> bool {
        self.published.is_none() && self.rejection.is_none()
    }

    fn status(&self) -> &'static str {
        match (self.published, &self.rejection) {
            (Some(_), _) => "PUBLISHED",
            (None, Some(_)) => "REJECTED",
            (None, None) => "INIT",
        }
    }
}

#[derive(Clone)]
struct Delivery {
    status: &'static str,
    channel: String,
    attempts: u32,
    unknown: u32,
    created_at: Timestamp,
    delivered_at: Option<Timestamp>,
    last_error: Option<String>,
}

impl Delivery {
    fn waits(&self) -> bool {
        matches!(self.status, "PENDING" | "SENDING")
    }
}

#[derive(Clone)]
struct Letter {
    of: Of,
    state: &'static str,
    reason: String,
    count: i64,
    received_at: Timestamp,
    actions: Vec<Value>,
}

#[derive(Clone, PartialEq)]
enum Of {
    Event {
        id: i64,
        payment: Option<i64>,
    },
    Record {
        offset: i64,
        event_id: Option<String>,
        value: Option<Vec<u8>>,
    },
}

impl Model {
    pub fn new(node: NodeId) -> Self {
        Self {
            node,
            payments: Vec::new(),
            paid: BTreeSet::new(),
            events: BTreeMap::new(),
            last_event: 0,
            deliveries: BTreeMap::new(),
            routes: Vec::new(),
            letters: BTreeMap::new(),
            last_letter: 0,
            now: Timestamp::from_micros(0),
        }
    }

    pub fn node(&self) -> &NodeId {
        &self.node
    }

    pub fn last_event(&self) -> i64 {
        self.last_event
    }

    pub fn last_letter(&self) -> i64 {
        self.last_letter
    }

    /// Events that are still there, oldest first.
    pub fn event_ids(&self) -> Vec<i64> {
        self.events.keys().copied().collect()
    }

    /// The payment of an event, if it still exists.
    pub fn payment_of(&self, event: i64) -> Option<i64> {
        self.events.get(&event).map(|row| row.payment_id)
    }

    /// Does a job, and returns the expected result of the store.
    pub fn apply(&mut self, job: &Job, now: Timestamp) -> Answer {
        self.now = now;
        match job {
            Job::Pay(new) => Answer::Payments(self.pay(new, now)),
            Job::Publish(receipts) => {
                for receipt in receipts {
                    self.publish(receipt, now);
                }
                Answer::Done
            }
            Job::Accept(notice) => Answer::Arrival(self.accept(*notice)),
            Job::Send(ids) => self.change_status(ids, "PENDING", "SENDING"),
            Job::Release(ids) => self.change_status(ids, "SENDING", "PENDING"),
            Job::Deliver(ids) => self.each(ids, |row| {
                if row.waits() {
                    row.status = "DELIVERED";
                    row.delivered_at = Some(now);
                    row.attempts += 1;
                }
            }),
            Job::Fail {
                ids,
                error,
                unknown,
            } => self.each(ids, |row| {
                if row.waits() {
                    row.status = "PENDING";
                    row.last_error = Some(error.clone());
                    row.attempts += 1;
                    row.unknown += u32::from(*unknown);
                }
            }),
            Job::Recover => Answer::Count(self.recover()),
            Job::Bury { id, reason } => {
                self.bury(*id, reason.as_deref(), now);
                Answer::Done
            }
            Job::Keep {
                offset,
                event_id,
                value,
            } => {
                self.keep(*offset, event_id.clone(), value.clone(), now);
                Answer::Done
            }
            Job::Act {
                action,
                which,
                dry_run,
            } => {
                let mut after = self.clone();
                let outcomes = after.act(*action, *which, now);
                if !dry_run {
                    *self = after;
                }
                Answer::Outcomes(outcomes)
            }
            Job::Route(routes) => {
                self.route(routes);
                Answer::Done
            }
            Job::Purge { cutoff, limit } => Answer::Count(self.purge(*cutoff, *limit)),
            Job::Spoil(_) => Answer::Refused,
        }
    }

    fn change_status(&mut self, ids: &[i64], from: &str, to: &'static str) -> Answer {
        self.each(ids, |row| {
            if row.status == from {
                row.status = to;
            }
        })
    }

    fn pay(&mut self, new: &NewPayment, now: Timestamp) -> Vec<Payment> {
        let from = self.payments.len();
        for reservation in &new.reservations {
            let first = self.paid.insert(reservation.reservation_id);
            let paid = self.payments.iter().find(|paid| {
                paid.reservation_id == reservation.reservation_id
                    && paid.status == Status::Completed
            });
            let paid_by = paid.map(|paid| paid.id);
            let id = i64::try_from(self.payments.len()).unwrap() + 1;
            self.payments.push(Payment {
                id,
                user_id: new.user_id,
                reservation_id: reservation.reservation_id,
                amount: reservation.seat_price,
                currency: CURRENCY.to_owned(),
                status: if first {
                    Status::Completed
                } else {
                    Status::Failed
                },
                failure: (!first).then(|| "already paid".to_owned()),
                paid_by,
                executed_at: now,
            });
            self.last_event += 1;
            let row = EventRow {
                payment_id: id,
                created_at: now,
                published: None,
                rejection: None,
            };
            self.events.insert(self.last_event, row);
        }
        self.payments[from..].to_vec()
    }

    fn payment(&self, event: i64) -> Option<&Payment> {
        let id = self.events.get(&event)?.payment_id;
        self.payments.get(usize::try_from(id).unwrap() - 1)
    }

    fn channel(&self, event: i64) -> String {
        let Some(payment) = self.payment(event) else {
            return DEFAULT_CHANNEL.to_owned();
        };
        let fits = |route: &&Route| {
            route.status.is_none_or(|status| status == payment.status)
                && route.amount.contains(&payment.amount)
                && route.user.contains(&payment.user_id)
        };
        self.routes
            .iter()
            .find(fits)
            .map_or(DEFAULT_CHANNEL, |route| &route.name)
            .to_owned()
    }

    fn insert_delivery(&mut self, event: i64) -> AcceptOutcome {
        let channel = self.channel(event);
        if self.deliveries.contains_key(&event) {
            return AcceptOutcome::Duplicate;
        }
        let row = Delivery {
            status: "PENDING",
            channel,
            attempts: 0,
            unknown: 0,
            created_at: self.now,
            delivered_at: None,
            last_error: None,
        };
        self.deliveries.insert(event, row);
        AcceptOutcome::Accepted
    }

    fn publish(&mut self, receipt: &Receipt, now: Timestamp) {
        let (partition, offset) = match &receipt.place {
            Destination::Topic { partition, offset } => (Some(*partition), *offset),
            Destination::Delivery => {
                self.insert_delivery(receipt.outbox_id);
                (None, None)
            }
            Destination::Rejected(reason) => return self.reject(receipt.outbox_id, reason, now),
        };
        if let Some(row) = self.events.get_mut(&receipt.outbox_id) {
            row.published.get_or_insert((now, partition, offset));
            row.rejection = None;
        }
    }

    fn reject(&mut self, event: i64, reason: &str, now: Timestamp) {
        if let Some(row) = self.events.get_mut(&event).filter(|row| row.waits()) {
            row.rejection = Some(reason.to_owned());
            self.add_event_letter(event, reason.to_owned(), now);
        }
    }

    fn accept(&mut self, notice: EventRef) -> AcceptOutcome {
        let payments = i64::try_from(self.payments.len()).unwrap();
        match self.payment_of(notice.outbox_id) {
            Some(payment) if payment == notice.payment_id => self.insert_delivery(notice.outbox_id),
            None if notice.outbox_id <= self.last_event
                && (1..=payments).contains(&notice.payment_id) =>
            {
                AcceptOutcome::Purged
            }
            _ => AcceptOutcome::Unknown,
        }
    }

    fn each(&mut self, ids: &[i64], change: impl Fn(&mut Delivery)) -> Answer {
        for id in ids {
            if let Some(row) = self.deliveries.get_mut(id) {
                change(row);
            }
        }
        Answer::Done
    }

    fn recover(&mut self) -> usize {
        let mut count = 0;
        for row in self
            .deliveries
            .values_mut()
            .filter(|row| row.status == "SENDING")
        {
            row.status = "PENDING";
            row.attempts += 1;
            row.unknown += 1;
            row.last_error = Some("payrelay ended before the answer was recorded".to_owned());
            count += 1;
        }
        count
    }

    fn bury(&mut self, event: i64, reason: Option<&str>, now: Timestamp) {
        let Some(row) = self.deliveries.get_mut(&event).filter(|row| row.waits()) else {
            return;
        };
        row.status = "DEAD";
        row.last_error = reason.map(str::to_owned).or(row.last_error.take());
        let reason = row.last_error.clone().unwrap_or_default();
        self.add_event_letter(event, reason, now);
    }

    fn add_event_letter(&mut self, event: i64, reason: String, now: Timestamp) {
        let of = |letter: &&mut Letter| matches!(letter.of, Of::Event { id, .. } if id == event);
        if let Some(letter) = self.letters.values_mut().find(of) {
            self.last_letter += 1;
            letter.reason = reason;
            letter.state = "OPEN";
            letter.count += 1;
        } else {
            let payment = self.payment_of(event);
            self.add_letter(Of::Event { id: event, payment }, reason, now);
        }
    }

    fn keep(
        &mut self,
        offset: i64,
        event_id: Option<String>,
        value: Option<Vec<u8>>,
        now: Timestamp,
    ) {
        let offset_of = |letter: &Letter| match letter.of {
            Of::Record { offset, .. } => Some(offset),
            Of::Event { .. } => None,
        };
        let mut letters = self.letters.values();
        if letters.any(|letter| offset_of(letter) == Some(offset)) {
            self.last_letter += 1;
        } else {
            self.add_letter(
                Of::Record {
                    offset,
                    event_id,
                    value,
                },
                "kept".to_owned(),
                now,
            );
        }
    }

    fn add_letter(&mut self, of: Of, reason: String, now: Timestamp) {
        self.last_letter += 1;
        let letter = Letter {
            of,
            state: "OPEN",
            reason,
            count: 1,
            received_at: now,
            actions: Vec::new(),
        };
        self.letters.insert(self.last_letter, letter);
    }

    fn act(
        &mut self,
        action: DeadLetterAction,
        which: Selection,
        now: Timestamp,
    ) -> Vec<DeadLetterOutcome> {
        let ids: Vec<i64> = match which {
            Selection::Id(id) => vec![id],
            Selection::Open { after, limit } => {
                let open = self
                    .letters
                    .iter()
                    .filter(|(id, letter)| letter.state == "OPEN" && **id > after);
                open.map(|(id, _)| *id).take(limit).collect()
            }
        };
        ids.into_iter()
            .filter_map(|id| self.act_on(id, action, now))
            .collect()
    }

    fn act_on(
        &mut self,
        id: i64,
        action: DeadLetterAction,
        now: Timestamp,
    ) -> Option<DeadLetterOutcome> {
        let letter = self.letters.get(&id)?.clone();
        if letter.state != "OPEN" {
            let wanted = if action == DeadLetterAction::Replay {
                "REPLAYED"
            } else {
                "DISCARDED"
            };
            let outcome = format!("nothing was done: it is {}", letter.state);
            return Some(DeadLetterOutcome {
                id,
                outcome,
                resolved: letter.state == wanted,
            });
        }
        let attempt = match (action, &letter.of) {
            (DeadLetterAction::Discard, of) => {
                if let Of::Event { id, .. } = *of {
                    self.discard_delivery(id);
                }
                Ok("discarded".to_owned())
            }
            (DeadLetterAction::Replay, Of::Event { id, .. }) => self.replay_event(*id),
            (
                DeadLetterAction::Replay,
                Of::Record {
                    event_id, value, ..
                },
            ) => self.replay_record(event_id.as_deref(), value.as_deref()),
        };
        let resolved = attempt.is_ok();
        let (Ok(outcome) | Err(outcome)) = attempt;
        let letter = self.letters.get_mut(&id)?;
        match (action, resolved) {
            (DeadLetterAction::Replay, true) => letter.state = "REPLAYED",
            (DeadLetterAction::Replay, false) => letter.count += 1,
            (DeadLetterAction::Discard, _) => letter.state = "DISCARDED",
        }
        letter.actions.push(
            json!({"action": action.as_str(), "origin": ORIGIN, "outcome": outcome, "at": now}),
        );
        Some(DeadLetterOutcome {
            id,
            outcome,
            resolved,
        })
    }

    fn is_rejected(&self, event: i64) -> bool {
        let row = self.events.get(&event);
        row.is_some_and(|row| row.status() == "REJECTED")
    }

    fn discard_delivery(&mut self, event: i64) {
        let is_new =
            self.is_rejected(event) && self.insert_delivery(event) == AcceptOutcome::Accepted;
        if let Some(row) = self
            .deliveries
            .get_mut(&event)
            .filter(|row| is_new || row.status == "DEAD")
        {
            row.status = "DISCARDED";
        }
    }

    fn replay_event(&mut self, event: i64) -> Result<String, String> {
        if self.is_rejected(event) {
            self.events
                .entry(event)
                .and_modify(|row| row.rejection = None);
            return Ok("waits to be published again".to_owned());
        }
        match self.deliveries.get_mut(&event) {
            Some(row) if row.status == "DEAD" => {
                row.status = "PENDING";
                Ok("waits to be delivered again".to_owned())
            }
            _ => Err("its delivery no longer exists: discard it".to_owned()),
        }
    }

    fn replay_record(
        &mut self,
        event_id: Option<&str>,
        value: Option<&[u8]>,
    ) -> Result<String, String> {
        let notice = EventRef::parse(&self.node, event_id, value)
            .map_err(|foreign| format!("still: {foreign}"))?;
        match self.accept(notice) {
            AcceptOutcome::Accepted | AcceptOutcome::Duplicate => Ok(format!(
                "accepted: its delivery is {}",
                self.deliveries[&notice.outbox_id].status
            )),
            AcceptOutcome::Purged => Ok("its event was delivered and purged long ago".to_owned()),
            AcceptOutcome::Unknown => {
                Err("still: no event of this database has this id and payment".to_owned())
            }
        }
    }

    fn route(&mut self, routes: &[Route]) {
        self.routes = routes.to_vec();
        let known = |channel: &str| {
            channel == DEFAULT_CHANNEL || routes.iter().any(|route| route.name == channel)
        };
        let replayable = |id: i64| {
            let of = |letter: &Letter| {
                letter.state == "OPEN" && matches!(letter.of, Of::Event { id: of, .. } if of == id)
            };
            self.letters.values().any(of)
        };
        let lost = self
            .deliveries
            .iter()
            .filter(|(id, row)| !known(&row.channel) && (row.waits() || replayable(**id)));
        let moved: Vec<_> = lost.map(|(id, _)| (*id, self.channel(*id))).collect();
        for (id, channel) in moved {
            self.deliveries.get_mut(&id).unwrap().channel = channel;
        }
    }

    fn purge(&mut self, cutoff: Timestamp, limit: usize) -> usize {
        let mut done: Vec<(Timestamp, i64)> = Vec::new();
        for (id, row) in &self.deliveries {
            let published = self
                .events
                .get(id)
                .and_then(|event| event.published)
                .is_some_and(|(at, ..)| at < cutoff);
            if let Some(at) = row.delivered_at.filter(|at| *at < cutoff && published) {
                done.push((at, *id));
            }
        }
        done.sort_unstable();
        done.truncate(limit);
        for (_, id) in &done {
            self.deliveries.remove(id);
            self.events.remove(id);
        }
        done.len()
    }

    /// All that can be seen.
    pub fn view(&self) -> View {
        let count = i64::try_from(self.payments.len()).unwrap();
        View {
            ways: (1..=count + 1).map(|id| self.way(id)).collect(),
            histories: super::USERS
                .map(|user| (user, self.history(user)))
                .collect(),
            unpublished: self.unpublished(),
            channels: self
                .channels()
                .into_iter()
                .map(|channel| self.channel_view(channel))
                .collect(),
            backlog: self.backlog(),
            sequences: [count, self.last_event, self.last_letter]
                .into_iter()
                .filter(|last| *last > 0)
                .collect(),
            routes: self.routes.iter().map(|route| route.name.clone()).collect(),
            letters: self
                .letters
                .iter()
                .map(|(id, letter)| Self::letter(*id, letter))
                .collect(),
        }
    }

    pub fn channels(&self) -> Vec<String> {
        let routes = self.routes.iter().map(|route| route.name.clone());
        [DEFAULT_CHANNEL.to_owned()]
            .into_iter()
            .chain(routes)
            .collect()
    }

    fn way(&self, payment: i64) -> Option<PaymentTimeline> {
        let found = self.payments.get(usize::try_from(payment).unwrap() - 1)?;
        let event = self
            .events
            .iter()
            .find(|(_, row)| row.payment_id == payment);
        let notification = event
            .and_then(|(id, _)| self.deliveries.get(id))
            .map(|row| Notification {
                status: DeliveryStatus::parse(row.status).unwrap(),
                channel: row.channel.clone(),
                created_at: row.created_at,
                attempts: row.attempts,
                unknown_outcomes: row.unknown,
                delivered_at: row.delivered_at,
                delivered_in: row.delivered_at.map(|_| Carrier::Single),
                last_error: row.last_error.clone(),
            });
        let event = event.map(|(id, row)| EventState {
            outbox_id: *id,
            status: EventStatus::parse(row.status()).unwrap(),
            rejection: row.rejection.clone(),
            created_at: row.created_at,
            published_at: row.published.map(|(at, ..)| at),
            partition: row.published.and_then(|(_, partition, _)| partition),
            offset: row.published.and_then(|(.., offset)| offset),
            traceparent: None,
        });
        Some(PaymentTimeline {
            payment: found.clone(),
            event,
            notification,
            is_delivered_by_others: false,
        })
    }

    pub fn history(&self, user: i64) -> Vec<Payment> {
        self.payments
            .iter()
            .rev()
            .filter(|payment| payment.user_id == user)
            .cloned()
            .collect()
    }

    fn unpublished(&self) -> Vec<Event> {
        let rows = self.events.iter().filter(|(_, row)| row.waits());
        rows.map(|(id, row)| {
            let payment = self.payment(*id).unwrap();
            Event {
                outbox_id: *id,
                payment_id: payment.id,
                user_id: payment.user_id,
                kind: EventType::from(payment.status),
                created_at: row.created_at,
                trace: None,
                payment: None,
            }
        })
        .collect()
    }

    fn channel_view(&self, channel: String) -> super::ChannelView {
        let rows: Vec<_> = self
            .deliveries
            .iter()
            .filter(|(_, row)| row.waits() && row.channel == channel)
            .collect();
        let waiting = rows.iter().map(|(id, _)| PendingDelivery {
            outbox_id: **id,
            created_at: self.events[*id].created_at,
            trace_id: None,
            payment: Ok(self.payment(**id).unwrap().clone()),
        });
        super::ChannelView {
            waiting: waiting.collect(),
            more: (0..4).map(|n| rows.len() > n).collect(),
            channel,
        }
    }

    fn backlog(&self) -> Backlog {
        let count = |number: usize| i64::try_from(number).unwrap();
        let unpublished: Vec<_> = self.events.values().filter(|row| row.waits()).collect();
        let letters: Vec<_> = self
            .letters
            .values()
            .filter(|letter| letter.state == "OPEN")
            .collect();
        let deliveries = |channel: String| {
            let rows = self
                .deliveries
                .iter()
                .filter(|(_, row)| row.waits() && row.channel == channel);
            let ids: Vec<_> = rows.map(|(id, _)| id).collect();
            Waits {
                count: count(ids.len()),
                oldest_at: ids.first().map(|id| self.events[*id].created_at),
            }
        };
        Backlog {
            unpublished: Waits {
                count: count(unpublished.len()),
                oldest_at: unpublished.first().map(|row| row.created_at),
            },
            unconsumed: Waits::default(),
            channels: self.channels().into_iter().map(deliveries).collect(),
            dead_letters: Waits {
                count: count(letters.len()),
                oldest_at: letters.first().map(|letter| letter.received_at),
            },
        }
    }

    fn letter(id: i64, letter: &Letter) -> Value {
        let mut shown = json!({
            "id": id, "state": letter.state, "reason": letter.reason, "count": letter.count,
            "received_at": letter.received_at, "actions": letter.actions,
        });
        match &letter.of {
            Of::Event { payment, .. } => {
                if let Some(payment) = payment {
                    shown["payment_id"] = json!(payment);
                }
            }
            Of::Record {
                offset,
                event_id,
                value,
            } => {
                let headers: Vec<_> = event_id.iter().map(|id| json!(["ce_id", id])).collect();
                let value = value.as_deref().map(String::from_utf8_lossy);
                shown["record"] = json!({
                    "topic": super::TOPIC,
                    "partition": 0,
                    "offset": offset,
                    "key": null,
                    "value": value,
                    "headers": headers,
                });
            }
        }
        shown
    }
}
