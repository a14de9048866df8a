//! `[slack]` and `[[slack.route]]`: the channels, their pace, and the text of messages.

use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::duration::{FOREVER, MS};
use super::secret::Secret;
use super::source::Source;
use super::typed::{is_url, non_empty};
use crate::domain::payment::Status;
use crate::domain::template::Template;
use crate::domain::timestamp::TimeZone;

/// Where the messages of all channels go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sink {
    /// To a channel's webhook if it has one, else to the log.
    Auto,
    /// To the log.
    Log,
}

/// `[slack]`: the channel "default", and what all channels share.
#[derive(Debug, Clone)]
pub struct Slack {
    /// `None`: messages go to the log.
    pub webhook_url: Option<Secret>,
    /// The longest time for one message, from connecting to the response.
    pub timeout: Duration,
    /// Messages a second, in the long run.
    pub messages_per_second: f64,
    /// Messages at once after a quiet time.
    pub burst: NonZeroUsize,
    /// When more payments wait, they share a digest.
    pub digest_over: usize,
    /// The maximum number of payments of one digest.
    pub digest_max: NonZeroUsize,
    /// When more payments wait, one summary counts them all; 0: never.
    pub summary_over: usize,
    /// Where messages go.
    pub sink: Sink,
    /// How often a paused channel is probed.
    pub probe_interval: Duration,
    /// The line of a COMPLETED payment.
    pub line_completed: Template,
    /// The line of a FAILED payment.
    pub line_failed: Template,
    /// The time zone of times.
    pub time_zone: TimeZone,
    /// The proxy to Slack, perhaps with a password.
    pub proxy: Option<Secret>,
    /// The trusted authorities for Slack, instead of the built-in list.
    pub ca_file: Option<PathBuf>,
    /// More channels; the first one that matches a payment gets it.
    pub routes: Vec<Route>,
}

/// `[[slack.route]]`: a channel for some payments.
#[derive(Debug, Clone)]
pub struct Route {
    /// Its name, for people and in the database.
    pub name: String,
    /// Where its messages go.
    pub webhook_url: Option<Secret>,
    /// `None`: either.
    pub status: Option<Status>,
    /// The amounts.
    pub amount: RangeInclusive<i64>,
    /// The users.
    pub user: RangeInclusive<i64>,
    /// As for the channel "default".
    pub messages_per_second: f64,
}

/// The channel of payments that match no route.
pub const DEFAULT_CHANNEL: &str = "default";

/// Messages a second. Slack accepts one; other services may accept more.
const PACE: RangeInclusive<f64> = 0.001..=100_000.0;

/// A POST cannot be cancelled, and a stop has to end within 10 s (`service::STOP_LIMIT`).
const SLACK_TIMEOUT_MAX: Duration = Duration::from_secs(8);

pub(super) fn read(s: &mut Source<'_>) -> Slack {
    let url_or_empty = "empty, or an http:// or https:// URL";
    Slack {
        webhook_url: webhook(s, "slack.webhook_url", url_or_empty),
        timeout: s.duration("slack.timeout", "5s", MS..=SLACK_TIMEOUT_MAX),
        messages_per_second: s.number("slack.messages_per_second", 1.0, PACE),
        burst: s.count("slack.burst", 3, 1..=1000),
        digest_over: s.integer("slack.digest_over", 5, 0..=1_000_000_000),
        digest_max: s.count("slack.digest_max", 200, 1..=500),
        summary_over: s.integer("slack.summary_over", 1000, 0..=1_000_000_000),
        sink: s.choice("slack.sink", &[("auto", Sink::Auto), ("log", Sink::Log)]),
        probe_interval: s.duration("slack.probe_interval", "5m", MS..=FOREVER),
        line_completed: s.template(
            "slack.line_completed",
            "Payment {id} COMPLETED: user {user_id} paid {amount} {currency} for reservation \
                {reservation_id}",
        ),
        line_failed: s.template(
            "slack.line_failed",
            "Payment {id} FAILED: user {user_id}, reservation {reservation_id}: {failure}",
        ),
        time_zone: s.zone("slack.time_zone", "UTC"),
        proxy: s.secret(
            "slack.proxy",
            "empty, or an http:// or https:// URL",
            is_url,
        ),
        ca_file: non_empty(s.text(
            "slack.ca_file",
            "",
            "empty, or the path of a file with PEM \
            certificates",
            |_| true,
        ))
        .map(PathBuf::from),
        routes: (0..s.tables("slack.route"))
            .map(|index| route(s, index))
            .collect(),
    }
}

/// Reads a webhook. Two channels with one webhook would post twice as fast as Slack allows.
fn webhook(s: &mut Source<'_>, key: &str, allowed: &str) -> Option<Secret> {
    let url = s.secret(key, allowed, is_url);
    if let Some(url) = &url
        && let Some(other) = s.remember_as("webhook", key, url.expose())
    {
        s.problem(format!(
            "{key} is the same as {other}: each channel needs a webhook of its own"
        ));
    }
    url
}

fn route(s: &mut Source<'_>, index: usize) -> Route {
    let key = |name: &str| format!("slack.route[{index}].{name}");
    let name = s.text(
        &key("name"),
        "",
        "1 to 32 lower-case letters, digits and '-', not \"default\"",
        |text| {
            text.len() <= 32
                && text
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && text != DEFAULT_CHANNEL
        },
    );
    if !s.is_set(&key("name")) {
        s.problem(format!(
            "{} is missing: people and the database know a channel by it",
            key("name")
        ));
    } else if !name.is_empty() {
        s.unique(&key("name"), &name);
    }
    let webhook_url = webhook(s, &key("webhook_url"), "an http:// or https:// URL");
    if !s.is_set(&key("webhook_url")) {
        s.problem(format!(
            "{} is missing: a route needs a webhook of its own",
            key("webhook_url")
        ));
    }
    let either = [
        ("", None),
        ("COMPLETED", Some(Status::Completed)),
        ("FAILED", Some(Status::Failed)),
    ];
    let status = s.choice(&key("status"), &either);
    let all = 0..=i64::MAX;
    let amount = s.integer(&key("amount_min"), 0, all.clone())
        ..=s.integer(&key("amount_max"), i64::MAX, all.clone());
    let user =
        s.integer(&key("user_min"), 0, all.clone())..=s.integer(&key("user_max"), i64::MAX, all);
    for (range, what) in [(&amount, "amount"), (&user, "user")] {
        if range.is_empty() {
            s.problem(format!(
                "{} is larger than {what}_max: no payment would fit",
                key(&format!("{what}_min"))
            ));
        }
    }
    let messages_per_second = s.number(&key("messages_per_second"), 1.0, PACE);
    Route {
        name,
        webhook_url,
        status,
        amount,
        user,
        messages_per_second,
    }
}
