//! Whether the brokers and the webhooks' hosts can be reached. A connection is opened and closed;
//! nothing is sent.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use payrelay::config::{Config, PublisherKind, Sink, Slack};
use payrelay::slack::channel::channel_webhooks;

use super::{Checks, Verdict};
use crate::cli::table::show_age;

/// A host that needs longer is not reachable.
const TIMEOUT: Duration = Duration::from_secs(3);

pub(super) fn check_kafka(checks: &mut Checks, config: &Config) {
    if config.publisher.kind == PublisherKind::Application {
        return checks.add(Verdict::Note, "kafka", "publisher.kind is \"application\"");
    }
    for server in &config.kafka.bootstrap_servers {
        check_address(checks, "kafka", server);
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

fn check_address(checks: &mut Checks, check: &str, address: &str) {
    let begun = Instant::now();
    match connect_to_address(address) {
        Ok(()) => {
            let detail = format!("{address}: connected in {}", show_age(begun.elapsed()));
            checks.add(Verdict::Ok, check, detail);
        }
        Err(error) => checks.add(Verdict::Fail, check, format!("{address}: {error}")),
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
