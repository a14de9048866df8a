//! The questions of an operator. One command answers each, while payrelay runs and while it does
//! not, and the first screen of the help names it.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rusqlite::Connection;
use serde_json::{Value, json};

use testkit::child::{KillOnDrop, without_configuration};
use testkit::http::{Client, pay};
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_command};
use testkit::slack::{Answer, FakeSlack};
use testkit::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

/// A payrelay that the commands ask, and its folder.
struct Site {
    dir: tempfile::TempDir,
    env: Vec<(String, String)>,
    payrelay: Payrelay,
}

impl Site {
    fn start(env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let payrelay = Payrelay::start(Options::new(dir.path(), env));
        let env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        Self { dir, env, payrelay }
    }

    fn client(&self) -> Client {
        Client::connect(self.payrelay.addr())
    }

    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let env: Vec<_> = self
            .env
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        run_command(self.dir.path(), &env, args)
    }

    /// The output of a command that exits with 0.
    #[track_caller]
    fn answer(&self, args: &[&str]) -> String {
        let (code, out, error) = self.run(args);
        assert_eq!(code, Some(0), "{args:?}: {out}{error}");
        assert_first_screen_names(args[0]);
        out
    }

    fn database(&self) -> Connection {
        Connection::open(self.dir.path().join("payrelay.db")).unwrap()
    }

    fn wait_for_delivery(&self, payment: i64) {
        let mut client = self.client();
        wait_until("the delivery", LIMIT, || {
            let payment = client.get(&format!("/payments/{payment}")).json();
            payment["notification"]["status"] == "DELIVERED"
        });
    }
}

/// A terminal has 24 lines.
#[track_caller]
fn assert_first_screen_names(command: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (_, help, _) = run_command(dir.path(), &[], &["--help"]);
    let screen: Vec<_> = help.lines().take(24).collect();
    let start = format!("  {command} ");
    assert!(
        screen.iter().any(|line| line.starts_with(&start)),
        "{command} is not on the first screen: {screen:#?}"
    );
}

/// Each question of an operator is on the first screen, with the command that answers it.
#[test]
fn the_first_screen_of_the_help_answers_each_question() {
    let dir = tempfile::tempdir().unwrap();
    let (_, help, _) = run_command(dir.path(), &[], &["--help"]);
    let screen: Vec<_> = help.lines().take(24).collect();
    for (command, question) in [
        ("status", "Is it healthy?"),
        ("status", "Was there a backup?"),
        ("payment", "Where is a payment?"),
        ("payments", "What was paid today"),
        ("outbox", "How old is the oldest event?"),
        ("channels", "Why is nothing at Slack?"),
        ("doctor", "Is the disk good enough?"),
    ] {
        let start = format!("  {command} ");
        let found = screen
            .iter()
            .any(|line| line.starts_with(&start) && line.contains(question));
        assert!(found, "{question} is not on the first screen: {screen:#?}");
    }
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn is_it_healthy() {
    let mut site = Site::start(&[]);
    pay(&mut site.client(), 42, [1001]);
    site.wait_for_delivery(1);
    wait_until("a sample", LIMIT, || {
        site.run(&["status", "--json"]).1.contains("\"sampled_at\"")
    });
    let status = site.answer(&["status"]);
    assert!(
        status.contains("READY") && status.contains("no dead letters"),
        "{status}"
    );
    assert_eq!(site.answer(&["health"]), "ready\n");
    assert_eq!(site.answer(&["health", "--live"]), "live\n");
    let status: Value = serde_json::from_str(&site.answer(&["status", "--json"])).unwrap();
    assert_eq!(
        (&status["status"], &status["channels"][0]["name"]),
        (&json!("ready"), &json!("default"))
    );
    assert!(status["files"]["disk_free_bytes"].is_u64(), "{status}");
    // Ten minutes must pass first.
    assert_eq!(status.get("disk_full_in_s"), Some(&Value::Null), "{status}");
    // A person is needed.
    let letter = "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
        VALUES ('a', 0, 0, 'no', 1)";
    site.database().execute(letter, []).unwrap();
    wait_until("the dead letter in a sample", LIMIT, || {
        site.run(&["status"]).0 == Some(1)
    });
    assert!(site.run(&["status"]).1.contains("1 dead letter (oldest "));
    assert!(site.payrelay.terminate().success());
    let (code, out, error) = site.run(&["status"]);
    assert!(
        code == Some(75) && out.contains("NOT RUNNING"),
        "{out}{error}"
    );
    assert!(out.contains("1 dead letter"), "{out}");
    // Nothing listens at this address.
    let listen = [("PAYRELAY_HTTP_LISTEN", "127.0.0.1:1")];
    assert_eq!(
        run_command(site.dir.path(), &listen, &["health"]).0,
        Some(1)
    );
}

#[test]
fn a_status_names_a_database_that_fails() {
    let site = Site::start(&[]);
    pay(&mut site.client(), 42, [1001]);
    site.wait_for_delivery(1);
    let database = site.dir.path().join("payrelay.db");
    fs::rename(&database, site.dir.path().join("moved.db")).unwrap();
    wait_until("the status of the database", LIMIT, || {
        let (code, out, _) = site.run(&["status"]);
        code == Some(75) && out.contains("database: UNAVAILABLE for ")
    });
    let out = site.run(&["status"]).1;
    assert!(out.contains("it was moved or removed"), "{out}");
}

#[test]
fn a_status_that_watches_prints_again() {
    let site = Site::start(&[]);
    let log = fs::File::create(site.dir.path().join("out")).unwrap();
    let mut child = without_configuration(&mut Command::new(testkit::paths::binary()))
        .args(["status", "--watch", "1"])
        .current_dir(site.dir.path())
        .stdout(log)
        .spawn()
        .unwrap();
    wait_until("the second answer", LIMIT, || {
        let out = fs::read_to_string(site.dir.path().join("out")).unwrap();
        out.matches("payrelay ").count() > 1
    });
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn where_is_a_payment() {
    let mut site = Site::start(&[]);
    let body =
        json!({"user_id": 42, "reservations": [{"reservation_id": 1001, "seat_price": 150_000}]});
    let trace = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";
    let mut client = site.client();
    let request = testkit::http::request("POST /payments", trace, &body.to_string());
    client.send_raw(request.as_bytes()).unwrap();
    assert_eq!(client.read_response().status, 201);
    site.wait_for_delivery(1);
    let running = site.answer(&["payment", "1"]);
    for part in [
        "payment 1  COMPLETED  user 42, reservation 1001, 150,000 KRW",
        "trace 4bf92f3577b34da6a3ce929d0e0e4736",
        "stored",
        "published",
        "consumed",
        "delivered",
        "channel default",
    ] {
        assert!(running.contains(part), "{part} is missing from {running}");
    }
    let trace = ["payment", "--trace", "4BF92F3577B34DA6A3CE929D0E0E4736"];
    assert_eq!(site.answer(&trace), running);
    let (code, _, error) = site.run(&["payment", "--trace", &"7".repeat(32)]);
    assert!(code == Some(1) && error.contains("no payment"), "{error}");
    for wrong in [
        &["payment", "--trace", "7"][..],
        &["payment"],
        &[trace[0], trace[1], trace[2], "1"],
    ] {
        assert_eq!(site.run(wrong).0, Some(64), "{wrong:?}");
    }
    let object = site.answer(&["payment", "1", "--json"]);
    assert!(site.payrelay.terminate().success());
    assert_eq!(
        site.answer(&["payment", "1"]),
        running,
        "the file knows the same"
    );
    assert_eq!(site.answer(&trace), running);
    let stopped: Value = serde_json::from_str(&site.answer(&["payment", "1", "--json"])).unwrap();
    assert_eq!(stopped, serde_json::from_str::<Value>(&object).unwrap());
    let (code, _, error) = site.run(&["payment", "2"]);
    assert!(
        code == Some(1) && error.contains("there is no payment 2"),
        "{error}"
    );
}

/// More events than one request reads.
#[test]
fn the_payments_of_a_trace_are_listed_over_several_pages() {
    let site = Site::start(&[]);
    let mut client = site.client();
    for first in 0..25 {
        let ids: Vec<_> = (first * 1000..(first + 1) * 1000).collect();
        pay(&mut client, 42, ids);
    }
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let changed = site.database().execute(
        "UPDATE outbox SET traceparent = ?1 WHERE id IN (1, 2, 24999)",
        [parent],
    );
    assert_eq!(changed, Ok(3));
    let trace = ["payment", "--trace", "4bf92f3577b34da6a3ce929d0e0e4736"];
    let list = site.answer(&trace);
    let ids: Vec<_> = list
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(ids, ["24999", "2", "1"], "{list}");
    let lines = json_lines(&site.answer(&[&trace[..], &["--json"]].concat()));
    assert_eq!((lines.len(), &lines[2]["id"]), (3, &json!(1)));
}

#[test]
fn why_is_nothing_at_slack() {
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Word(404, "channel_is_archived"));
    let url = slack.url();
    let mut site = Site::start(&[("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())]);
    pay(&mut site.client(), 42, [1001]);
    wait_until("the pause in the list", LIMIT, || {
        let channels = site.answer(&["channels"]);
        channels.contains("paused") && channels.contains("channel_is_archived")
    });
    let (code, status, _) = site.run(&["status"]);
    assert!(
        code == Some(1) && status.contains("payrelay channels resume default"),
        "{status}"
    );
    let line = json_lines(&site.answer(&["channels", "list", "--json"]));
    assert_eq!((&line[0]["state"], line.len()), (&json!("paused"), 1));
    let waiting = site.run(&["payment", "1"]).1;
    assert!(
        waiting.contains("waits") && waiting.contains("channel_is_archived"),
        "{waiting}"
    );
    assert!(site.payrelay.terminate().success());
    let stopped = site.answer(&["channels"]);
    assert!(stopped.contains("channel_is_archived"), "{stopped}");
}

/// No broker listens at this address.
const NO_KAFKA: [(&str, &str); 2] = [
    ("PAYRELAY_PUBLISHER_KIND", "kafka"),
    ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
];

#[test]
fn how_old_is_the_oldest_event() {
    let mut site = Site::start(&NO_KAFKA);
    pay(&mut site.client(), 42, [1001, 1002, 1003]);
    site.database()
        .execute(
            "UPDATE outbox SET created_at = created_at - 252000000 WHERE id = 1",
            [],
        )
        .unwrap();
    wait_until("the outage in the list", LIMIT, || {
        site.answer(&["outbox"]).contains("publisher unavailable: ")
    });
    let list = site.answer(&["outbox", "list", "--limit", "2"]);
    assert!(list.contains(" INIT ") && list.contains("4 m 1"), "{list}");
    assert_eq!(list.lines().count(), 3, "{list}");
    assert_eq!(
        json_lines(&site.answer(&["outbox", "list", "--json", "--after", "2"])).len(),
        1
    );
    wait_until("the age in the status", LIMIT, || {
        let status = site.run(&["status"]).1;
        status
            .lines()
            .any(|line| line.starts_with("publish ") && line.contains("  4 m 1"))
    });
    assert!(
        site.answer(&["outbox", "wake"])
            .contains("the relay tries now")
    );
    let origin: String = site
        .database()
        .query_row(
            "SELECT origin FROM relay_action WHERE action = 'wake'",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert!(origin.starts_with("local user "), "{origin}");
    assert!(site.answer(&["topic"]).is_empty(), "nothing was published");
    assert!(site.payrelay.terminate().success());
    assert!(site.answer(&["outbox"]).contains("payrelay does not run"));
    assert_eq!(site.run(&["outbox", "wake"]).0, Some(75));
}

#[test]
fn is_my_disk_good_enough() {
    let site = Site::start(&NO_KAFKA);
    pay(&mut site.client(), 42, [1001]);
    assert_first_screen_names("doctor");
    let (code, out, error) = site.run(&["doctor", "--disk-seconds", "1"]);
    let line = |check: &str| {
        let found = out
            .lines()
            .find(|line| line.split_whitespace().nth(1) == Some(check));
        found.unwrap_or_else(|| panic!("{check} is missing from {out}{error}"))
    };
    assert!(line("disk").contains("a sync takes "), "{out}");
    assert!(line("configuration").starts_with("ok"), "{out}");
    let served = format!("process {} serves it", site.payrelay.pid());
    assert!(
        line("database").starts_with("ok") && line("database").contains(&served),
        "{out}"
    );
    assert!(!line("clock").starts_with("FAIL"), "{out}");
    assert!(line("payrelay").contains("it runs, and is "), "{out}");
    assert!(
        line("kafka").starts_with("FAIL") && line("kafka").contains("127.0.0.1:1"),
        "{out}"
    );
    assert_eq!(code, Some(1));
    let future = "UPDATE payment SET executed_at = executed_at + 3600000000";
    let database = site.database();
    database.execute(future, []).unwrap();
    let (_, out, _) = site.run(&["doctor", "--disk-seconds", "0", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let verdict = |name: &str| {
        let found = checks.iter().find(|check| check["check"] == name);
        found.map(|check| check["verdict"].clone())
    };
    assert_eq!(verdict("clock"), Some(json!("fail")), "{report}");
    // This test has the database open as well.
    assert_eq!(verdict("other processes"), Some(json!("note")), "{report}");
    assert_eq!(verdict("disk"), None, "{report}");
    drop(database);
}

#[test]
fn a_doctor_reaches_slack_and_posts_only_when_asked() {
    let slack = FakeSlack::start();
    let url = slack.url();
    let mut site = Site::start(&[("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())]);
    let (_, out, error) = site.run(&["doctor", "--disk-seconds", "0"]);
    assert!(out.contains("name resolved, answered in "), "{out}{error}");
    assert_eq!(slack.count(), 0);
    let (_, out, error) = site.run(&["doctor", "--disk-seconds", "0", "--post-to-slack"]);
    assert!(out.contains("accepted a test message"), "{out}{error}");
    assert_eq!(slack.messages().len(), 1);
    assert!(site.payrelay.terminate().success());
    drop(slack);
    let (code, out, _) = site.run(&["doctor", "--disk-seconds", "0"]);
    assert!(
        code == Some(1) && out.contains("FAIL") && !out.contains("secret-token"),
        "{out}"
    );
}

/// A process of this name, which has the database open.
#[test]
fn a_doctor_names_the_litestream_that_has_the_database_open() {
    let site = Site::start(&[]);
    let program = site.dir.path().join("litestream");
    fs::copy("/bin/sh", &program).unwrap();
    let mut command = KillOnDrop::command(&program);
    command
        .args([
            "-c",
            "mkfifo hold; exec 3< payrelay.db; echo; read line < hold",
        ])
        .current_dir(site.dir.path())
        .stdout(Stdio::piped());
    let mut litestream = KillOnDrop::spawn(command);
    let mut opened = [0];
    litestream.take_stdout().read_exact(&mut opened).unwrap();
    let (_, out, error) = site.run(&["doctor", "--disk-seconds", "0"]);
    let expected = "litestream (process ";
    assert!(
        out.contains(expected) && out.contains("0.5.15 or later"),
        "{out}{error}"
    );
}

#[test]
fn a_doctor_looks_at_the_topic() {
    let broker = Broker::start("4.4.0");
    let servers = broker.bootstrap();
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", servers.as_str()),
    ];
    let dir = tempfile::tempdir().unwrap();
    let examine = |line: &str| {
        let args = ["doctor", "--disk-seconds", "0"];
        let (_, out, error) = run_command(dir.path(), &env, &args);
        assert!(out.contains(line), "{line} is missing from {out}{error}");
    };
    examine("payment-event does not exist yet");
    let payrelay = Payrelay::start(Options::new(dir.path(), &env));
    pay(&mut Client::connect(payrelay.addr()), 42, [1001]);
    wait_until("the delivery", LIMIT, || {
        let payment = Client::connect(payrelay.addr()).get("/payments/1").json();
        payment["notification"]["status"] == "DELIVERED"
    });
    examine("rights to read and write");
    let (_, payment, _) = run_command(dir.path(), &env, &["payment", "1"]);
    assert!(
        payment.contains("partition ") && payment.contains("offset 0"),
        "{payment}"
    );
    let (code, topic, _) = run_command(dir.path(), &env, &["topic"]);
    assert!(
        code == Some(0) && topic.starts_with("topic payment-event\n"),
        "{topic}"
    );
}

#[test]
fn rejected_events_and_the_lag_of_the_topic_are_listed() {
    let mut site = Site::start(&[]);
    pay(&mut site.client(), 42, [1001, 1002]);
    site.wait_for_delivery(2);
    let rows = "UPDATE outbox SET status = 'REJECTED', rejection = 'too large', \
            published_at = NULL WHERE id = 2;
        INSERT INTO dead_letter (outbox_id, payment_id, reason, received_at) \
            VALUES (2, 2, 'too large', 1);
        INSERT INTO topic_partition (topic, topic_id, \"partition\", published_to, consumed_to) \
            VALUES ('payment-event', zeroblob(16), 4, 10, 7);";
    site.database().execute_batch(rows).unwrap();
    let running = [
        site.answer(&["outbox", "list", "--state", "rejected", "--json"]),
        site.answer(&["topic"]),
        site.answer(&["topic", "--json"]),
    ];
    let [rejected, topic, _] = &running;
    let rejected = json_lines(rejected);
    assert_eq!(
        (
            rejected.len(),
            &rejected[0]["payment_id"],
            &rejected[0]["rejection"]
        ),
        (1, &json!(2), &json!("too large"))
    );
    let cells: Vec<_> = topic.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(cells, ["4", "10", "7", "3", "0", "0", "0"], "{topic}");
    assert!(site.payrelay.terminate().success());
    let stopped = [
        site.answer(&["outbox", "list", "--state", "rejected", "--json"]),
        site.answer(&["topic"]),
        site.answer(&["topic", "--json"]),
    ];
    assert_eq!(stopped, running, "the file knows the same");
    // What read the file is in no start's way.
    let mut again = Payrelay::start(Options::new(site.dir.path(), &[]));
    assert_eq!(site.run(&["outbox", "--color", "never"]).0, Some(0));
    assert!(again.terminate().success());
}

#[test]
fn was_there_a_backup() {
    let site = Site::start(&[]);
    assert!(site.run(&["status"]).1.contains("no backup yet"));
    let (code, _, error) = site.run(&["backup", "copy.db"]);
    assert_eq!(
        (code, error.as_str()),
        (Some(0), ""),
        "no progress of a short command"
    );
    assert_first_screen_names("backup");
    assert!(site.answer(&["status"]).contains("backup "));
    // A copy that exists is never replaced, and the failed attempt is no backup.
    let before: Value = serde_json::from_str(&site.answer(&["status", "--json"])).unwrap();
    assert_eq!(site.run(&["backup", "copy.db"]).0, Some(78));
    let after: Value = serde_json::from_str(&site.answer(&["status", "--json"])).unwrap();
    assert!(before["last_backup"]["ended_at"].is_string(), "{before}");
    assert_eq!(before["last_backup"], after["last_backup"]);
}

#[test]
fn was_there_an_audit() {
    let mut site = Site::start(&NO_KAFKA);
    pay(&mut site.client(), 42, [1001]);
    let status = |site: &Site| site.run(&["status"]).1;
    assert!(status(&site).contains("no audit yet"));
    // Kafka does not answer: that is no audit.
    assert_eq!(site.run(&["audit"]).0, Some(75));
    assert!(status(&site).contains("no audit yet"));
    assert_eq!(site.run(&["audit", "--file-only"]).0, Some(0));
    assert!(
        status(&site).contains("audit of the file clean "),
        "{}",
        status(&site)
    );
    let letter = "UPDATE outbox SET status = 'REJECTED', rejection = 'too large' WHERE id = 1";
    site.database().execute(letter, []).unwrap();
    assert_eq!(site.run(&["audit", "--file-only"]).0, Some(1));
    assert!(
        status(&site).contains("audit of the file found 1 problem "),
        "{}",
        status(&site)
    );
    let running = site.run(&["status", "--json"]).1;
    let running: Value = serde_json::from_str(&running).unwrap();
    let audit = &running["last_audit"];
    assert_eq!(
        (&audit["findings"], &audit["file_only"]),
        (&json!(1), &json!(true))
    );
    assert!(
        audit["origin"].as_str().unwrap().starts_with("local user "),
        "{audit}"
    );
    assert!(site.payrelay.terminate().success());
    let stopped: Value = serde_json::from_str(&site.run(&["status", "--json"]).1).unwrap();
    assert_eq!(&stopped["last_audit"], audit);
    // A copy stays as it is.
    assert_eq!(site.run(&["backup", "copy.db"]).0, Some(0));
    let copy = fs::read(site.dir.path().join("copy.db")).unwrap();
    let env = [("PAYRELAY_DATABASE_PATH", "copy.db")];
    let (code, ..) = run_command(site.dir.path(), &env, &["audit", "--file-only"]);
    assert_eq!(code, Some(1));
    assert!(fs::read(site.dir.path().join("copy.db")).unwrap() == copy);
    let outcomes =
        "SELECT group_concat(operation || ' ' || outcome, ', ' ORDER BY id) FROM operation";
    let outcomes: String = site
        .database()
        .query_row(outcomes, [], |row| row.get(0))
        .unwrap();
    assert_eq!(
        outcomes,
        "audit failed, audit ok, audit findings, backup ok"
    );
}

#[test]
fn what_was_paid_today() {
    let mut site = Site::start(&[]);
    let mut client = site.client();
    for user in 0..2 {
        // The second time all of them are paid already.
        for first in [0, 300] {
            let ids: Vec<_> = (first..first + 300).collect();
            pay(&mut client, user, ids);
        }
    }
    site.database()
        .execute("UPDATE payment SET executed_at = 0 WHERE id = 1", [])
        .unwrap();
    let list = site.answer(&["payments"]);
    for total in ["COMPLETED    599  2,995 KRW", "FAILED       600  3,000 KRW"] {
        assert!(list.contains(total), "{total} is missing from {list}");
    }
    assert_eq!(list.lines().count(), 1199 + 3);
    let totals = json_lines(&site.answer(&["payments", "--totals", "--json"]));
    let completed = json!({"status": "COMPLETED", "currency": "KRW", "count": 599, "sum": 2995});
    assert_eq!(totals[0], completed);
    let failed = site.answer(&["payments", "--status", "failed", "--csv"]);
    assert_eq!(failed.lines().count(), 601);
    assert!(
        failed
            .lines()
            .nth(1)
            .unwrap()
            .ends_with(",5,KRW,already paid"),
        "{failed}"
    );
    assert!(site.payrelay.terminate().success());
    assert_eq!(site.answer(&["payments"]), list, "the file knows the same");
    let (code, none, _) = site.run(&["payments", "--since", "yesterday"]);
    assert_eq!((code, none.as_str()), (Some(0), ""));
    assert_eq!(site.run(&["payments", "--since", "soon"]).0, Some(64));
}

#[test]
fn a_command_reads_no_more_of_the_configuration_than_it_needs() {
    let site = Site::start(&[]);
    pay(&mut site.client(), 42, [1001]);
    site.wait_for_delivery(1);
    let config = "[slack]\nwebhook_url = 5\nnonsense = 1\n[http]\nlisten = 'here'\n[nonsense]\n";
    fs::write(site.dir.path().join("config.toml"), config).unwrap();
    let status = |args: &[&str]| {
        let args = [args, &["--config", "config.toml"]].concat();
        run_command(site.dir.path(), &[], &args)
    };
    for args in [
        &["payment", "1"][..],
        &["payments"],
        &["outbox"],
        &["channels"],
        &["dead-letters"],
        &["topic"],
        &["health"],
        &["backup", "copy.db"],
        &["dead-letters", "replay", "--all"],
        &["explain", "75"],
    ] {
        let (code, _, error) = status(args);
        assert_eq!(code, Some(0), "{args:?}: {error}");
    }
    assert_eq!(status(&["check-config"]).0, Some(78));
    let config = "[database]\npath = 5\n";
    fs::write(site.dir.path().join("config.toml"), config).unwrap();
    let (code, _, error) = status(&["status"]);
    assert!(
        code == Some(78) && error.contains("database.path = 5"),
        "{error}"
    );
}

#[test]
fn a_reason_of_an_action_on_a_dead_letter_is_recorded() {
    let site = Site::start(&[]);
    for offset in 0..2 {
        let letter = format!(
            "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
                VALUES ('a', 0, {offset}, 'no\u{1b}[2J', 1)"
        );
        site.database().execute(&letter, []).unwrap();
    }
    let list = site.answer(&["dead-letters", "list"]);
    assert!(
        list.contains("no\\u{1b}[2J") && !list.contains('\u{1b}'),
        "{list}"
    );
    let (code, _, error) = site.run(&["dead-letters", "discard", "1"]);
    assert!(code == Some(64) && error.contains("--reason"), "{error}");
    site.answer(&["dead-letters", "discard", "1", "--dry-run"]);
    let (code, _, error) = site.run(&["dead-letters", "discard", "1", "--reason", "no"]);
    assert!(code == Some(64) && error.contains("add --yes"), "{error}");
    let letter = site.answer(&["dead-letters", "show", "1"]);
    assert!(letter.contains("\"OPEN\""), "{letter}");
    site.answer(&[
        "dead-letters",
        "discard",
        "1",
        "--reason",
        "not ours",
        "--yes",
    ]);
    let body = json!({"reason": "not ours either"});
    let discard = "/admin/dead-letters/2/discard";
    let mut client = site.client();
    let bad = client.post_json(discard, &json!({"why": "no"}));
    assert_eq!(bad.status, 422);
    assert_eq!(client.post_json(discard, &body).status, 200);
    for (id, reason) in [("1", "not ours"), ("2", "not ours either")] {
        let letter = site.answer(&["dead-letters", "show", id]);
        let letter: Value = serde_json::from_str(&letter).unwrap();
        assert_eq!(letter["actions"][0]["reason"], reason, "{letter}");
    }
    assert_eq!(site.run(&["dead-letters", "show", "3"]).0, Some(1));
}

#[test]
fn colours_follow_the_option_and_the_environment() {
    let site = Site::start(&[]);
    let colour = |dir: &Path, env: &[(&str, &str)], args: &[&str]| {
        let (_, out, _) = run_command(dir, env, args);
        assert!(out.contains("payrelay "), "{out}");
        out.contains('\u{1b}')
    };
    let dir = site.dir.path();
    assert!(!colour(dir, &[], &["status"]), "a pipe is no terminal");
    assert!(colour(dir, &[], &["status", "--color", "always"]));
    assert!(colour(dir, &[("CLICOLOR_FORCE", "1")], &["status"]));
    assert!(!colour(
        dir,
        &[("CLICOLOR_FORCE", "1")],
        &["status", "--color", "never"]
    ));
}

#[test]
fn a_word_is_explained() {
    let site = Site::start(&[]);
    let alert = site.answer(&["explain", "PayrelayKafkaLate"]);
    assert!(alert.contains("payrelay outbox wake"), "{alert}");
    let problem = site.answer(&["explain", "urn:payrelay:problem:conflict"]);
    assert!(problem.contains("paused"), "{problem}");
    let words = site.answer(&["explain"]);
    for word in ["75", "double-payment", "insufficient-storage"] {
        assert!(words.lines().any(|line| line == word), "{words}");
    }
    assert_eq!(site.run(&["explain", "nonsense"]).0, Some(1));
}

#[test]
fn a_payrelay_that_does_not_answer_is_reported() {
    let site = Site::start(&[]);
    site.payrelay.signal("STOP");
    let (code, _, error) = site.run(&["status"]);
    site.payrelay.signal("CONT");
    assert!(
        code == Some(75) && error.contains("does not answer"),
        "{error}"
    );
    // Its socket is elsewhere: the database answers, and the difference is said.
    let env = [("PAYRELAY_HTTP_SOCKET", "off")];
    let (code, out, error) = run_command(site.dir.path(), &env, &["status"]);
    assert!(code == Some(75) && out.contains("NOT RUNNING"), "{out}");
    assert!(
        error.contains(&format!("payrelay runs (process {})", site.payrelay.pid())),
        "{error}"
    );
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let site = Site::start(&[]);
    let run = |args: &[&str]| {
        let (code, out, error) = site.run(args);
        assert_eq!(code, Some(0), "{args:?}: {error}");
        out
    };
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            run(&["completions", shell]).contains("dead-letters"),
            "{shell}"
        );
    }
    run(&["man", "--dir", "man"]);
    let page = |name: &str| fs::read_to_string(site.dir.path().join("man").join(name)).unwrap();
    assert!(
        page("payrelay.1").contains("payrelay\\-status"),
        "{}",
        page("payrelay.1")
    );
    assert!(page("payrelay-status.1").contains("watch"));
    assert!(page("payrelay-dead-letters-discard.1").contains("reason"));
}

#[test]
fn a_selftest_finds_every_answered_payment() {
    let dir = tempfile::tempdir().unwrap();
    let env = [("PAYRELAY_DATABASE_PATH", "/nowhere/payrelay.db")];
    let args = ["selftest", "--rounds", "3", "--dir", ".", "--json"];
    let (code, out, error) = run_command(dir.path(), &env, &args);
    assert_eq!(code, Some(0), "{out}{error}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert!(report["answered"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(
        (&report["kills"], &report["lost"], &report["audit_is_clean"]),
        (&json!(3), &json!(0), &json!(true))
    );
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "it removes its folder"
    );
    let (code, _, error) = run_command(dir.path(), &[], &["selftest", "--dir", "nowhere"]);
    assert!(code == Some(75) && error.contains("--dir"), "{error}");
}

#[test]
fn a_demo_pays_its_own_payrelay_and_no_other() {
    let site = Site::start(&[]);
    let args = [
        "demo",
        "--rate",
        "50",
        "--seconds",
        "1",
        "--duplicates",
        "50",
    ];
    let (code, out, error) = site.run(&args);
    assert_eq!(code, Some(0), "{out}{error}");
    let lines: Vec<_> = out.lines().collect();
    assert!(lines[0].starts_with("demo on http://127.0.0.1:"), "{out}");
    assert!(lines[1].ends_with(" FAILED, 0 without an answer"), "{out}");
    assert!(!lines[1].starts_with("0 COMPLETED"), "{out}");
    assert_eq!(site.client().get("/payments/1").status, 404);
}

#[test]
fn a_support_bundle_has_no_payments_and_no_secrets() {
    let secret = "https://127.0.0.1:1/services/s3cr3t";
    let site = Site::start(&[("PAYRELAY_SLACK_WEBHOOK_URL", secret)]);
    pay(&mut site.client(), 424_242_424, [717_171_717]);
    wait_until("a failure at Slack", LIMIT, || {
        site.answer(&["channels"]).contains("unavailable")
    });
    let (code, out, error) = site.run(&["support-bundle", "bundle.tar"]);
    assert_eq!(code, Some(0), "{out}{error}");
    let listed = Command::new("tar")
        .args(["-xvf", "bundle.tar"])
        .current_dir(site.dir.path())
        .output()
        .expect("tar (package tar)");
    assert!(listed.status.success(), "{listed:?}");
    let read = |name: &str| {
        fs::read_to_string(site.dir.path().join("payrelay").join(name))
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    assert!(read("config.toml").contains("webhook_url = \"***\""));
    let status: Value = serde_json::from_str(&read("status.json")).unwrap();
    assert_eq!(status["status"], "degraded", "{status}");
    assert!(read("doctor.json").contains("a sync takes"));
    assert!(read("limits.txt").contains("Max open files"));
    let bundle = fs::read(site.dir.path().join("bundle.tar")).unwrap();
    let bundle = String::from_utf8(bundle).unwrap();
    for hidden in ["s3cr3t", "424242424", "717171717"] {
        assert!(!bundle.contains(hidden), "{hidden} is in it");
    }
    assert_eq!(
        site.run(&["support-bundle", "bundle.tar"]).0,
        Some(78),
        "never twice"
    );
}
