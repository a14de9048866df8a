//! The format of the log: JSON, and the priorities of systemd's journal.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use testkit::child::without_configuration;
use testkit::http::{Client, pay, payment, request};
use testkit::process::{Options, Payrelay};
use testkit::slack::{Answer, FakeSlack};
use testkit::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

fn lines(log: &str) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
    log.lines().map(parse).collect()
}

/// The first line with an event.
fn line<'a>(lines: &'a [Value], event: &str) -> &'a Value {
    let found = lines.iter().find(|line| line["event"] == event);
    found.unwrap_or_else(|| panic!("no {event} in {lines:#?}"))
}

/// The name of a configuration file: a text from outside, with the start of another line and a
/// colour.
const ODD: &str = "odd\n[2026-11-27T00:00:00.000Z ERROR] {\"level\":\"error\"}\u{1b}[31m";

fn start_with_odd_name(dir: &Path, env: &[(&str, &str)]) -> Payrelay {
    fs::write(dir.join(ODD), "").unwrap();
    let mut options = Options::new(dir, env);
    options.args = vec!["--config".to_owned(), ODD.to_owned()];
    Payrelay::start(options)
}

#[test]
fn a_json_log_has_one_object_a_line_whatever_comes_from_outside() {
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Status(500));
    let dir = tempfile::tempdir().unwrap();
    let mut payrelay = start_with_odd_name(
        dir.path(),
        &[
            ("PAYRELAY_LOG_FORMAT", "json"),
            ("PAYRELAY_SLACK_WEBHOOK_URL", &slack.url()),
            ("PAYRELAY_SCHEDULER_INTERVAL", "100ms"),
        ],
    );
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, [1]);
    wait_until("an outage and a summary", LIMIT, || {
        let log = payrelay.log();
        log.contains("\"unavailable\"") && log.contains("\"summary\"")
    });
    assert!(payrelay.terminate().success());
    let lines = lines(&payrelay.log());
    for line in &lines {
        for field in ["time", "level", "thread", "event", "message"] {
            assert!(line[field].is_string(), "{field}: {line}");
        }
    }
    let starting = line(&lines, "starting")["message"].as_str().unwrap();
    assert!(starting.ends_with(ODD), "{starting}");
    assert_eq!(line(&lines, "unavailable")["component"], "Slack");
    assert!(line(&lines, "summary")["published"].is_u64());
    assert_eq!(
        line(&lines, "starting")["version"],
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(line(&lines, "stopped")["level"], "info");
}

#[test]
fn a_text_from_outside_begins_no_line_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start_with_odd_name(dir.path(), &[]);
    let log = payrelay.log();
    assert!(
        log.contains("odd\n    [2026-11-27T00:00:00.000Z ERROR]"),
        "{log}"
    );
    assert!(
        log.contains("\\u{1b}[31m") && !log.contains('\u{1b}'),
        "{log}"
    );
}

#[test]
fn a_delivered_payment_has_its_trace_in_the_json_log() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.toml"), "[log]\nformat = 'json'\n").unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    let mut client = Client::connect(payrelay.addr());
    let trace = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";
    let paid = request("POST /payments", trace, &payment(7, 0));
    client.send_raw(paid.as_bytes()).unwrap();
    assert_eq!(client.read_response().status, 201);
    payrelay.wait_for_log("\"delivered\"", LIMIT);
    let lines = lines(&payrelay.log());
    let delivered = line(&lines, "delivered");
    assert_eq!(delivered["payment"], 1);
    assert_eq!(delivered["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
}

/// Runs payrelay until it ends, with a file as its standard error.
fn run_with_file(dir: &Path, env: &[(&str, &str)], stream: impl Fn(&File) -> String) -> String {
    let path = dir.join("journal");
    let file = File::create(&path).unwrap();
    let status = without_configuration(&mut Command::new(testkit::paths::binary()))
        .current_dir(dir)
        .env("JOURNAL_STREAM", stream(&file))
        .envs(env.iter().copied())
        .stdout(Stdio::null())
        .stderr(file)
        .status()
        .unwrap();
    assert!(!status.success());
    fs::read_to_string(path).unwrap()
}

fn device_and_inode(file: &File) -> String {
    let file = file.metadata().unwrap();
    format!("{}:{}", file.dev(), file.ino())
}

#[test]
fn lines_in_the_journal_have_a_priority_and_no_time() {
    let dir = tempfile::tempdir().unwrap();
    // The folder of the database is missing: it ends after its first lines.
    let env = [
        ("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0"),
        ("PAYRELAY_DATABASE_PATH", "nowhere/payrelay.db"),
    ];
    let journal = run_with_file(dir.path(), &env, device_and_inode);
    assert!(journal.starts_with("<6>payrelay "), "{journal}");
    assert!(
        journal.contains("\n<4>slack.webhook_url is not set"),
        "{journal}"
    );
    let last = journal.lines().last().unwrap();
    assert!(
        last.starts_with("<3>") && last.contains("nowhere"),
        "{journal}"
    );
    // Another process of the service: its standard error is not the journal.
    let other = run_with_file(dir.path(), &env, |_| "1:2".to_owned());
    assert!(other.starts_with('['), "{other}");
    let json = [env.as_slice(), &[("PAYRELAY_LOG_FORMAT", "json")]].concat();
    let journal = run_with_file(dir.path(), &json, device_and_inode);
    let objects: String = journal
        .lines()
        .map(|line| {
            line.trim_start_matches(['<', '3', '4', '6', '>'])
                .to_owned()
                + "\n"
        })
        .collect();
    assert_eq!(line(&lines(&objects), "start_failed")["level"], "error");
}

#[test]
fn an_error_of_the_configuration_has_the_format_that_the_environment_names() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.toml"), "[log]\nformat = 'xml'\n").unwrap();
    let other = |_: &File| "1:2".to_owned();
    let text = run_with_file(dir.path(), &[], other);
    assert!(
        text.starts_with("payrelay: ") && text.contains("log.format"),
        "{text}"
    );
    let json = [
        ("PAYRELAY_LOG_FORMAT", "json"),
        ("PAYRELAY_HTTP_LISTEN", "nowhere"),
    ];
    let json = lines(&run_with_file(dir.path(), &json, other));
    assert_eq!(json.len(), 1);
    let message = line(&json, "start_failed")["message"].as_str().unwrap();
    assert!(message.contains("http.listen"), "{message}");
}
