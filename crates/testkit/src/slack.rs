//! A fake for Slack's incoming webhook, over real HTTP, that records its requests and
//! answers as the test says.

use super::http::{Headers, read_body, read_head};
use super::listen::{Server, free_port};
use super::lock;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;
use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

/// Webhook paths are secrets: a test can search logs for `secret-token`.
const PATH: &str = "/services/T000/B000/secret-token";

/// What Slack does with one request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// 200, and the message counts as shown.
    Ok,
    Status(u16),
    /// A status with further headers, such as `Retry-After`.
    StatusWith(u16, Headers),
    /// No answer on an open connection, until the client leaves or Slack stops.
    Hang,
    /// The connection ends after the request, as when an answer is lost on the way.
    CloseAfterRead,
    /// The connection ends within the status line.
    Half,
    /// A status and a word, as Slack says what is wrong.
    Word(u16, &'static str),
}

type Script = dyn Fn(usize, &Value) -> Answer + Send + Sync;

/// The webhook; dropping it closes its connections and joins its threads.
pub struct FakeSlack {
    address: SocketAddr,
    webhook: Arc<Webhook>,
    tls: Option<Arc<ServerConfig>>,
    server: Option<Server>,
}

struct Webhook {
    script: Mutex<Arc<Script>>,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    attempts: usize,
    shown: Vec<String>,
    bodies: Vec<Value>,
}

impl FakeSlack {
    pub fn start() -> FakeSlack {
        FakeSlack::start_as(None)
    }

    /// Over TLS, with a certificate for `localhost`.
    pub fn start_tls(tls: Arc<ServerConfig>) -> FakeSlack {
        FakeSlack::start_as(Some(tls))
    }

    fn start_as(tls: Option<Arc<ServerConfig>>) -> FakeSlack {
        let listener = free_port();
        let webhook = Webhook {
            script: Mutex::new(Arc::new(|_, _| Answer::Ok)),
            record: Mutex::default(),
        };
        let mut slack = FakeSlack {
            address: listener
                .local_addr()
                .expect("a bound listener has an address"),
            webhook: Arc::new(webhook),
            tls,
            server: None,
        };
        slack.serve(listener);
        slack
    }

    pub fn url(&self) -> String {
        match self.tls {
            None => format!("http://{}{PATH}", self.address),
            Some(_) => format!("https://localhost:{}{PATH}", self.address.port()),
        }
    }

    /// Answers from now on with `script(n, text)`, where `n` counts all requests since the start,
    /// from 0.
    pub fn answer_with(&self, script: impl Fn(usize, &str) -> Answer + Send + Sync + 'static) {
        let script =
            move |nth, body: &Value| script(nth, body["text"].as_str().unwrap_or_default());
        *lock(&self.webhook.script) = Arc::new(script);
    }

    /// The same by the whole message.
    pub fn answer_to_bodies(&self, script: impl Fn(&Value) -> Answer + Send + Sync + 'static) {
        *lock(&self.webhook.script) = Arc::new(move |_, body: &Value| script(body));
    }

    /// The texts that were answered with 2xx, in order: what people in the channel see.
    pub fn messages(&self) -> Vec<String> {
        lock(&self.webhook.record).shown.clone()
    }

    /// The whole messages that were answered with 2xx.
    pub fn bodies(&self) -> Vec<Value> {
        lock(&self.webhook.record).bodies.clone()
    }

    /// The lines about payments that people see: a digest has a heading before its lines.
    pub fn lines(&self) -> Vec<String> {
        let shown = lock(&self.webhook.record).shown.clone();
        let lines = shown.iter().flat_map(|text| text.lines());
        lines
            .filter(|line| line.starts_with("Payment "))
            .map(str::to_owned)
            .collect()
    }

    /// How many of them there are.
    pub fn count(&self) -> usize {
        lock(&self.webhook.record).shown.len()
    }

    /// The number of requests that arrived whole, whatever the answer.
    pub fn attempts(&self) -> usize {
        lock(&self.webhook.record).attempts
    }

    /// An outage: open connections end and new ones are refused. What was recorded stays.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// The end of the outage, on the same port.
    pub fn start_again(&mut self) {
        assert!(self.server.is_none(), "Slack is running");
        let listener = TcpListener::bind(self.address);
        self.serve(listener.expect("the port of a stopped Slack stays free"));
    }

    fn serve(&mut self, listener: TcpListener) {
        let webhook = Arc::clone(&self.webhook);
        let tls = self.tls.clone();
        // How a connection ends is the client's affair: it shows in the product, not here.
        self.server = Some(Server::start(listener, move |stream| match &tls {
            None => drop(webhook.converse(stream)),
            Some(tls) => {
                let session =
                    ServerConnection::new(Arc::clone(tls)).expect("the configuration is whole");
                drop(webhook.converse(StreamOwned::new(session, stream)));
            }
        }));
    }
}

impl Webhook {
    /// Serves one connection until either side ends it.
    fn converse(&self, stream: impl Read + Write) -> io::Result<()> {
        let mut reader = BufReader::new(stream);
        while let Some((line, headers)) = read_head(&mut reader)? {
            let body = read_body(&mut reader, &headers)?;
            let (status, more, word, text) = match self.answer(&line, &body) {
                (Answer::Ok, text) => (200, Vec::new(), "ok", text),
                (Answer::Status(status), text) => (status, Vec::new(), "not ok", text),
                (Answer::StatusWith(status, more), text) => (status, more, "not ok", text),
                (Answer::Word(status, word), text) => (status, Vec::new(), word, text),
                (Answer::Hang, _) => return reader.read_to_end(&mut Vec::new()).map(drop),
                (Answer::CloseAfterRead, _) => return Ok(()),
                (Answer::Half, _) => return reader.get_mut().write_all(b"HTTP/1.1 20"),
            };
            if (200..300).contains(&status) {
                // Before the answer leaves: who has seen the client succeed finds the message here.
                let mut record = lock(&self.record);
                record.shown.push(text);
                record
                    .bodies
                    .push(serde_json::from_slice(&body).unwrap_or_default());
            }
            respond(reader.get_mut(), status, &more, word)?;
        }
        Ok(())
    }

    /// Records the request and asks the script; refuses what Slack itself would refuse.
    fn answer(&self, line: &str, body: &[u8]) -> (Answer, String) {
        let body: Option<Value> = serde_json::from_slice(body).ok();
        let text = body.as_ref().and_then(|body| body["text"].as_str());
        let nth = {
            let mut record = lock(&self.record);
            record.attempts += 1;
            record.attempts - 1
        };
        let answer = match text {
            _ if line != format!("POST {PATH} HTTP/1.1") => Answer::Status(404),
            None => Answer::Status(400),
            Some(_) => {
                let script = Arc::clone(&lock(&self.script));
                script(nth, body.as_ref().unwrap_or(&Value::Null))
            }
        };
        (answer, text.unwrap_or_default().to_owned())
    }
}

fn respond(
    stream: &mut impl Write,
    status: u16,
    more: &[(String, String)],
    body: &str,
) -> io::Result<()> {
    let length = body.len();
    // As Slack's webhooks do, also for `ok` (https://github.com/slackapi/node-slack-sdk/pull/480).
    let mut response = format!(
        "HTTP/1.1 {status} Answered\r\nContent-Type: text/html\r\nContent-Length: {length}\r\n"
    );
    for (name, value) in more {
        response.extend([name, ": ", value, "\r\n"]);
    }
    response.extend(["\r\n", body]);
    stream.write_all(response.as_bytes())
}
