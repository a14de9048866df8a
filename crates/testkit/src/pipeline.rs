//! The real binary between a real Kafka and a fake for Slack, and what has to be at both ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::process::{Options, Payrelay};
use super::slack::FakeSlack;
use super::topic::{self, Found};
use super::wait_until;

const LIMIT: Duration = Duration::from_mins(1);

pub const TOPIC: &str = "payment-event";

/// Lines of the log: the publisher lost the broker, or it does not answer.
pub const UNAVAILABLE: &str = "Kafka (publisher) unavailable";
pub const SILENT: &str = "Kafka (publisher) unavailable: no answer within 3 s";

pub struct Pipeline {
    pub dir: tempfile::TempDir,
    pub slack: FakeSlack,
    pub bootstrap: String,
}

impl Pipeline {
    pub fn new(bootstrap: String) -> Self {
        Self {
            dir: tempfile::tempdir().expect("the machine has space for a folder"),
            slack: FakeSlack::start(),
            bootstrap,
        }
    }

    pub fn start(&self) -> Payrelay {
        self.start_with(&[])
    }

    pub fn start_with(&self, more: &[(&str, &str)]) -> Payrelay {
        let slack = self.slack.url();
        let bootstrap = self.bootstrap.as_str();
        let mut env = vec![
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &slack),
            // Each payment has a line, and few have a message of their own.
            ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "100000"),
            ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
            ("PAYRELAY_SLACK_DIGEST_OVER", "50"),
        ];
        env.extend(more);
        Payrelay::start(Options::new(self.dir.path(), &env))
    }

    pub fn topic(&self) -> Vec<Found> {
        topic::read(&self.bootstrap, TOPIC, LIMIT)
    }

    /// For as long as more of them come: each takes two syncs, and the disk may be slow.
    pub fn wait_for_messages(&self, count: usize) {
        let mut come = 0;
        while come < count {
            wait_until(
                &format!("payment {} of {count} at Slack", come + 1),
                LIMIT,
                || self.lines() > come,
            );
            come = self.lines();
        }
    }

    pub fn lines(&self) -> usize {
        self.slack.lines().len()
    }

    /// At Slack: payments 1 to `count`, each once.
    pub fn assert_delivered_once(&self, count: usize) {
        let messages = self.slack.lines();
        let ids: BTreeSet<_> = messages.iter().map(|message| id_of(message)).collect();
        assert_eq!((messages.len(), ids.len()), (count, count));
        assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&count)));
    }

    /// On the topic: payments 1 to `count`, each once, and those of a user in commit order.
    pub fn assert_published_once(&self, count: usize) {
        let found = self.topic();
        let ids: BTreeSet<usize> = found
            .iter()
            .map(|record| record.value.parse().expect("a payment id"))
            .collect();
        assert_eq!((found.len(), ids.len()), (count, count));
        assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&count)));
        let mut last: BTreeMap<&str, usize> = BTreeMap::new();
        for record in &found {
            let id = record.value.parse().expect("a payment id");
            let before = last.insert(&record.key, id).unwrap_or(0);
            assert!(
                before < id,
                "user {}: payment {before} before {id}",
                record.key
            );
        }
    }
}

pub fn id_of(message: &str) -> usize {
    message
        .split(' ')
        .nth(1)
        .and_then(|id| id.parse().ok())
        .unwrap_or_else(|| panic!("not a line: {message}"))
}

/// How often the publisher was unavailable so far, once it is not: a new broker may be slow, and
/// one outage is one line.
pub fn outages(payrelay: &Payrelay) -> usize {
    let over = || {
        payrelay.count_in_log(UNAVAILABLE)
            == payrelay.count_in_log("Kafka (publisher) available again")
    };
    wait_until("the publisher to be well", LIMIT, over);
    payrelay.count_in_log(UNAVAILABLE)
}
