//! What must hold when the faults are over.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::client::Receipt;
use super::{LIMIT, Scene, TOPIC};
use testkit::process::run_to_exit;
use testkit::topic;

/// What the test knows of the payments.
#[derive(Default)]
pub struct Known {
    /// Of the payments that the final database must have.
    user_of: BTreeMap<i64, u64>,
    /// Of those that were answered and went with a database file that was replaced by an older
    /// copy.
    lost: BTreeMap<i64, u64>,
    /// May show once more at Slack: they were not DELIVERED in a copy that was restored.
    pub undelivered_in_copy: BTreeSet<i64>,
    /// Published to an incarnation of the topic that was deleted since.
    pub on_earlier_topics: BTreeSet<i64>,
}

impl Known {
    pub fn add(&mut self, receipts: &[Receipt]) {
        let before = self.user_of.len() + self.lost.len();
        for receipt in receipts {
            assert_eq!(receipt.payments.len(), receipt.reservations.len());
            self.user_of
                .extend(receipt.payments.iter().map(|id| (*id, receipt.user)));
        }
        let added: usize = receipts.iter().map(|receipt| receipt.payments.len()).sum();
        assert_eq!(
            self.user_of.len() + self.lost.len(),
            before + added,
            "an id was given twice"
        );
        let again = self.lost.keys().find(|id| self.user_of.contains_key(id));
        assert_eq!(again, None, "an id was given again after a restore");
    }

    /// The database is now a copy that has the payments up to this one.
    pub fn restored(&mut self, last_payment: i64) {
        self.lost
            .append(&mut self.user_of.split_off(&(last_payment + 1)));
    }
}

impl Scene {
    pub fn check(&mut self) {
        let known = std::mem::take(&mut self.known);
        let ids: BTreeSet<i64> = known.user_of.keys().copied().collect();
        let stored: BTreeSet<i64> = self.ids("SELECT id FROM payment");
        assert_eq!(
            stored, ids,
            "the payments of the final database are those that were answered"
        );
        let on_topic = self.check_topic(&known);
        let twice = on_topic.len() - on_topic.iter().collect::<BTreeSet<_>>().len();
        self.check_slack(&known);
        // Without transactions a record that the network held back may arrive after its sender's
        // end, and after the next one has looked.
        if self.delivery == "exactly-once" {
            assert_eq!(twice, 0, "records are on the topic twice");
        }
        if twice == 0 {
            self.check_audit(&known, &on_topic.into_iter().collect());
        }
    }

    /// The records of the topic's last incarnation: known payments, those of a user in commit
    /// order.
    fn check_topic(&self, known: &Known) -> Vec<i64> {
        let found = topic::read(&self.broker.bootstrap_inside(), TOPIC, LIMIT);
        let mut last: BTreeMap<&str, i64> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        let mut on_topic = Vec::new();
        for record in &found {
            let id: i64 = record.value.parse().unwrap();
            let user = known.user_of.get(&id).or_else(|| known.lost.get(&id));
            assert_eq!(
                user.map(u64::to_string),
                Some(record.key.clone()),
                "payment {id}"
            );
            on_topic.push(id);
            // A lost payment says nothing of the order: the restored database has not known it.
            if seen.insert(id) && known.user_of.contains_key(&id) {
                let before = last.insert(&record.key, id).unwrap_or(0);
                assert!(
                    before < id,
                    "user {}: payment {before} before {id}",
                    record.key
                );
            }
        }
        if self.mix {
            return on_topic;
        }
        let all: BTreeSet<i64> = known.user_of.keys().copied().collect();
        assert_eq!(seen, all, "what is on the topic is what was answered");
        on_topic
    }

    /// Every payment was delivered. Twice only where that was counted, or where a copy was
    /// restored.
    fn check_slack(&self, known: &Known) {
        let mut shown: BTreeMap<i64, usize> = BTreeMap::new();
        for line in self.slack.lines() {
            let id = line.split(' ').nth(1).unwrap().parse().unwrap();
            *shown.entry(id).or_default() += 1;
        }
        let missing: Vec<_> = known
            .user_of
            .keys()
            .filter(|id| !shown.contains_key(id))
            .collect();
        assert!(
            missing.is_empty(),
            "{} payments were not delivered: {missing:?}",
            missing.len()
        );
        let strange = shown
            .keys()
            .find(|id| !known.user_of.contains_key(id) && !known.lost.contains_key(id));
        assert_eq!(
            strange, None,
            "Slack has a payment that no client was answered"
        );
        let again = |(id, count): (&i64, &usize)| {
            let allowed = 1 + usize::from(known.undelivered_in_copy.contains(id));
            count.saturating_sub(allowed)
        };
        let again: usize = shown.iter().map(again).sum();
        println!(
            "{} payments at Slack; {again} shown again, {} counted",
            shown.len(),
            self.done.unknown_outcomes
        );
        assert!(
            again <= self.done.unknown_outcomes,
            "payments show twice that were not counted"
        );
    }

    fn check_audit(&self, known: &Known, on_topic: &BTreeSet<i64>) {
        let audit = run_to_exit(self.options(&["audit", "--json", "--limit", "5"]));
        let [stdout, stderr] =
            [&audit.stdout, &audit.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        assert_eq!(audit.status.code(), Some(0), "{stdout}\n{stderr}");
        println!("{stdout}");
        if !self.mix {
            return;
        }
        let report: Value = serde_json::from_str(&stdout).unwrap();
        let note = |kind: &str| {
            let note = report["notes"]
                .as_array()
                .unwrap()
                .iter()
                .find(|note| note["kind"] == kind);
            note.map_or(0, |note| {
                usize::try_from(note["count"].as_i64().unwrap()).unwrap()
            })
        };
        let published = self.ids(
            "SELECT payment_id FROM outbox WHERE status = 'PUBLISHED' \
                AND \"partition\" IS NOT NULL",
        );
        let gone: BTreeSet<i64> = published.difference(on_topic).copied().collect();
        let earlier = gone.intersection(&known.on_earlier_topics).count();
        assert_eq!(
            note("earlier-incarnation"),
            earlier,
            "events of an earlier incarnation"
        );
        let deleted = gone.len() - earlier;
        assert_eq!(
            note("deleted-from-topic") + note("undecodable"),
            deleted,
            "records deleted from the topic"
        );
        let lost = on_topic
            .iter()
            .filter(|id| known.lost.contains_key(id))
            .count();
        assert_eq!(
            note("lost-with-old-file"),
            lost,
            "payments lost with the old file"
        );
        println!(
            "{earlier} events of an earlier incarnation, {deleted} deleted, {lost} lost with the \
                old file"
        );
    }
}
