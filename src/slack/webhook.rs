//! Slack's incoming webhook: one POST, and its outcome
//! (<https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks/>).
//!
//! It never decides when to retry; [`isolation`](super::isolation) decides the meaning of a
//! rejection. The URLs of the webhook and of the proxy are secrets: no error shows them.

pub mod probe;

use std::io::{self, Read as _};
use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, fs};

use serde_json::Value;
use ureq::http::Uri;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::transport::DefaultConnector;

use super::resolver::{DnsResolver, LookupFailed};
use crate::config::{self, Secret};
use crate::domain::timestamp::Timestamp;
use crate::runtime::metrics::channel::PostResult;

/// An incoming webhook.
pub struct Webhook {
    agent: ureq::Agent,
    timeout: Duration,
    url: Secret,
    proxy: Option<Secret>,
}

/// The outcome of a POST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PostOutcome {
    /// A 2xx response that can come from Slack: the channel accepted the message. With a remark if
    /// the response is unusual.
    Accepted(Option<String>),
    /// 429: no message may be posted for this duration, if Slack names one.
    RateLimited(Option<Duration>),
    /// Not accepted, and a later attempt may succeed, after this time if the server names one: 5xx,
    /// no connection.
    Unavailable(String, Option<Duration>),
    /// Sent, but without a response: it may appear or not.
    Unknown(String),
    /// This message is rejected, another one might be accepted: 400, 413.
    PayloadRejected(String),
    /// The channel rejects everything until an operator acts: 403, 404, 410, a redirect.
    ChannelDisabled(String),
}

impl PostOutcome {
    /// As it is counted.
    pub fn kind(&self) -> PostResult {
        match self {
            Self::Accepted(_) => PostResult::Accepted,
            Self::RateLimited(_) => PostResult::RateLimited,
            Self::Unavailable(..) => PostResult::Unavailable,
            Self::Unknown(_) => PostResult::Unknown,
            Self::PayloadRejected(_) => PostResult::PayloadRejected,
            Self::ChannelDisabled(_) => PostResult::ChannelDisabled,
        }
    }
}

/// A webhook whose configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SlackConfigError {
    /// The certificates cannot be read.
    #[error("slack.ca_file {path}: {reason}")]
    Certificates {
        /// As configured.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The webhook's URL is invalid; it is not shown.
    #[error("a webhook_url of [slack] or [[slack.route]] is no URL")]
    Webhook,
    /// The thread for DNS lookups cannot be started.
    #[error("the operating system starts no further thread: {0}")]
    Thread(io::Error),
    /// The proxy's URL is invalid; it may hold a password and is not shown.
    #[error("slack.proxy is no URL of a proxy")]
    Proxy,
}

/// How much of a failed response is read and shown: Slack's errors are single words.
const ANSWER_MAX: u64 = 200;

impl Webhook {
    /// A client for one webhook. Connects for each message.
    pub fn new(url: Secret, settings: &config::Slack) -> Result<Self, SlackConfigError> {
        if url.expose().parse::<Uri>().is_err() {
            return Err(SlackConfigError::Webhook);
        }
        let roots =
            match &settings.ca_file {
                None => RootCerts::WebPki,
                Some(path) => RootCerts::new_with_certs(&read_webhook_certificates(path).map_err(
                    |reason| SlackConfigError::Certificates {
                        path: path.clone(),
                        reason,
                    },
                )?),
            };
        let proxy = match &settings.proxy {
            None => None,
            Some(url) => Some(ureq::Proxy::new(url.expose()).map_err(|_| SlackConfigError::Proxy)?),
        };
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(settings.timeout))
            // Each well below the whole, so that the error names the slow step: before the request
            // is sent, nothing can have been delivered.
            .timeout_resolve(Some(Self::resolve_timeout(settings.timeout)))
            .timeout_connect(Some(Self::connect_timeout(settings.timeout)))
            // The status is examined here; by default a 429 would come without its headers.
            .http_status_as_error(false)
            // The other side may have closed an idle connection without our knowledge: a message on
            // it would have an unknown outcome. At a message a second a new connection costs
            // little.
            .max_idle_connections(0)
            // A webhook does not move: a server that redirects is not Slack.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // Not from the environment: the configuration shows the proxy in effect.
            .proxy(proxy)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .user_agent(concat!("payrelay/", env!("CARGO_PKG_VERSION")))
            .build();
        let names = DnsResolver::start().map_err(SlackConfigError::Thread)?;
        let agent = ureq::Agent::with_parts(agent, DefaultConnector::default(), names);
        Ok(Self {
            agent,
            timeout: settings.timeout,
            url,
            proxy: settings.proxy.clone(),
        })
    }

    /// Posts one message.
    pub fn post(&self, message: &Value) -> PostOutcome {
        let request = self
            .agent
            .post(self.url.expose())
            .content_type("application/json; charset=utf-8");
        let mut answer = match request.send(message.to_string()) {
            Ok(answer) => answer,
            Err(error) => return self.classify_error(&error),
        };
        let mut body = Vec::new();
        let _ = answer
            .body_mut()
            .as_reader()
            .take(ANSWER_MAX)
            .read_to_end(&mut body);
        let header = |name| {
            answer
                .headers()
                .get(name)
                .map(ureq::http::HeaderValue::as_bytes)
        };
        let retry_after = header("retry-after");
        let content_type = header("content-type");
        parse_webhook_response(
            answer.status().as_u16(),
            retry_after,
            content_type,
            &body,
            Timestamp::now(),
        )
    }

    /// Before the request was sent, nothing can have been delivered; afterwards the outcome is
    /// unknown.
    fn classify_error(&self, error: &ureq::Error) -> PostOutcome {
        let is_unsent = match error {
            ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::ConnectProxyFailed(_)
            | ureq::Error::Tls(_)
            | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => true,
            ureq::Error::Other(error) => error.is::<LookupFailed>(),
            ureq::Error::Io(error) => Self::is_unsent(error),
            _ => false,
        };
        let text = self.redact(&self.describe_error(error));
        if is_unsent {
            PostOutcome::Unavailable(text, None)
        } else {
            PostOutcome::Unknown(text)
        }
    }

    fn resolve_timeout(whole: Duration) -> Duration {
        whole / 4
    }

    fn connect_timeout(whole: Duration) -> Duration {
        whole / 3
    }

    /// An error in plain words. A timeout names the step that was too slow.
    fn describe_error(&self, error: &ureq::Error) -> String {
        let after = |timeout: Duration| format!("after {:.1} s", timeout.as_secs_f64());
        let whole = format!("{} (slack.timeout)", after(self.timeout));
        match error {
            ureq::Error::Timeout(ureq::Timeout::Resolve) => format!(
                "no DNS answer {}",
                after(Self::resolve_timeout(self.timeout))
            ),
            ureq::Error::Timeout(ureq::Timeout::Connect) => format!(
                "no connection {}",
                after(Self::connect_timeout(self.timeout))
            ),
            ureq::Error::Timeout(
                ureq::Timeout::SendRequest | ureq::Timeout::SendBody | ureq::Timeout::PerWrite,
            ) => format!("the request was not sent {whole}"),
            ureq::Error::Timeout(_) => format!("no response {whole}"),
            ureq::Error::Other(error) if error.is::<LookupFailed>() => {
                format!("the DNS lookup failed: {error}")
            }
            ureq::Error::Io(error) => error.to_string(),
            error => error.to_string(),
        }
    }

    /// Whether an error came before the request was sent: no connection, or an untrusted
    /// certificate.
    fn is_unsent(error: &io::Error) -> bool {
        use io::ErrorKind as Kind;
        let tls_error = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        matches!(tls_error, Some(rustls::Error::InvalidCertificate(_)))
            || matches!(
                error.kind(),
                Kind::ConnectionRefused
                    | Kind::HostUnreachable
                    | Kind::NetworkUnreachable
                    | Kind::NetworkDown
                    | Kind::AddrNotAvailable
                    | Kind::PermissionDenied
            )
    }

    /// Removes the webhook, whose path alone is as secret as the whole, and the proxy.
    fn redact(&self, text: &str) -> String {
        let url = self.url.expose();
        let mut text = text.replace(url, "(the webhook)");
        if let Some(path) = url.splitn(4, '/').nth(3).filter(|path| !path.is_empty()) {
            text = text.replace(path, "(the webhook)");
        }
        match &self.proxy {
            Some(proxy) => text.replace(proxy.expose(), "(the proxy)"),
            None => text,
        }
    }
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Webhook(***)")
    }
}

/// The meaning of a response: its status, its `Retry-After`, the beginning of its body.
fn parse_webhook_response(
    status: u16,
    retry_after: Option<&[u8]>,
    content_type: Option<&[u8]>,
    body: &[u8],
    now: Timestamp,
) -> PostOutcome {
    let body = String::from_utf8_lossy(body);
    let retry_after = retry_after.and_then(|bytes| std::str::from_utf8(bytes).ok());
    let retry_after = retry_after.and_then(|text| parse_webhook_retry_after(text, now));
    if (200..300).contains(&status) {
        let is_html =
            content_type.is_some_and(|text| text.to_ascii_lowercase().starts_with(b"text/html"));
        if body.trim_start().starts_with('<') || is_html && !is_webhook_word(body.trim()) {
            let error = format!("the answer {status} is a page, not Slack's");
            return PostOutcome::Unavailable(error, None);
        }
        return classify_webhook_success(status, body.trim(), retry_after);
    }
    classify_webhook_error(status, body.trim(), retry_after)
}

/// Whether a body is a single word, such as `ok`. Slack sends these as `text/html`
/// (<https://github.com/slackapi/node-slack-sdk/pull/480>). A page is more than a word.
fn is_webhook_word(body: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    !body.is_empty() && body.bytes().all(is_letter)
}

/// Slack's words for a disabled channel, and for a rejected message
/// (<https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks/#handling_errors>).
const CHANNEL_ERRORS: [&str; 11] = [
    "action_prohibited",
    "channel_is_archived",
    "channel_not_found",
    "invalid_token",
    "no_active_hooks",
    "no_service",
    "no_service_id",
    "no_team",
    "posting_to_general_channel_denied",
    "team_disabled",
    "user_not_found",
];
const PAYLOAD_ERRORS: [&str; 5] = [
    "invalid_blocks",
    "invalid_payload",
    "msg_too_long",
    "no_text",
    "too_many_attachments",
];
const LIMIT_ERRORS: [&str; 2] = ["rate_limited", "ratelimited"];

/// Not every 2xx means that the message was accepted: some services put an error into it.
fn classify_webhook_success(status: u16, body: &str, retry_after: Option<Duration>) -> PostOutcome {
    let json: Option<Value> = serde_json::from_str(body).ok().filter(Value::is_object);
    let says = |name: &str| json.as_ref().and_then(|json| json[name].as_bool());
    let error = json
        .as_ref()
        .map_or(Some(body), |json| json["error"].as_str());
    let known = |words: &[&str]| error.is_some_and(|error| words.contains(&error));
    if known(&CHANNEL_ERRORS) {
        PostOutcome::ChannelDisabled(format!(
            "Slack answered {status} {}",
            error.unwrap_or_default()
        ))
    } else if known(&PAYLOAD_ERRORS) {
        PostOutcome::PayloadRejected(format!(
            "Slack answered {status} {}",
            error.unwrap_or_default()
        ))
    } else if known(&LIMIT_ERRORS) {
        PostOutcome::RateLimited(retry_after)
    } else if says("ok") == Some(false) || says("success") == Some(false) {
        PostOutcome::Unavailable(
            format!("Slack answered {status}, and that it did not accept the message"),
            retry_after,
        )
    } else if matches!(status, 202 | 204)
        || body.is_empty()
        || body == "ok"
        || says("ok") == Some(true)
        || says("success") == Some(true)
    {
        PostOutcome::Accepted(None)
    } else {
        PostOutcome::Accepted(Some(format!(
            "the answer {status} has a body that Slack does not send"
        )))
    }
}

/// The meaning of a response that is no success
/// (<https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks/#handling_errors>).
fn classify_webhook_error(status: u16, body: &str, retry_after: Option<Duration>) -> PostOutcome {
    // Slack's error is a code of one word; any other body may be a page that repeats the webhook.
    let is_code = (1..=64).contains(&body.len())
        && body
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let text = if is_code {
        format!("Slack answered {status} {body}")
    } else {
        format!("Slack answered {status}")
    };
    match status {
        429 => PostOutcome::RateLimited(retry_after),
        400 | 413 | 422 => PostOutcome::PayloadRejected(text),
        408 | 425 | 500..=599 => PostOutcome::Unavailable(text, retry_after),
        _ => PostOutcome::ChannelDisabled(text),
    }
}

/// Seconds, or a date (RFC 9110, 10.2.3).
fn parse_webhook_retry_after(text: &str, now: Timestamp) -> Option<Duration> {
    let text = text.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Timestamp::parse_http_date(text).map(|time| time.since(now)),
    }
}

fn read_webhook_certificates(path: &PathBuf) -> Result<Vec<Certificate<'static>>, String> {
    let pem = fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    let mut found = Vec::new();
    for item in parse_pem(&pem) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate),
            Ok(_) => {}
            Err(error) => return Err(format!("is not PEM: {error}")),
        }
    }
    if found.is_empty() {
        Err("has no certificate in PEM".to_owned())
    } else {
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_timeout_of_a_webhook_names_the_slow_step_in_plain_words() {
        let mut settings = config::Config::load("", &std::collections::BTreeMap::new())
            .unwrap()
            .config
            .slack;
        settings.timeout = Duration::from_secs(6);
        let url = Secret::new("https://hooks.example/hush");
        let webhook = Webhook::new(url, &settings).unwrap();
        let outcome = |step| webhook.classify_error(&ureq::Error::Timeout(step));
        assert_eq!(
            outcome(ureq::Timeout::Resolve),
            PostOutcome::Unavailable("no DNS answer after 1.5 s".into(), None)
        );
        assert_eq!(
            outcome(ureq::Timeout::Connect),
            PostOutcome::Unavailable("no connection after 2.0 s".into(), None)
        );
        assert_eq!(
            outcome(ureq::Timeout::Global),
            PostOutcome::Unknown("no response after 6.0 s (slack.timeout)".into())
        );
    }

    #[test]
    fn every_status_of_a_webhook_has_a_meaning() {
        let of = |status| classify_webhook_error(status, "x", None);
        assert_eq!(of(429), PostOutcome::RateLimited(None));
        for status in [400, 413] {
            assert!(
                matches!(of(status), PostOutcome::PayloadRejected(_)),
                "{status}"
            );
        }
        for status in [500, 502, 503, 504, 599, 408] {
            assert!(
                matches!(of(status), PostOutcome::Unavailable(_, None)),
                "{status}"
            );
        }
        for status in [301, 302, 307, 308, 401, 403, 404, 405, 410] {
            assert!(
                matches!(of(status), PostOutcome::ChannelDisabled(_)),
                "{status}"
            );
        }
    }

    fn outcome_of_webhook(status: u16, content_type: &str, body: &str) -> PostOutcome {
        let content_type = Some(content_type.as_bytes());
        let now = Timestamp::from_micros(0);
        parse_webhook_response(status, None, content_type, body.as_bytes(), now)
    }

    #[test]
    fn only_a_webhook_response_that_can_be_slacks_counts_as_delivered() {
        for (status, content_type, body) in [
            (200, "text/html", "ok"),
            (200, "text/html; charset=utf-8", "ok\n"),
            (200, "text/plain", "ok"),
            (200, "text/plain", ""),
            (202, "text/plain", "queued"),
            (204, "", ""),
            (200, "application/json", r#"{"ok":true}"#),
            (200, "application/json", r#"{"success":true,"id":7}"#),
        ] {
            let outcome = outcome_of_webhook(status, content_type, body);
            assert_eq!(
                outcome,
                PostOutcome::Accepted(None),
                "{content_type} {body}"
            );
        }
        for (content_type, body) in [
            ("text/plain", "thank you"),
            ("application/json", r#"{"id":7}"#),
        ] {
            let outcome = outcome_of_webhook(200, content_type, body);
            assert!(matches!(outcome, PostOutcome::Accepted(Some(_))), "{body}");
        }
    }

    #[test]
    fn a_webhook_that_answers_200_with_a_page_or_an_error_delivers_nothing() {
        for (content_type, body) in [
            ("text/html", "please log in"),
            ("text/plain", "<html>"),
            ("text/html; charset=utf-8", ""),
            ("application/json", r#"{"ok":false}"#),
            ("application/json", r#"{"ok":false,"error":"fatal_error"}"#),
            ("application/json", r#"{"success":false}"#),
        ] {
            let outcome = outcome_of_webhook(200, content_type, body);
            assert!(matches!(outcome, PostOutcome::Unavailable(..)), "{body}");
        }
        let disabled = outcome_of_webhook(200, "text/html", "no_service");
        assert!(matches!(disabled, PostOutcome::ChannelDisabled(_)));
        let invalid = r#"{"ok":false,"error":"invalid_blocks"}"#;
        let rejected = outcome_of_webhook(200, "application/json", invalid);
        assert!(matches!(rejected, PostOutcome::PayloadRejected(_)));
        let limited = outcome_of_webhook(200, "text/plain", "rate_limited");
        assert_eq!(limited, PostOutcome::RateLimited(None));
    }

    #[test]
    fn a_webhook_may_send_retry_after_with_503_as_well() {
        let now = Timestamp::from_micros(0);
        let answer = parse_webhook_response(503, Some(b"30"), None, b"", now);
        assert_eq!(
            answer,
            PostOutcome::Unavailable("Slack answered 503".into(), Some(Duration::from_secs(30)))
        );
    }

    #[test]
    fn retry_after_of_a_webhook_is_seconds_or_a_date() {
        let now = Timestamp::from_micros(1_795_341_600_000_000);
        let parse = |text| parse_webhook_retry_after(text, now);
        assert_eq!(parse("30"), Some(Duration::from_secs(30)));
        assert_eq!(parse(" 0 "), Some(Duration::ZERO));
        assert_eq!(
            parse("Sun, 22 Nov 2026 10:01:00 GMT"),
            Some(Duration::from_mins(1))
        );
        assert_eq!(
            parse("Sun, 22 Nov 2026 09:00:00 GMT"),
            Some(Duration::ZERO),
            "a time that has passed"
        );
        for nonsense in ["", "soon", "-1", "1.5", "99999999999999999999999"] {
            assert_eq!(parse(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn only_error_codes_of_a_webhook_are_shown() {
        let text = |word| match classify_webhook_error(404, word, None) {
            PostOutcome::ChannelDisabled(text) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(text("no_service"), "Slack answered 404 no_service");
        for page in [
            "Cannot POST /services/T0/B0/token",
            "<html>",
            "",
            &"x".repeat(65),
        ] {
            assert_eq!(text(page), "Slack answered 404");
        }
    }

    /// An input is a response: a line with the status, a line with `Retry-After`, the body.
    #[test]
    fn the_webhook_survives_the_corpus_of_answers() {
        let words = [
            "429\n",
            "200\n",
            "500\n",
            "\n",
            "no_service",
            "invalid_payload",
            "Sun, 22 Nov 2026 10:01:00 GMT",
            "s3cr3t",
        ];
        crate::fuzz::fuzz_corpus("slack-answer", 10_000, &words, |bytes| {
            let mut parts = bytes.splitn(3, |byte| *byte == b'\n');
            let mut next = || parts.next().unwrap_or_default();
            let status = next();
            let retry_after = next();
            let body = next();
            let status = std::str::from_utf8(status)
                .ok()
                .and_then(|text| text.parse().ok())
                .unwrap_or(0);
            let retry_after = Some(retry_after).filter(|bytes| !bytes.is_empty());
            let now = Timestamp::from_micros(1_795_341_600_000_000);
            let answer = parse_webhook_response(status, retry_after, None, body, now);
            match &answer {
                PostOutcome::Accepted(_) => assert!((200..300).contains(&status)),
                PostOutcome::RateLimited(_) => {
                    assert!(status == 429 || (200..300).contains(&status));
                }
                PostOutcome::Unavailable(text, _)
                | PostOutcome::PayloadRejected(text)
                | PostOutcome::ChannelDisabled(text) => {
                    let plain = text
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b" _,'".contains(&b));
                    assert!(
                        text.contains(&status.to_string()) && text.len() < 120 && plain,
                        "{text}"
                    );
                    // A page may repeat the webhook, which has slashes.
                    assert!(!(body.contains(&b'/') && text.contains("s3cr3t")), "{text}");
                }
                PostOutcome::Unknown(_) => unreachable!("an answer came"),
            }
            matches!(answer, PostOutcome::Accepted(_))
        });
    }

    proptest! {
        #[test]
        fn no_retry_after_of_a_webhook_makes_it_panic(text in ".{0,60}", micros in any::<i64>()) {
            let _ = parse_webhook_retry_after(&text, Timestamp::from_micros(micros));
        }
    }
}
