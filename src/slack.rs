//! Slack's incoming webhook: one POST, one answer (<https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks/>).
//!
//! Says what came of a POST; never decides when to try again. The webhook's URL is a secret: no error shows it.

use std::io::Read as _;
use std::time::Duration;

use crate::config::{self, Secret};

/// An incoming webhook.
pub struct Slack {
    agent: ureq::Agent,
    url: Secret,
}

/// A message that Slack has not said to have.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotDelivered(String);

/// How long connecting may take, within the whole.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How much of an error's answer is read and shown: Slack's errors are single words.
const ANSWER_MAX: u64 = 200;

impl Slack {
    /// A client for one webhook. Connects when it first posts, and keeps the connection.
    pub fn new(url: Secret, settings: &config::Slack) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(settings.timeout))
            .timeout_connect(Some(CONNECT_TIMEOUT.min(settings.timeout)))
            // Every answer is told apart here; by default a 429 would come without its headers.
            .http_status_as_error(false)
            // A webhook does not move: what redirects is not Slack.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("payrelay/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self { agent, url }
    }

    /// Posts one message. Success is a 2xx answer, and nothing else is.
    pub fn post(&self, text: &str) -> Result<(), NotDelivered> {
        let body = serde_json::json!({ "text": escape(text) }).to_string();
        let sent = self.agent.post(self.url.expose()).content_type("application/json; charset=utf-8").send(body);
        let mut answer = sent.map_err(|error| self.failed(&error))?;
        let status = answer.status();
        if status.is_success() {
            // Reading the answer to its end frees the connection for the next message.
            let _ = answer.body_mut().read_to_vec();
            return Ok(());
        }
        let mut word = Vec::new();
        let _ = answer.body_mut().as_reader().take(ANSWER_MAX).read_to_end(&mut word);
        let word = String::from_utf8_lossy(&word);
        Err(NotDelivered(format!("Slack answered {} {:?}", status.as_u16(), word.trim())))
    }

    fn failed(&self, error: &ureq::Error) -> NotDelivered {
        NotDelivered(error.to_string().replace(self.url.expose(), "(the webhook)"))
    }
}

/// The three characters that mean something in Slack's mrkdwn (<https://docs.slack.dev/messaging/formatting-message-text/>).
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_what_slack_would_read_as_markup() {
        assert_eq!(escape("a < b && c > d"), "a &lt; b &amp;&amp; c &gt; d");
    }
}
