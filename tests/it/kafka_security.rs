//! Kafka over TLS and SASL: the real binary and real brokers, let in by every way there is, and
//! refused with a reason. The password is nowhere to be read.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_command, run_to_exit};
use testkit::tls::{Authority, PASSWORD, Secure, USER};
use testkit::topic;
use testkit::wait_until;

const LIMIT: Duration = Duration::from_mins(1);

type Env<'a> = Vec<(&'static str, &'a str)>;

/// A folder with what the binary needs.
struct Site {
    dir: TempDir,
}

impl Site {
    fn new(secure: &Secure) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = secure.authority.sign("payrelay.example");
        fs::write(dir.path().join("ca.pem"), secure.authority.pem()).unwrap();
        fs::write(dir.path().join("me.pem"), certificate).unwrap();
        fs::write(dir.path().join("me.key"), key).unwrap();
        fs::write(dir.path().join("stranger.pem"), Authority::new().pem()).unwrap();
        fs::write(dir.path().join("password"), format!("{PASSWORD}\n")).unwrap();
        Self { dir }
    }

    fn options(&self, bootstrap: &str, topic: &str, more: &Env<'_>) -> Options {
        let mut env = vec![
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", bootstrap),
            ("PAYRELAY_KAFKA_TOPIC", topic),
            ("PAYRELAY_KAFKA_GROUP", topic),
            ("PAYRELAY_LOG", "debug"),
        ];
        env.extend(more);
        Options::new(self.dir.path(), &env)
    }
}

const TLS: [(&str, &str); 2] = [
    ("PAYRELAY_KAFKA_SECURITY", "tls"),
    ("PAYRELAY_KAFKA_CA_FILE", "ca.pem"),
];
const MUTUAL: [(&str, &str); 2] = [
    ("PAYRELAY_KAFKA_CERTIFICATE_FILE", "me.pem"),
    ("PAYRELAY_KAFKA_KEY_FILE", "me.key"),
];

fn sasl(mechanism: &'static str, password: &'static str) -> Env<'static> {
    vec![
        ("PAYRELAY_KAFKA_SASL_MECHANISM", mechanism),
        ("PAYRELAY_KAFKA_SASL_USERNAME", USER),
        ("PAYRELAY_KAFKA_SASL_PASSWORD", password),
    ]
}

fn over_tls(more: Env<'static>) -> Env<'static> {
    TLS.into_iter().chain(more).collect()
}

fn pay(client: &mut Client, reservation: i64) {
    let body =
        json!({"user_id": 7, "reservations": [{"reservation_id": reservation, "seat_price": 5}]});
    assert_eq!(client.post_json("/payments", &body).status, 201);
}

/// Payments go out over a listener, lie on the topic, and come back, and Kafka is never
/// unavailable. This broker has done all of it before: for the first handshake, transaction and
/// group a new one needs seconds on a busy machine.
fn assert_goes_round(
    broker: &Broker,
    secure: &Secure,
    bootstrap: &str,
    name: &str,
    more: &Env<'_>,
) {
    go_round(broker, secure, bootstrap, &format!("{name}-before"), more);
    let log = go_round(broker, secure, bootstrap, name, more);
    assert!(!log.contains(" unavailable: "), "{name}:\n{log}");
    assert_eq!(
        log.contains("any host on the way can read the password"),
        name == "plain-in-clear",
        "{name}"
    );
}

/// Returns the log.
fn go_round(
    broker: &Broker,
    secure: &Secure,
    bootstrap: &str,
    name: &str,
    more: &Env<'_>,
) -> String {
    let site = Site::new(secure);
    let mut payrelay = Payrelay::start(site.options(bootstrap, name, more));
    let mut client = Client::connect(payrelay.addr());
    for reservation in 1..=3 {
        pay(&mut client, reservation);
    }
    wait_until(
        &format!("three payments delivered, by way of {name}"),
        LIMIT,
        || {
            (1..=3).all(|id| {
                client.get(&format!("/payments/{id}")).json()["notification"]["status"]
                    == "DELIVERED"
            })
        },
    );
    let values: Vec<_> = topic::read(&broker.bootstrap_inside(), name, LIMIT)
        .into_iter()
        .map(|found| found.value)
        .collect();
    assert_eq!(values, ["1", "2", "3"], "{name}");
    let ready = client.get("/health/ready").json().to_string();
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    assert!(
        !payrelay.log().contains(PASSWORD) && !ready.contains(PASSWORD),
        "{name} shows the password"
    );
    payrelay.log()
}

#[test]
fn payments_pass_over_every_kafka_security_setting() {
    let (broker, secure) = Broker::start_secure("4.4.0");
    let ways: [(&str, String, Env<'_>); 8] = [
        ("tls", secure.tls(), TLS.to_vec()),
        ("mutual", secure.mutual(), over_tls(MUTUAL.to_vec())),
        (
            "tls-plain",
            secure.sasl_tls(),
            over_tls(sasl("PLAIN", PASSWORD)),
        ),
        (
            "tls-scram-256",
            secure.sasl_tls(),
            over_tls(sasl("SCRAM-SHA-256", PASSWORD)),
        ),
        (
            "tls-scram-512",
            secure.sasl_tls(),
            over_tls(sasl("SCRAM-SHA-512", PASSWORD)),
        ),
        (
            "scram-256-in-clear",
            secure.sasl(),
            sasl("SCRAM-SHA-256", PASSWORD),
        ),
        (
            "scram-512-in-clear",
            secure.sasl(),
            sasl("SCRAM-SHA-512", PASSWORD),
        ),
        ("plain-in-clear", secure.sasl(), sasl("PLAIN", PASSWORD)),
    ];
    for (name, bootstrap, env) in &ways {
        assert_goes_round(&broker, &secure, bootstrap, name, env);
    }
}

#[test]
fn payments_pass_over_tls_and_sasl_of_an_older_kafka() {
    let (broker, secure) = Broker::start_secure("3.9.2");
    let mut env = over_tls(sasl("SCRAM-SHA-512", PASSWORD));
    // The password from a file, as a secret of an orchestrator comes.
    env.retain(|(name, _)| *name != "PAYRELAY_KAFKA_SASL_PASSWORD");
    env.push(("PAYRELAY_KAFKA_SASL_PASSWORD_FILE", "password"));
    assert_goes_round(&broker, &secure, &secure.sasl_tls(), "tls-scram-512", &env);
}

/// The component is unavailable with the reason, the log names the key to check, payments are
/// accepted all the same.
fn assert_refused(secure: &Secure, bootstrap: &str, more: &Env<'_>, reason: &str, keys: &str) {
    let site = Site::new(secure);
    let payrelay = Payrelay::start(site.options(bootstrap, "refused", more));
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1);
    let mut ready = Value::Null;
    wait_until(
        &format!("both parts to be unavailable: {reason}"),
        LIMIT,
        || {
            ready = client.get("/health/ready").json();
            ["publisher", "consumer"].iter().all(|part| {
                let part = &ready["components"][part];
                part["state"] == "unavailable"
                    && part["error"]
                        .as_str()
                        .is_some_and(|error| error.contains(reason))
            })
        },
    );
    payrelay.wait_for_log(&format!("look at {keys}"), LIMIT);
    let log = payrelay.log();
    // Once for the publisher, once for the consumer.
    assert!(
        (1..=2).contains(&log.matches("do not accept each other").count()),
        "{log}"
    );
    for secret in [PASSWORD, WRONG] {
        assert!(
            !log.contains(secret) && !ready.to_string().contains(secret),
            "the password is shown:\n{ready}\n{log}"
        );
    }
    pay(&mut client, 2);
    assert_eq!(client.get("/payments/2").json()["event"]["status"], "INIT");
}

const WRONG: &str = "wrong-kafka-password";

#[test]
fn a_refused_client_learns_the_reason() {
    let (_broker, secure) = Broker::start_secure("4.4.0");
    let credentials = "kafka.sasl_mechanism, kafka.sasl_username and kafka.sasl_password";
    let stranger = vec![
        ("PAYRELAY_KAFKA_SECURITY", "tls"),
        ("PAYRELAY_KAFKA_CA_FILE", "stranger.pem"),
    ];
    let built_in = vec![("PAYRELAY_KAFKA_SECURITY", "tls")];
    let cases: [(String, Env<'_>, &str, &str); 9] = [
        (
            secure.sasl_tls(),
            over_tls(sasl("PLAIN", WRONG)),
            "SaslAuthenticationFailed",
            credentials,
        ),
        (
            secure.sasl_tls(),
            over_tls(sasl("SCRAM-SHA-256", WRONG)),
            "SaslAuthenticationFailed",
            credentials,
        ),
        (
            secure.sasl(),
            sasl("SCRAM-SHA-512", WRONG),
            "SaslAuthenticationFailed",
            credentials,
        ),
        // Another authority of the same name.
        (secure.tls(), stranger, "BadSignature", "kafka.ca_file"),
        (secure.tls(), built_in, "UnknownIssuer", "kafka.ca_file"),
        (
            secure.sasl_tls_by_another_name(),
            over_tls(sasl("PLAIN", PASSWORD)),
            "not valid for name",
            "kafka.bootstrap_servers",
        ),
        (
            secure.mutual(),
            TLS.to_vec(),
            "received fatal alert",
            "kafka.certificate_file",
        ),
        (secure.tls(), vec![], "message size", "kafka.security"),
        (
            secure.tls(),
            over_tls(sasl("PLAIN", PASSWORD)),
            "SASL handshake failed",
            credentials,
        ),
    ];
    // Meanwhile one is refused, and what it was refused for is set right.
    let site = Site::new(&secure);
    let payrelay = Payrelay::start(site.options(&secure.tls(), "mended", &cases[3].1));
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1);
    payrelay.wait_for_log("(publisher) unavailable", LIMIT);
    fs::write(site.dir.path().join("stranger.pem"), secure.authority.pem()).unwrap();
    for (bootstrap, env, reason, keys) in &cases {
        assert_refused(&secure, bootstrap, env, reason, keys);
    }
    wait_until(
        "the payment to be delivered, without a restart",
        LIMIT,
        || client.get("/payments/1").json()["notification"]["status"] == "DELIVERED",
    );
}

/// A listener without TLS ends the connection, as a broker that stops does: it is reported as a
/// line that breaks.
#[test]
fn tls_to_a_plaintext_listener_is_unavailable() {
    let (_broker, secure) = Broker::start_secure("4.4.0");
    let site = Site::new(&secure);
    let payrelay = Payrelay::start(site.options(&secure.sasl(), "wrong", &TLS.to_vec()));
    payrelay.wait_for_log("Kafka (consumer) unavailable", LIMIT);
    payrelay.wait_for_log("tls handshake eof", LIMIT);
}

/// Files of certificates and keys: sound ones, broken ones, and an encrypted one.
fn write_files(dir: &Path) {
    let authority = Authority::new();
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    let (certificate, key) = authority.sign("a.example");
    let (_, other_key) = authority.sign("b.example");
    write("ca.pem", authority.pem());
    write("me.pem", &certificate);
    write("me.key", &key);
    write("other.key", &other_key);
    write(
        "broken.pem",
        "-----BEGIN CERTIFICATE-----\nno base64!\n-----END CERTIFICATE-----\n",
    );
    write(
        "encrypted.key",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
    );
}

/// Files of the authority, the certificate and the key, and the parts of the error.
const FILE_CASES: [([&str; 3], &[&str]); 6] = [
    (["ca.pem", "me.pem", "me.key"], &[]),
    (
        ["no.pem", "no.pem", "no.key"],
        &[
            "3 problems",
            "kafka.ca_file no.pem: cannot be read",
            "kafka.key_file no.key: cannot be read",
        ],
    ),
    (
        ["me.key", "broken.pem", "me.pem"],
        &[
            "kafka.ca_file me.key: has no certificate in PEM",
            "kafka.certificate_file broken.pem: is not PEM",
            "kafka.key_file me.pem: has no private key in PEM",
        ],
    ),
    (
        ["ca.pem", "me.pem", "other.key"],
        &[
            "1 problem",
            "kafka.key_file other.key: does not fit kafka.certificate",
        ],
    ),
    (
        ["ca.pem", "me.pem", "encrypted.key"],
        &["kafka.key_file encrypted.key: is encrypted"],
    ),
    (["", "me.pem", ""], &["kafka.key_file is missing"]),
];

/// What is wrong with the files is known before the start.
#[test]
fn the_start_is_refused_with_unusable_tls_files() {
    let dir = tempfile::tempdir().unwrap();
    write_files(dir.path());
    for ([ca, certificate, key], expected) in FILE_CASES {
        for command in ["check-config", "serve"] {
            if command == "serve" && expected.is_empty() {
                continue;
            }
            let env = [
                ("PAYRELAY_PUBLISHER_KIND", "kafka"),
                ("PAYRELAY_KAFKA_SECURITY", "tls"),
                ("PAYRELAY_KAFKA_CA_FILE", ca),
                ("PAYRELAY_KAFKA_CERTIFICATE_FILE", certificate),
                ("PAYRELAY_KAFKA_KEY_FILE", key),
            ];
            let (code, _, text) = run_command(dir.path(), &env, &[command]);
            let is_sound = expected.is_empty();
            assert_eq!(code, Some(if is_sound { 0 } else { 78 }), "{text}");
            for part in expected {
                assert!(text.contains(part), "{part:?} is missing from:\n{text}");
            }
        }
    }
}

#[test]
fn check_config_masks_the_password() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = Options::new(dir.path(), &sasl("PLAIN", PASSWORD));
    options.args.push("check-config".to_owned());
    let output = run_to_exit(options);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        text.contains("sasl_password = \"***\"") && !text.contains(PASSWORD),
        "{text}"
    );
}
