//! Whether the brokers and the webhooks' hosts can be reached, and the topic be used. Nothing is
//! published, and nothing posted unless that is wanted.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use payrelay::config::{Config, PublisherKind, Sink, Slack};
use payrelay::domain::node_id::NodeId;
use payrelay::domain::timestamp::Timestamp;
use payrelay::kafka::topic_rights::{TopicRights, find_topic_rights};
use payrelay::runtime::plural::counted;
use payrelay::slack::channel::channel_webhooks;
use payrelay::slack::webhook::probe::WebhookProbe;
use payrelay::slack::webhook::{PostOutcome, Webhook};

use super::{Checks, PostToSlack, Verdict};

/// A host that needs longer is not reachable.
const TIMEOUT: Duration = Duration::from_secs(3);

/// More than this is a finding: a payment gets the wrong time, or the wrong day.
const CLOCK_OFF_MAX: Duration = Duration::from_secs(5);

pub(super) fn check_kafka(checks: &mut Checks, config: &Config, node: Option<&NodeId>) {
    if config.publisher.kind == PublisherKind::Application {
        return checks.add(Verdict::Note, "kafka", "publisher.kind is \"application\"");
    }
    let settings = &config.kafka;
    let mut is_reachable = false;
    for server in &settings.bootstrap_servers {
        is_reachable |= check_address(checks, "kafka", server);
    }
    // Errors name the node, whose transactional ids need a right. Before the first start it has no
    // id yet.
    let node = node.cloned().or_else(|| NodeId::parse("NODE"));
    if let Some(node) = node.filter(|_| is_reachable) {
        let rights = find_topic_rights(settings, &node);
        let (verdict, detail) = judge_topic(&settings.topic, rights);
        checks.add(verdict, "kafka topic", detail);
    }
}

fn judge_topic(topic: &str, rights: Result<Option<TopicRights>, String>) -> (Verdict, String) {
    match rights {
        Err(error) => (Verdict::Fail, error),
        Ok(None) => {
            let detail = format!("{topic} does not exist yet: a start creates it, if it may");
            (Verdict::Note, detail)
        }
        Ok(Some(rights)) => {
            let missing: Vec<_> = [("READ", rights.may_read), ("WRITE", rights.may_write)]
                .into_iter()
                .filter(|(_, is_granted)| !is_granted)
                .map(|(right, _)| right)
                .collect();
            if missing.is_empty() {
                let partitions = counted(rights.partitions, "partition");
                (
                    Verdict::Ok,
                    format!("{topic}: {partitions}, rights to read and write"),
                )
            } else {
                let detail = format!("{topic}: no right to it: grant {}", missing.join(" and "));
                (Verdict::Fail, detail)
            }
        }
    }
}

/// Connects to the host of each webhook, and posts a message only if that is wanted.
pub(super) fn check_slack(checks: &mut Checks, slack: &Slack, post: PostToSlack) {
    for (name, webhook) in channel_webhooks(slack) {
        let check = format!("slack {name}");
        let Some(url) = webhook.filter(|_| slack.sink == Sink::Auto) else {
            checks.add(Verdict::Note, check, "messages go to the log");
            continue;
        };
        let (verdict, detail) = match Webhook::new(url.clone(), slack) {
            Err(error) => (Verdict::Fail, error.to_string()),
            Ok(webhook) => match webhook.probe() {
                Err(error) => (Verdict::Fail, error),
                Ok(probe) => {
                    check_clock_of_host(checks, &check, &probe);
                    match post {
                        PostToSlack::No => (Verdict::Ok, describe_probe(&probe)),
                        PostToSlack::Yes => post_to_slack(&webhook),
                    }
                }
            },
        };
        checks.add(verdict, check, detail);
    }
}

fn describe_probe(probe: &WebhookProbe) -> String {
    let ms = probe.elapsed.as_millis();
    let tls = if probe.is_tls { ", TLS" } else { "" };
    format!(
        "name resolved{tls}, answered in {ms} ms (nothing posted; --post-to-slack sends one \
            message)"
    )
}

fn post_to_slack(webhook: &Webhook) -> (Verdict, String) {
    let text = "payrelay doctor: this message is a test, and no payment";
    match webhook.post(&serde_json::json!({ "text": text })) {
        PostOutcome::Accepted(None) => (Verdict::Ok, "accepted a test message".to_owned()),
        PostOutcome::Accepted(Some(remark)) => (Verdict::Note, remark),
        PostOutcome::RateLimited(_) => (Verdict::Note, "rate limited: try later".to_owned()),
        PostOutcome::Unavailable(reason, _)
        | PostOutcome::Unknown(reason)
        | PostOutcome::PayloadRejected(reason)
        | PostOutcome::ChannelDisabled(reason) => (Verdict::Fail, reason),
    }
}

/// A clock that is off shows in every time that payrelay stores.
fn check_clock_of_host(checks: &mut Checks, check: &str, probe: &WebhookProbe) {
    if let Some(time) = probe.host_time {
        let (verdict, detail) = judge_clock(Timestamp::now(), time);
        checks.add(verdict, format!("clock of {check}"), detail);
    }
}

/// The host's time has whole seconds, and is older by the way of its answer.
fn judge_clock(own: Timestamp, host: Timestamp) -> (Verdict, String) {
    let ahead = own.since(host).as_secs();
    let behind = host.since(own).as_secs();
    let detail = match (ahead, behind) {
        (0..=2, 0..=2) => "this machine's is within 2 s of it".to_owned(),
        (0, behind) => format!("this machine's is {} behind", counted(behind, "second")),
        (ahead, _) => format!("this machine's is {} ahead", counted(ahead, "second")),
    };
    let is_off = ahead.max(behind) > CLOCK_OFF_MAX.as_secs();
    (if is_off { Verdict::Fail } else { Verdict::Ok }, detail)
}

/// Returns whether it can be reached.
fn check_address(checks: &mut Checks, check: &str, address: &str) -> bool {
    let begun = Instant::now();
    match connect_to_address(address) {
        Ok(()) => {
            let detail = format!("{address}: connected in {} ms", begun.elapsed().as_millis());
            checks.add(Verdict::Ok, check, detail);
            true
        }
        Err(error) => {
            checks.add(Verdict::Fail, check, format!("{address}: {error}"));
            false
        }
    }
}

/// Tries each address of a name.
fn connect_to_address(address: &str) -> io::Result<()> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_right_to_the_topic_is_named() {
        let judge = |may_read, may_write| {
            let rights = TopicRights {
                partitions: 3,
                may_read,
                may_write,
            };
            judge_topic("t", Ok(Some(rights)))
        };
        assert_eq!(judge(true, true).0, Verdict::Ok);
        let (verdict, detail) = judge(true, false);
        assert!(
            verdict == Verdict::Fail && detail.ends_with("grant WRITE"),
            "{detail}"
        );
        assert!(judge(false, false).1.ends_with("grant READ and WRITE"));
        assert_eq!(judge_topic("t", Ok(None)).0, Verdict::Note);
    }

    #[test]
    fn a_clock_is_compared_with_that_of_a_host() {
        let time = |text| Timestamp::parse(text).unwrap();
        let judge = |own| judge_clock(time(own), time("2026-11-27T12:00:00Z"));
        assert_eq!(judge("2026-11-27T12:00:02.9Z").0, Verdict::Ok);
        let (verdict, detail) = judge("2026-11-27T12:01:00Z");
        assert!(verdict == Verdict::Fail && detail.ends_with("60 seconds ahead"));
        let (verdict, detail) = judge("2026-11-27T11:59:57Z");
        assert!(verdict == Verdict::Ok && detail.ends_with("3 seconds behind"));
    }
}
