//! `--url`: the commands ask a payrelay elsewhere, over HTTP. What it denies, and what is no
//! payrelay, is named; its token never shows.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use testkit::child::KillOnDrop;
use testkit::http::{Client, request};
use testkit::listen::free_port;
use testkit::process::{Options, Payrelay, run_command};
use testkit::slack::{Answer, FakeSlack};
use testkit::tls::Authority;
use testkit::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

/// No command may show it.
const TOKEN: &str = "s3cr3t-of-the-boss";

/// A payrelay with two tokens, and the folder of a person elsewhere, who has neither its
/// configuration nor its database.
struct Remote {
    dir: tempfile::TempDir,
    elsewhere: tempfile::TempDir,
    payrelay: Payrelay,
}

impl Remote {
    fn start(env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let token = |name: &str, access: &str, token: &str| {
            format!(
                "[[http.token]]\nname = '{name}'\naccess = '{access}'\nhash = 'sha256:{:x}'\n",
                Sha256::digest(token)
            )
        };
        let config = token("boss", "admin", TOKEN) + &token("till", "full", "pay");
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let payrelay = Payrelay::start(Options::new(dir.path(), env));
        Self {
            dir,
            elsewhere: tempfile::tempdir().unwrap(),
            payrelay,
        }
    }

    fn url(&self) -> String {
        format!("http://{}", self.payrelay.addr())
    }

    /// Runs a command elsewhere, with a token or none.
    #[track_caller]
    fn run(&self, token: Option<&str>, args: &[&str]) -> (Option<i32>, String, String) {
        let url = self.url();
        let env: Vec<_> = token
            .map(|token| ("PAYRELAY_TOKEN", token))
            .into_iter()
            .collect();
        let args = [&["--url", &url], args].concat();
        let (code, out, error) = run_command(self.elsewhere.path(), &env, &args);
        assert!(
            !(out.clone() + &error).contains(TOKEN),
            "{args:?}: {out}{error}"
        );
        (code, out, error)
    }

    /// The output of a command of the boss that exits with 0 and says nothing else.
    #[track_caller]
    fn answer(&self, args: &[&str]) -> String {
        let (code, out, error) = self.run(Some(TOKEN), args);
        assert_eq!((code, error.as_str()), (Some(0), ""), "{args:?}: {out}");
        out
    }

    /// Two payments, and their delivery.
    fn pay(&self) {
        let mut client = Client::connect(self.payrelay.addr());
        let reservation = |id: i64| json!({"reservation_id": id, "seat_price": 5});
        let body = json!({"user_id": 42, "reservations": [reservation(1), reservation(2)]});
        let token = "Authorization: Bearer pay\r\n";
        client
            .send_raw(request("POST /payments", token, &body.to_string()).as_bytes())
            .unwrap();
        assert_eq!(client.read_response().status, 201);
    }

    /// Each of the actions of the boss, with its reason, in the database and in the log.
    #[track_caller]
    fn assert_actions_are_recorded(&self) {
        for table in ["relay_action", "channel_action"] {
            let database = self.database();
            let sql = format!(
                "SELECT count(*) FROM {table} WHERE origin = 'http, token boss' \
                AND reason IN ('a test', 'it is archived')"
            );
            let count: i64 = database.query_row(&sql, [], |row| row.get(0)).unwrap();
            assert_eq!(count, 2, "{table}");
        }
        for line in [
            "wake of the relay requested by http, token boss (\"a test\")",
            "resume of the relay requested by http, token boss (\"a test\")",
            "channel default: action of http, token boss (\"it is archived\"): payment 1 is",
            "channel default: action of http, token boss (\"a test\"): resumed",
            "dead letter 1, discard by http, token boss (\"no\"): discarded",
        ] {
            self.payrelay.wait_for_log(line, LIMIT);
        }
    }

    fn database(&self) -> Connection {
        Connection::open(self.dir.path().join("payrelay.db")).unwrap()
    }
}

#[test]
fn every_question_can_be_asked_of_a_payrelay_elsewhere() {
    let remote = Remote::start(&[]);
    remote.pay();
    wait_until("the delivery", LIMIT, || {
        remote.answer(&["payment", "2"]).contains("delivered")
    });
    wait_until("a sample", LIMIT, || {
        remote
            .answer(&["status", "--json"])
            .contains("\"sampled_at\"")
    });
    assert!(remote.answer(&["status"]).contains("READY"));
    assert_eq!(remote.answer(&["health"]), "ready\n");
    assert_eq!(remote.run(None, &["health", "--live"]).1, "live\n");
    assert!(remote.answer(&["payments"]).contains("COMPLETED      2"));
    assert!(remote.answer(&["channels", "list"]).contains("default"));
    assert_eq!(remote.answer(&["--quiet", "outbox", "list"]), "");
    assert!(
        remote
            .answer(&["topic", "--json"])
            .contains("payment-event")
    );
    // The same as on its own machine.
    let local = run_command(remote.dir.path(), &[], &["payment", "2", "--json"]).1;
    assert_eq!(remote.answer(&["payment", "2", "--json"]), local);
    assert_eq!(remote.run(Some(TOKEN), &["payment", "3"]).0, Some(1));
    // The token of a file, and a URL with a slash at its end.
    let file = remote.elsewhere.path().join("token");
    fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let url = format!("{}/", remote.url());
    let args = ["status", "--url", &url, "--token-file", "token"];
    let (code, out, error) = run_command(remote.elsewhere.path(), &[], &args);
    assert_eq!(code, Some(0), "{out}{error}");
    assert!(!remote.payrelay.log().contains(TOKEN));
    let files = fs::read_dir(remote.elsewhere.path()).unwrap().count();
    assert_eq!(files, 1, "nothing was created but the token's file");
}

#[test]
fn actions_on_a_payrelay_elsewhere_are_recorded_with_the_token() {
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Word(404, "channel_is_archived"));
    let url = slack.url();
    let remote = Remote::start(&[("PAYRELAY_SLACK_WEBHOOK_URL", url.as_str())]);
    remote.pay();
    wait_until("the pause", LIMIT, || {
        remote.answer(&["channels", "list"]).contains("paused")
    });
    assert!(
        remote
            .answer(&["outbox", "wake", "--reason", "a test"])
            .starts_with("requested")
    );
    assert!(
        remote
            .answer(&["outbox", "resume", "--reason", "a test"])
            .starts_with("requested")
    );
    let skip = ["channels", "skip", "default", "--reason", "it is archived"];
    assert!(remote.answer(&skip).starts_with("requested"));
    wait_until("the skipped payment", LIMIT, || {
        remote
            .answer(&["dead-letters", "list", "--json"])
            .contains("\"id\":1")
    });
    slack.answer_with(|_, _| Answer::Ok);
    assert!(
        remote
            .answer(&["channels", "resume", "default", "--reason", "a test"])
            .starts_with("requested")
    );
    let nothing = remote.run(Some(TOKEN), &["channels", "resume", "none"]);
    assert!(nothing.0 == Some(1) && nothing.2.contains("there is no channel none"));
    let dry = remote.answer(&["dead-letters", "replay", "--all", "--dry-run"]);
    assert!(dry.starts_with("would be: 1: "), "{dry}");
    let discard = ["dead-letters", "discard", "1", "--reason", "no"];
    let (code, _, error) = remote.run(Some(TOKEN), &discard);
    assert!(code == Some(64) && error.contains("add --yes"), "{error}");
    let discard = [&discard[..], &["--yes"]].concat();
    assert_eq!(remote.answer(&discard), "1: discarded\n");
    assert_eq!(
        remote.run(Some(TOKEN), &["dead-letters", "replay", "9"]).0,
        Some(1)
    );
    let letter: Value =
        serde_json::from_str(&remote.answer(&["dead-letters", "show", "1"])).unwrap();
    let action = &letter["actions"][0];
    assert_eq!(
        (&action["origin"], &action["reason"]),
        (&"http, token boss".into(), &"no".into())
    );
    remote.assert_actions_are_recorded();
}

#[test]
fn what_a_payrelay_elsewhere_denies_is_named() {
    let remote = Remote::start(&[]);
    let denied = |token: Option<&str>, expected: &str| {
        let (code, out, error) = remote.run(token, &["status"]);
        assert!(
            code == Some(77) && error.contains(expected),
            "{code:?}: {out}{error}"
        );
    };
    denied(None, "set PAYRELAY_TOKEN, or add --token-file FILE");
    denied(Some(""), "needs a token");
    denied(Some("wrong"), "does not know this token");
    let (code, _, error) = remote.run(Some("pay"), &["channels"]);
    let admin = "this needs a token whose access is admin";
    assert!(code == Some(77) && error.contains(admin), "{error}");
    assert_eq!(remote.run(Some("pay"), &["status"]).0, Some(0));
    let (code, _, error) = remote.run(Some("two words of a token"), &["status"]);
    assert!(
        code == Some(78) && error.contains("PAYRELAY_TOKEN"),
        "{error}"
    );
    assert!(!error.contains("two words"), "{error}");
    let (code, _, error) = remote.run(None, &["status", "--token-file", "missing"]);
    assert!(
        code == Some(78) && error.contains("--token-file missing"),
        "{error}"
    );
    // What works on the files of this machine asks no other one.
    let (code, _, error) = remote.run(Some(TOKEN), &["backup", "copy.db"]);
    assert!(code == Some(64) && error.contains("--url"), "{error}");
}

#[test]
fn what_is_no_payrelay_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let status = |url: &str| {
        let env = [("PAYRELAY_TOKEN", TOKEN)];
        let (code, out, error) = run_command(dir.path(), &env, &["status", "--url", url]);
        assert!(!(out + &error).contains(TOKEN), "{url}");
        (code, error)
    };
    let closed = free_port().local_addr().unwrap();
    for (url, expected, said) in [
        (format!("http://{closed}"), 75, "refused"),
        ("http://nowhere.invalid".to_owned(), 75, "nowhere.invalid"),
        ("nowhere".to_owned(), 64, "--url"),
        (format!("http://boss:{TOKEN}@127.0.0.1"), 64, "--token-file"),
    ] {
        let (code, error) = status(&url);
        assert!(
            code == Some(expected) && error.contains(said),
            "{url}: {code:?} {error}"
        );
    }
    let slack = FakeSlack::start();
    slack.answer_with(|_, _| Answer::Status(404));
    let url = slack.url();
    let (code, error) = status(url.rsplit_once("/services").unwrap().0);
    assert!(
        code == Some(78) && error.contains("not as a payrelay"),
        "{error}"
    );
    let tls = FakeSlack::start_tls(tls_config());
    let (code, error) = status(tls.url().rsplit_once("/services").unwrap().0);
    assert!(code == Some(75) && error.contains("TLS"), "{error}");
    assert!(error.contains("certificate"), "{error}");
}

/// A certificate that no browser trusts.
fn tls_config() -> Arc<ServerConfig> {
    let (certificate, key) = Authority::new().sign("localhost");
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key);
    Arc::new(config.unwrap())
}

/// Runs a command at a terminal, which script(1) makes.
fn run_at_terminal(dir: &Path, args: &str) -> (Option<i32>, String) {
    let command = format!("{} {args}", testkit::paths::binary().display());
    let output = std::process::Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .current_dir(dir)
        .output()
        .expect("script (package bsdutils)");
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
    )
}

#[test]
fn what_destroys_needs_yes_without_a_terminal_and_never_asks() {
    let remote = Remote::start(&[]);
    let letter = "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
        VALUES ('a', 0, 0, 'no', 1)";
    remote.database().execute(letter, []).unwrap();
    let discard = "dead-letters discard 1 --reason no";
    let args: Vec<_> = discard.split(' ').collect();
    let (code, _, error) = run_command(remote.dir.path(), &[], &args);
    assert!(code == Some(64) && error.contains("add --yes"), "{error}");
    // A person at a terminal has typed the word, and is not asked again.
    let (code, out) = run_at_terminal(remote.dir.path(), discard);
    assert!(code == Some(0) && out.contains("1: discarded"), "{out}");
}

#[test]
fn quiet_leaves_the_result_and_the_errors() {
    let remote = Remote::start(&[]);
    let run = |args: &[&str]| run_command(remote.dir.path(), &[], args);
    let (code, _, error) = run(&["dead-letters", "list"]);
    assert!(code == Some(0) && !error.is_empty());
    for args in [
        &["dead-letters", "list", "--quiet"][..],
        &["outbox", "list", "--quiet"],
        &["payments", "--quiet"],
        &["topic", "--quiet"],
        &["--quiet", "status"],
        &["backup", "copy.db", "--quiet"],
        &["audit", "--file-only", "--quiet"],
    ] {
        let (code, out, error) = run(args);
        assert_eq!((code, error.as_str()), (Some(0), ""), "{args:?}: {out}");
    }
    let (code, _, error) = run(&["payment", "9", "--quiet"]);
    assert!(code == Some(1) && error.contains("there is no payment 9"));
}

#[test]
fn a_quiet_payrelay_logs_errors_alone() {
    let dir = tempfile::tempdir().unwrap();
    let log = fs::File::create(dir.path().join("log")).unwrap();
    let mut command = KillOnDrop::command(testkit::paths::binary());
    command
        .arg("--quiet")
        .current_dir(dir.path())
        .env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0")
        .stderr(log);
    let mut payrelay = KillOnDrop::spawn(command);
    wait_until("a payrelay that serves", LIMIT, || {
        let (code, ..) = run_command(dir.path(), &[], &["health", "--live"]);
        code == Some(0)
    });
    assert!(payrelay.terminate(LIMIT).success());
    assert_eq!(fs::read_to_string(dir.path().join("log")).unwrap(), "");
}
