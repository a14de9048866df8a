//! Whether the brokers and the webhooks' hosts can be reached, and the topic be used. Nothing is
//! published or posted.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use payrelay::config::{Config, PublisherKind, Sink, Slack};
use payrelay::domain::node_id::NodeId;
use payrelay::kafka::topic_rights::{TopicRights, find_topic_rights};
use payrelay::runtime::plural::counted;
use payrelay::slack::channel::channel_webhooks;

use super::{Checks, Verdict};

/// A host that needs longer is not reachable.
const TIMEOUT: Duration = Duration::from_secs(3);

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

pub(super) fn check_slack(checks: &mut Checks, slack: &Slack) {
    for (name, webhook) in channel_webhooks(slack) {
        let check = format!("slack {name}");
        match webhook.filter(|_| slack.sink == Sink::Auto) {
            None => checks.add(Verdict::Note, check, "messages go to the log"),
            Some(webhook) => {
                let url = slack.proxy.as_ref().unwrap_or(webhook).expose();
                check_address(checks, &check, &address_of_url(url));
            }
        }
    }
}

/// Host and port of a URL. Its path is a secret.
fn address_of_url(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = authority.rsplit('@').next().unwrap_or(authority);
    let after_brackets = host.rsplit(']').next().unwrap_or(host);
    if after_brackets.contains(':') {
        host.to_owned()
    } else {
        format!("{host}:{}", if scheme == "https" { 443 } else { 80 })
    }
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
    fn the_address_of_a_url_has_its_port_and_no_secret() {
        let address = |url| address_of_url(url);
        assert_eq!(
            address("https://hooks.slack.com/services/a/b"),
            "hooks.slack.com:443"
        );
        assert_eq!(address("http://kim:secret@proxy:3128"), "proxy:3128");
        assert_eq!(address("http://[::1]/a"), "[::1]:80");
        assert_eq!(address("http://[::1]:8080"), "[::1]:8080");
    }
}
