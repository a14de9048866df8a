//! A channel: its webhook, its pace and the look of its messages, from the configuration.

use std::time::Duration;

use super::message::MessageStyle;
use super::webhook::{SlackConfigError, Webhook};
use crate::config::{self, Config, DEFAULT_CHANNEL, Secret};

/// Where the messages of a channel go.
#[derive(Debug)]
pub enum Sink {
    /// An incoming webhook of Slack.
    Webhook(Box<Webhook>),
    /// The log: no webhook is configured.
    Log,
}

/// The configuration of one channel.
#[derive(Debug)]
pub struct SlackChannel {
    /// Its name, also in the delivery table.
    pub name: String,
    /// Where its messages go.
    pub sink: Sink,
    /// The look of its messages.
    pub style: MessageStyle,
    /// Messages a second, in the long run.
    pub messages_per_second: f64,
    /// Messages at once after a quiet time.
    pub burst: usize,
    /// When more payments wait, they share a digest.
    pub digest_over: usize,
    /// The maximum number of payments of one digest.
    pub digest_max: usize,
    /// When more payments wait, one summary counts them all; 0: never.
    pub summary_over: usize,
    /// How often a paused channel is probed.
    pub probe_interval: Duration,
}

impl SlackChannel {
    /// The channel "default", then those of the routes.
    pub fn all(config: &Config) -> Result<Vec<Self>, SlackConfigError> {
        let slack = &config.slack;
        let paces = [slack.messages_per_second]
            .into_iter()
            .chain(slack.routes.iter().map(|route| route.messages_per_second));
        channel_webhooks(slack)
            .zip(paces)
            .map(|((name, url), pace)| Self::new(config, name, url, pace))
            .collect()
    }

    fn new(
        config: &Config,
        name: &str,
        url: Option<&Secret>,
        messages_per_second: f64,
    ) -> Result<Self, SlackConfigError> {
        let slack = &config.slack;
        let sink = match url.filter(|_| slack.sink == config::Sink::Auto) {
            Some(url) => Sink::Webhook(Box::new(Webhook::new(url.clone(), slack)?)),
            None => Sink::Log,
        };
        Ok(Self {
            name: name.to_owned(),
            sink,
            style: MessageStyle {
                completed: slack.line_completed.clone(),
                failed: slack.line_failed.clone(),
                zone: slack.time_zone.clone(),
                public_url: config.http.public_url.clone(),
            },
            messages_per_second,
            burst: slack.burst.get(),
            digest_over: slack.digest_over,
            digest_max: slack.digest_max.get(),
            summary_over: slack.summary_over,
            probe_interval: slack.probe_interval,
        })
    }

    /// Its name on the health page.
    pub fn component(&self) -> String {
        if self.name == DEFAULT_CHANNEL {
            "slack".to_owned()
        } else {
            format!("slack:{}", self.name)
        }
    }

    /// Its name in log lines.
    pub(super) fn display_name(&self) -> String {
        if self.name == DEFAULT_CHANNEL {
            "Slack".to_owned()
        } else {
            format!("Slack ({})", self.name)
        }
    }
}

/// The channels and their webhooks: "default", then the routes.
pub fn channel_webhooks(slack: &config::Slack) -> impl Iterator<Item = (&str, Option<&Secret>)> {
    let routes = slack
        .routes
        .iter()
        .map(|route| (route.name.as_str(), route.webhook_url.as_ref()));
    [(DEFAULT_CHANNEL, slack.webhook_url.as_ref())]
        .into_iter()
        .chain(routes)
}

/// Warns when messages go to the log, and when others on the network can read a webhook's URL.
pub fn warn_of_channel_risks(slack: &config::Slack) {
    if slack.sink == config::Sink::Log {
        log::warn!(event = "slack_to_log"; "slack.sink is \"log\": messages go to this log only");
    } else if slack.webhook_url.is_none() {
        log::warn!(
            event = "slack_to_log";
            "slack.webhook_url is not set: messages go to this log only"
        );
    }
    for (name, url) in channel_webhooks(slack) {
        if url.is_some_and(is_channel_readable_in_transit) {
            log::warn!(
                event = "webhook_in_clear", channel = name;
                "channel {name}: its webhook_url is http://, so hosts on the way can read it; use \
                    https://"
            );
        }
    }
}

/// Whether a webhook's URL goes over the network in clear.
fn is_channel_readable_in_transit(url: &Secret) -> bool {
    let Some(rest) = url.expose().strip_prefix("http://") else {
        return false;
    };
    let host = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = host.rsplit('@').next().unwrap_or(host);
    let is_local = ["localhost", "127.", "[::1]"]
        .iter()
        .any(|name| host.starts_with(name));
    !is_local
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_in_clear_beyond_this_machine_is_readable_in_transit() {
        let readable = |url: &str| is_channel_readable_in_transit(&Secret::new(url));
        for url in [
            "http://hooks.example/x",
            "http://10.0.0.1:80/x",
            "http://u:p@hooks.example",
        ] {
            assert!(readable(url), "{url}");
        }
        for url in [
            "https://hooks.example/x",
            "http://127.0.0.1:1/x",
            "http://localhost/x",
            "http://[::1]:1/x",
        ] {
            assert!(!readable(url), "{url}");
        }
    }
}
