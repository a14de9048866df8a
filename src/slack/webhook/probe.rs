//! Whether a webhook's host can be reached, for `payrelay doctor`. Nothing is posted.

use std::time::{Duration, Instant};

use super::Webhook;
use crate::domain::timestamp::Timestamp;

/// What the webhook's host answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookProbe {
    /// For the name, the connection, TLS and the answer.
    pub elapsed: Duration,
    /// Whether the connection had TLS.
    pub is_tls: bool,
    /// The time of the host, which has whole seconds, if it names it.
    pub host_time: Option<Timestamp>,
}

impl Webhook {
    /// Requests the head of the host's start page: the path of the webhook is not sent. Any answer
    /// will do.
    pub fn probe(&self) -> Result<WebhookProbe, String> {
        let url = self.url.expose();
        let started = Instant::now();
        let answer = self
            .agent
            .head(origin_of_url(url))
            .call()
            .map_err(|error| self.redact(&self.describe_error(&error)))?;
        let date = answer.headers().get("date");
        let date = date.and_then(|date| date.to_str().ok());
        Ok(WebhookProbe {
            elapsed: started.elapsed(),
            is_tls: url.starts_with("https://"),
            host_time: date.and_then(Timestamp::parse_http_date),
        })
    }
}

/// A URL up to its path.
fn origin_of_url(url: &str) -> &str {
    let path = url.find("://").and_then(|at| {
        url[at + 3..]
            .find(['/', '?', '#'])
            .map(|path| at + 3 + path)
    });
    path.map_or(url, |path| &url[..path])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_sends_no_path_of_a_webhook() {
        assert_eq!(
            origin_of_url("https://hooks.slack.com/services/a/b"),
            "https://hooks.slack.com"
        );
        assert_eq!(origin_of_url("http://[::1]:80?a=b"), "http://[::1]:80");
        assert_eq!(origin_of_url("http://a"), "http://a");
    }
}
