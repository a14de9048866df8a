//! `[slack]` and `[[slack.route]]`: the channels, their pace, and the text of messages.

use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::duration::{FOREVER, MS};
use super::secret::Secret;
use super::typed_keys::TypedKeys;
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

pub(super) fn read_slack_section(keys: &mut TypedKeys<'_>) -> Slack {
    let url_or_empty = "empty, or an http:// or https:// URL";
    Slack {
        webhook_url: read_slack_webhook(keys, "slack.webhook_url", url_or_empty),
        timeout: keys.duration("slack.timeout", "5s", MS..=SLACK_TIMEOUT_MAX),
        messages_per_second: keys.number("slack.messages_per_second", 1.0, PACE),
        burst: keys.count("slack.burst", 3, 1..=1000),
        digest_over: keys.integer("slack.digest_over", 5, 0..=1_000_000_000),
        digest_max: keys.count("slack.digest_max", 200, 1..=500),
        summary_over: keys.integer("slack.summary_over", 1000, 0..=1_000_000_000),
        sink: keys.choice("slack.sink", &[("auto", Sink::Auto), ("log", Sink::Log)]),
        probe_interval: keys.duration("slack.probe_interval", "5m", MS..=FOREVER),
        line_completed: keys.template(
            "slack.line_completed",
            "Payment {id} COMPLETED: user {user_id} paid {amount} {currency} for reservation \
                {reservation_id}",
        ),
        line_failed: keys.template(
            "slack.line_failed",
            "Payment {id} FAILED: user {user_id}, reservation {reservation_id}: {failure}",
        ),
        time_zone: keys.zone("slack.time_zone", "UTC"),
        proxy: keys.secret(
            "slack.proxy",
            "empty, or an http:// or https:// URL",
            TypedKeys::is_url,
        ),
        ca_file: keys
            .optional_text(
                "slack.ca_file",
                "empty, or the path of a file with PEM certificates",
                |_| true,
            )
            .map(PathBuf::from),
        routes: (0..keys.tables("slack.route"))
            .map(|index| read_slack_route(keys, index))
            .collect(),
    }
}

/// Reads a webhook. Two channels with one webhook would post twice as fast as Slack allows.
fn read_slack_webhook(keys: &mut TypedKeys<'_>, key: &str, allowed: &str) -> Option<Secret> {
    let url = keys.secret(key, allowed, TypedKeys::is_url);
    if let Some(url) = &url
        && let Some(other) = keys.remember_as("webhook", key, url.expose())
    {
        keys.add_problem(format!(
            "{key} is the same as {other}: each channel needs a webhook of its own"
        ));
    }
    url
}

fn read_slack_route(keys: &mut TypedKeys<'_>, index: usize) -> Route {
    let key = |name: &str| format!("slack.route[{index}].{name}");
    let name = keys.text(
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
    if !keys.is_set(&key("name")) {
        keys.add_problem(format!(
            "{} is missing: people and the database know a channel by it",
            key("name")
        ));
    } else if !name.is_empty() {
        keys.require_unique_name(&key("name"), &name);
    }
    let webhook_url = read_slack_webhook(keys, &key("webhook_url"), "an http:// or https:// URL");
    if !keys.is_set(&key("webhook_url")) {
        keys.add_problem(format!(
            "{} is missing: a route needs a webhook of its own",
            key("webhook_url")
        ));
    }
    let either = [
        ("", None),
        ("COMPLETED", Some(Status::Completed)),
        ("FAILED", Some(Status::Failed)),
    ];
    let status = keys.choice(&key("status"), &either);
    let all = 0..=i64::MAX;
    let amount = keys.integer(&key("amount_min"), 0, all.clone())
        ..=keys.integer(&key("amount_max"), i64::MAX, all.clone());
    let user = keys.integer(&key("user_min"), 0, all.clone())
        ..=keys.integer(&key("user_max"), i64::MAX, all);
    for (range, name) in [(&amount, "amount"), (&user, "user")] {
        if range.is_empty() {
            keys.add_problem(format!(
                "{} is larger than {name}_max: no payment would fit",
                key(&format!("{name}_min"))
            ));
        }
    }
    let messages_per_second = keys.number(&key("messages_per_second"), 1.0, PACE);
    Route {
        name,
        webhook_url,
        status,
        amount,
        user,
        messages_per_second,
    }
}
