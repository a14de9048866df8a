//! `GET /metrics` of the real binary: its formats, its access, its numbers, and the series that
//! clients cannot add to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;
use std::{env, fs};

use serde_json::json;

use testkit::http::{Client, Response, ask_local, pay, payment, request};
use testkit::process::{Options, Payrelay, run_command};
use testkit::slack::FakeSlack;
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(20);

fn start(dir: &Path, env: &[(&str, &str)]) -> Payrelay {
    Payrelay::start(Options::new(dir, env))
}

fn ask(client: &mut Client, start: &str, headers: &str) -> Response {
    client
        .send_raw(request(start, headers, "").as_bytes())
        .unwrap();
    client.read_response()
}

fn text(response: &Response) -> String {
    String::from_utf8(response.body.clone()).unwrap()
}

/// The series of a scrape, with their values.
fn series(scrape: &str) -> BTreeMap<String, f64> {
    let lines = scrape.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

fn scrape(payrelay: &Payrelay) -> BTreeMap<String, f64> {
    let response = Client::connect(payrelay.addr()).get("/metrics");
    assert_eq!(response.status, 200);
    series(&text(&response))
}

#[test]
fn a_scrape_has_the_format_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &[]);
    let mut client = Client::connect(payrelay.addr());
    let plain = client.get("/metrics");
    let kind = plain.header("content-type");
    assert_eq!(kind, Some("text/plain; version=0.0.4; charset=utf-8"));
    assert!(!text(&plain).contains("# EOF"));
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = format!("traceparent: {trace}\r\n");
    let paid = request("POST /payments", &headers, &payment(1, 0));
    client.send_raw(paid.as_bytes()).unwrap();
    assert_eq!(client.read_response().status, 201);
    // What a Prometheus of today sends.
    let accept = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3\r\n";
    let exemplar = "trace_id=\"4bf92f3577b34da6a3ce929d0e0e4736\"";
    wait_until("the payment is delivered, with its trace", LIMIT, || {
        let open = ask(&mut client, "GET /metrics", accept);
        let kind = open.header("content-type").unwrap();
        assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
        let open = text(&open);
        assert!(open.ends_with("# EOF\n"));
        open.lines().any(|line| {
            line.starts_with("payrelay_delivery_latency_seconds_bucket") && line.contains(exemplar)
        })
    });
}

#[test]
fn a_scraper_reads_the_metrics_and_the_health_and_no_payment() {
    let dir = tempfile::tempdir().unwrap();
    let hash = "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
    let config = format!(
        "http.client_requests_per_second = 1\n[[http.token]]\nname = 'prometheus'\n\
            access = 'metrics'\nhash = '{hash}'\n"
    );
    fs::write(dir.path().join("config.toml"), config).unwrap();
    let payrelay = start(dir.path(), &[]);
    let mut client = Client::connect(payrelay.addr());
    assert_eq!(client.get("/metrics").status, 401);
    let token = "Authorization: Bearer secret\r\n";
    // No limit of requests holds for it.
    for _ in 0..5 {
        assert_eq!(ask(&mut client, "GET /metrics", token).status, 200);
    }
    let ready = ask(&mut client, "GET /health/ready", token).json();
    assert!(ready["node"].is_string(), "{ready}");
    let mut other = |start: &str| {
        wait_for(start, LIMIT, || {
            let response = ask(&mut client, start, token);
            (response.status != 429).then_some(response.status)
        })
    };
    assert_eq!(other("GET /payments/1"), 403);
    assert_eq!(other("GET /overview"), 403);
    let socket = dir.path().join("payrelay.db.sock");
    assert_eq!(ask_local(&socket, "GET /metrics", "", "").status, 200);
}

#[test]
fn a_scrape_counts_what_happens_to_payments() {
    let slack = FakeSlack::start();
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &[("PAYRELAY_SLACK_WEBHOOK_URL", &slack.url())]);
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=3);
    pay(&mut client, 2, [3]);
    let keyed = request("POST /payments", "Idempotency-Key: a\r\n", &payment(9, 0));
    for _ in 0..2 {
        client.send_raw(keyed.as_bytes()).unwrap();
        assert_eq!(client.read_response().status, 201);
    }
    let reused = request("POST /payments", "Idempotency-Key: a\r\n", &payment(8, 0));
    client.send_raw(reused.as_bytes()).unwrap();
    assert_eq!(client.read_response().status, 422);
    let delivered = r#"payrelay_deliveries_total{channel="default",outcome="delivered"}"#;
    let found = wait_for("five deliveries", LIMIT, || {
        let found = scrape(&payrelay);
        (found[delivered] >= 5.0).then_some(found)
    });
    for (name, value) in [
        (r#"payrelay_payments_total{status="COMPLETED"}"#, 4.0),
        (r#"payrelay_payments_total{status="FAILED"}"#, 1.0),
        (r#"payrelay_idempotent_answers_total{kind="replayed"}"#, 1.0),
        (
            r#"payrelay_idempotent_answers_total{kind="key_reused"}"#,
            1.0,
        ),
        (r#"payrelay_events_published_total{source="sent"}"#, 5.0),
        ("payrelay_publish_latency_seconds_count", 5.0),
        (
            r#"payrelay_delivery_latency_seconds_count{channel="default"}"#,
            5.0,
        ),
        (
            r#"payrelay_http_requests_total{route="/payments",method="POST",code="201"}"#,
            4.0,
        ),
        (
            r#"payrelay_http_requests_total{route="/payments",method="POST",code="422"}"#,
            1.0,
        ),
        (
            r#"payrelay_channel_state{channel="default",state="up"}"#,
            1.0,
        ),
        ("payrelay_ready", 1.0),
        ("payrelay_config_reload_success", 1.0),
    ] {
        assert!(
            (found[name] - value).abs() < 0.001,
            "{name}: {}",
            found[name]
        );
    }
    let posts = r#"payrelay_slack_posts_total{channel="default",result="accepted"}"#;
    assert!(found[posts] >= 1.0 && found["payrelay_commit_duration_seconds_count"] >= 5.0);
    assert!(found["process_resident_memory_bytes"] > 1e6);
    let threads = found
        .keys()
        .filter(|name| name.contains("_heartbeat_timestamp_"));
    assert!(threads.count() >= 8, "{found:#?}");
}

#[test]
fn odd_requests_add_no_series_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &[]);
    let mut client = Client::connect(payrelay.addr());
    let odd = |number: usize| {
        let start = match number % 5 {
            0 => format!("GET /odd/{number}"),
            1 => format!("BREW{number} /payments"),
            2 => format!("GET /payments/{number}?x={number}"),
            3 => format!("POST /admin/channels/{number}/resume"),
            _ => format!("GET /users/{number}/nothing"),
        };
        (start, format!("Authorization: Bearer {number}\r\n"))
    };
    let mut names = BTreeSet::new();
    for number in 0..10_000 {
        let (start, headers) = odd(number);
        assert!(ask(&mut client, &start, &headers).status >= 400);
        // Every kind has been counted once.
        if number == 100 {
            names = scrape(&payrelay).into_keys().collect();
        }
    }
    let after = scrape(&payrelay);
    let new: Vec<_> = after.keys().filter(|name| !names.contains(*name)).collect();
    assert!(new.is_empty(), "{new:?}");
    let counted: f64 = after
        .iter()
        .filter(|(name, _)| name.starts_with("payrelay_http_requests_total"))
        .map(|(_, value)| value)
        .sum();
    assert!(counted >= 10_000.0, "{counted}");
    assert!(after.len() < 1_500, "{}", after.len());
}

/// The page, from a live scrape: each metric with its type, its labels and its help.
fn reference_page(scrape: &str) -> String {
    let mut help = BTreeMap::new();
    let mut kinds = BTreeMap::new();
    let mut labels: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in scrape.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help.extend(rest.split_once(' '));
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            kinds.extend(rest.split_once(' '));
        } else if let Some((name, rest)) = line.split_once('{') {
            let found = rest
                .split(['{', ','])
                .filter_map(|label| label.split_once("=\""));
            let found = found.map(|(label, _)| label).filter(|label| *label != "le");
            labels.entry(name).or_default().extend(found);
        }
    }
    let mut page = String::new();
    for (name, kind) in &kinds {
        let own = labels
            .iter()
            .find(|(series, _)| series.strip_suffix("_bucket").unwrap_or(series) == *name);
        let own: Vec<_> = own.into_iter().flat_map(|(_, labels)| labels).collect();
        let own: Vec<_> = own.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(
            page,
            "| `{name}` | {kind} | {} | {} |",
            own.join(", "),
            help[name].trim_end_matches('.')
        );
    }
    page
}

/// `PAYRELAY_REWRITE_DOCS=1 cargo test --test it metrics::` writes the table again.
#[test]
fn the_metrics_reference_is_made_from_a_scrape() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(
        dir.path(),
        &[
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
        ],
    );
    // The series of a partition come with its row.
    let database = rusqlite::Connection::open(dir.path().join("payrelay.db")).unwrap();
    let row = "INSERT INTO topic_partition (topic, topic_id, \"partition\", consumed_to) \
        VALUES ('payment-event', x'00', 0, 1)";
    database.execute(row, []).unwrap();
    let scrape = wait_for("a partition", LIMIT, || {
        let found = text(&Client::connect(payrelay.addr()).get("/metrics"));
        found.contains("partition=\"0\"").then_some(found)
    });
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/metrics.md");
    let page = fs::read_to_string(&file).unwrap();
    let head = "| metric | type | labels | |\n|---|---|---|---|\n";
    let (before, rest) = page.split_once(head).unwrap();
    let table: String = rest
        .lines()
        .take_while(|line| line.starts_with('|'))
        .fold(String::new(), |table, line| table + line + "\n");
    let expected = reference_page(&scrape);
    if env::var_os("PAYRELAY_REWRITE_DOCS").is_some() {
        let after = &rest[table.len()..];
        fs::write(&file, format!("{before}{head}{expected}{after}")).unwrap();
        return;
    }
    assert!(
        table == expected,
        "docs/reference/metrics.md differs from a scrape: run \
            PAYRELAY_REWRITE_DOCS=1 cargo test --test it metrics::"
    );
}

#[test]
fn the_overview_has_the_latencies_of_the_last_minute() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &[]);
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1, 1..=3);
    wait_until("latencies of all stages", LIMIT, || {
        let overview = client.get("/overview").json();
        let stages = [
            &overview["latency"]["answer"],
            &overview["latency"]["publish"],
            &overview["channels"][0]["latency"],
        ];
        // There is no consumer without Kafka.
        assert_eq!(overview["latency"]["consume"], json!(null));
        stages
            .iter()
            .all(|stage| stage["p99_ms"].as_f64().is_some_and(|ms| ms > 0.0))
    });
}

#[test]
fn an_action_by_a_command_is_logged_and_counted_by_the_running_payrelay() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &[]);
    let database = rusqlite::Connection::open(dir.path().join("payrelay.db")).unwrap();
    let row = "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
        VALUES ('t', 0, 1, 'no', 1)";
    database.execute(row, []).unwrap();
    let open = r#"payrelay_dead_letters_open{kind="record"}"#;
    wait_until("an open dead letter", LIMIT, || {
        scrape(&payrelay)[open] > 0.5
    });
    let discard = ["dead-letters", "discard", "1", "--reason", "old", "--yes"];
    assert_eq!(run_command(dir.path(), &[], &discard).0, Some(0));
    payrelay.wait_for_log("dead letter 1, discard by local user", LIMIT);
    payrelay.wait_for_log("(\"old\")", LIMIT);
    let discarded = r#"payrelay_dead_letter_actions_total{action="discard"}"#;
    wait_until("the action", LIMIT, || {
        let found = scrape(&payrelay);
        found[discarded] > 0.5 && found[open] < 0.5
    });
}
