//! The real binary as an operator meets it: arguments, configuration, signals, exit codes, the
//! lock, restarts.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rusqlite::Connection;
use serde_json::json;

use testkit::child::without_configuration;
use testkit::hostile::Machine;
use testkit::http::Client;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(20);

fn options(dir: &Path, env: &[(&str, &str)], args: &[&str]) -> Options {
    let args = args.iter().map(|arg| (*arg).into()).collect();
    Options {
        args,
        ..Options::new(dir, env)
    }
}

/// Exit code, standard output, standard error.
fn run(dir: &Path, env: &[(&str, &str)], args: &[&str]) -> (Option<i32>, String, String) {
    let output = run_to_exit(options(dir, env, args));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn pay(client: &mut Client, reservation: i64) {
    let body =
        json!({"user_id": 1, "reservations": [{"reservation_id": reservation, "seat_price": 5}]});
    assert_eq!(client.post_json("/payments", &body).status, 201);
}

#[test]
fn help_and_version_exit_with_0() {
    let dir = tempfile::tempdir().unwrap();
    let (code, help, _) = run(dir.path(), &[], &["--help"]);
    assert_eq!(code, Some(0));
    for word in ["check-config", "--config", "PAYRELAY_LOG", "Exit codes"] {
        assert!(help.contains(word), "{word} is missing from:\n{help}");
    }
    let (code, version, _) = run(dir.path(), &[], &["--version"]);
    assert_eq!(
        (code, version.trim()),
        (Some(0), concat!("payrelay ", env!("CARGO_PKG_VERSION")))
    );
}

#[test]
fn wrong_arguments_exit_with_64() {
    let dir = tempfile::tempdir().unwrap();
    for args in [["--nonsense"].as_slice(), &["fly"], &["--config"]] {
        let (code, _, error) = run(dir.path(), &[], args);
        assert_eq!(code, Some(64), "{error}");
    }
}

#[test]
fn a_wrong_configuration_exits_with_78_and_every_problem() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("config.toml"),
        "[database]\npath = 5\n[slcak]\nx = 1\n",
    )
    .unwrap();
    let (code, _, error) = run(dir.path(), &[("PAYRELAY_SCHEDULER_INTERVAL", "soon")], &[]);
    assert_eq!(code, Some(78));
    for part in [
        "the configuration (config.toml) has 3 problems:",
        "database.path = 5 (file)",
        "[slcak]: there is no such section; did you mean [slack]?",
        "scheduler.interval = \"soon\" (environment)",
    ] {
        assert!(error.contains(part), "{part} is missing from:\n{error}");
    }
    let (code, _, error) = run(dir.path(), &[], &["--config", "nowhere.toml"]);
    assert!(
        code == Some(78) && error.contains("nowhere.toml"),
        "{error}"
    );
    let (code, _, error) = run(
        dir.path(),
        &[("PAYRELAY_LOG", "loud")],
        &["--config", "/dev/null"],
    );
    assert!(
        code == Some(78) && error.contains("PAYRELAY_LOG = \"loud\""),
        "{error}"
    );
}

#[test]
fn check_config_shows_the_effective_values_and_no_secret() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("mine.toml"), "[kafka]\ntopic = 'mine'\n").unwrap();
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", "https://hooks.example/secret"),
        ("PAYRELAY_HTTP_LISTEN", "127.0.0.1:1"),
    ];
    let (code, shown, _) = run(dir.path(), &env, &["check-config", "--config", "mine.toml"]);
    assert_eq!(code, Some(0));
    for line in [
        "topic = \"mine\" # file",
        "listen = \"127.0.0.1:1\" # environment",
        "webhook_url = \"***\" # environment",
        "group = \"payment-group\" # default",
        "# mine.toml",
        "# warning: publisher.kind is \"application\", so these keys have no effect: kafka.topic",
    ] {
        assert!(shown.contains(line), "{line} is missing from:\n{shown}");
    }
    assert!(!shown.contains("secret"));
    assert!(
        !dir.path().join("payrelay.db").exists(),
        "checking opens no database"
    );
}

#[test]
fn sigterm_and_sigint_stop_payrelay_with_0_and_one_database_file() {
    for signal in ["-TERM", "-INT"] {
        let dir = tempfile::tempdir().unwrap();
        let mut payrelay = Payrelay::start(options(dir.path(), &[], &[]));
        let mut client = Client::connect(payrelay.addr());
        pay(&mut client, 1);
        let pid = payrelay.pid().to_string();
        Command::new("kill").args([signal, &pid]).status().unwrap();
        let mut status = None;
        wait_until("the exit", LIMIT, || {
            status = payrelay.try_exit();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(0), "{}", payrelay.log());
        assert!(payrelay.log().contains("stopped"));
        assert!(
            !dir.path().join("payrelay.db-wal").exists(),
            "the WAL is checkpointed into the file"
        );
    }
}

#[test]
fn a_request_in_progress_is_finished_before_the_stop() {
    let dir = tempfile::tempdir().unwrap();
    let mut payrelay = Payrelay::start(options(dir.path(), &[], &[]));
    let mut client = Client::connect(payrelay.addr());
    let body =
        json!({"user_id": 1, "reservations": [{"reservation_id": 1, "seat_price": 5}]}).to_string();
    let head = "POST /payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
        application/json\r\nExpect: 100-continue\r\n";
    client
        .send_raw(format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes())
        .unwrap();
    assert_eq!(
        client.read_interim().status,
        100,
        "the request is in progress"
    );
    Command::new("kill")
        .args(["-TERM", &payrelay.pid().to_string()])
        .status()
        .unwrap();
    payrelay.wait_for_log("stopping: SIGTERM", LIMIT);
    client.send_raw(body.as_bytes()).unwrap();
    assert_eq!(client.read_response().status, 201);
    assert_eq!(payrelay.terminate().code(), Some(0));
}

#[test]
fn the_second_process_on_a_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = Payrelay::start(options(dir.path(), &[], &[]));
    let (code, _, error) = run(dir.path(), &[], &[]);
    assert_eq!(code, Some(75), "it may pass");
    assert!(
        error.contains(&format!(
            "in use by another payrelay (process {})",
            first.pid()
        )),
        "{error}"
    );
}

#[test]
fn a_link_to_a_database_uses_the_same_lock() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("data")).unwrap();
    let link =
        |to: &str, name: &str| std::os::unix::fs::symlink(to, dir.path().join(name)).unwrap();
    link("data/payments.db", "direct.db");
    link("direct.db", "chain.db");
    link(
        dir.path().join("data/payments.db").to_str().unwrap(),
        "absolute.db",
    );
    let first = Payrelay::start(options(
        dir.path(),
        &[("PAYRELAY_DATABASE_PATH", "direct.db")],
        &[],
    ));
    pay(&mut Client::connect(first.addr()), 1);
    let target = dir.path().canonicalize().unwrap().join("data/payments.db");
    assert!(
        first
            .log()
            .contains(&format!("database {}", target.display())),
        "{}",
        first.log()
    );
    for path in ["direct.db", "chain.db", "absolute.db", "data/payments.db"] {
        let (code, _, error) = run(dir.path(), &[("PAYRELAY_DATABASE_PATH", path)], &[]);
        assert!(
            code == Some(75) && error.contains("in use by another payrelay"),
            "{path}: {error}"
        );
        let env = [("PAYRELAY_DATABASE_PATH", path)];
        assert_eq!(run(dir.path(), &env, &["audit"]).0, Some(0), "{path}");
    }
    link("loop.db", "loop.db");
    let (code, _, error) = run(dir.path(), &[("PAYRELAY_DATABASE_PATH", "loop.db")], &[]);
    assert!(
        code == Some(78) && error.contains("too many symbolic links"),
        "{error}"
    );
}

#[test]
fn new_files_are_for_their_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(options(dir.path(), &[], &[]));
    pay(&mut Client::connect(payrelay.addr()), 1);
    for name in [
        "payrelay.db",
        "payrelay.db-wal",
        "payrelay.db-shm",
        "payrelay.db.lock",
    ] {
        let mode = fs::metadata(dir.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn variables_of_container_runtimes_stop_no_command() {
    let dir = tempfile::tempdir().unwrap();
    let env = [
        ("PAYRELAY_KAFKA_SERVICE_HOST", "10.0.0.1"),
        ("PAYRELAY_HTTP_PORT", "tcp://10.0.0.1:80"),
        ("PAYRELAY_HTTP_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("PAYRELAY_LOG", ""),
        ("PAYRELAY_CONFIG", ""),
    ];
    let (code, shown, _) = run(dir.path(), &env, &["check-config"]);
    assert_eq!(code, Some(0));
    assert!(
        shown.contains("# ignored: the environment variable PAYRELAY_HTTP_PORT names no key"),
        "{shown}"
    );
    let payrelay = Payrelay::start(options(dir.path(), &env, &[]));
    pay(&mut Client::connect(payrelay.addr()), 1);
    payrelay.wait_for_log(
        "ignoring the environment variable PAYRELAY_KAFKA_SERVICE_HOST: it names no configuration \
            key",
        LIMIT,
    );
}

#[test]
fn an_address_in_use_is_refused() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let first = Payrelay::start(options(dirs[0].path(), &[], &[]));
    let (code, _, error) = run(
        dirs[1].path(),
        &[("PAYRELAY_HTTP_LISTEN", &first.addr().to_string())],
        &[],
    );
    assert!(code == Some(75) && error.contains("http.listen"), "{error}");
    let left = fs::read_dir(dirs[1].path()).unwrap().count();
    assert_eq!(left, 0, "no database is created");
}

#[test]
fn unusable_certificates_and_proxies_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("empty.pem"), "no certificate").unwrap();
    for file in ["nowhere.pem", "empty.pem"] {
        let env = [
            ("PAYRELAY_SLACK_WEBHOOK_URL", "https://hooks.example/T0"),
            ("PAYRELAY_SLACK_CA_FILE", file),
        ];
        let (code, _, error) = run(dir.path(), &env, &[]);
        assert!(
            code == Some(78) && error.contains(&format!("slack.ca_file {file}")),
            "{error}"
        );
    }
    let env = [
        ("PAYRELAY_SLACK_WEBHOOK_URL", "https://x"),
        ("PAYRELAY_SLACK_PROXY", "http://user:hush@:::"),
    ];
    let (code, _, error) = run(dir.path(), &env, &[]);
    assert!(
        code == Some(78) && error.contains("slack.proxy") && !error.contains("hush"),
        "{error}"
    );
    let file = dir.path().join("slack.toml");
    let keys = "[slack]\nwebhook_url = 'https://x'\nca_file = 'nowhere.pem'\n";
    fs::write(&file, keys).unwrap();
    for command in [
        ["--config", "slack.toml"].as_slice(),
        &["check-config", "--config", "slack.toml"],
    ] {
        let (code, _, error) = run(dir.path(), &[], command);
        assert!(
            code == Some(78) && error.contains("the configuration (slack.toml) has 1 problem:"),
            "{error}"
        );
    }
    // A command alongside payrelay makes nothing.
    let (code, _, error) = run(dir.path(), &[], &["dead-letters", "list"]);
    assert!(
        code == Some(78) && error.contains("database.path"),
        "{error}"
    );
    assert!(!dir.path().join("payrelay.db").exists());
}

#[test]
fn an_unusable_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.db");
    fs::write(&path, "x".repeat(5000)).unwrap();
    for path in [path.to_str().unwrap(), "/nowhere/payrelay.db", "/"] {
        let (code, _, error) = run(dir.path(), &[("PAYRELAY_DATABASE_PATH", path)], &[]);
        assert!(
            code == Some(78) && error.contains("database.path"),
            "{path}: {error}"
        );
    }
}

#[test]
fn acknowledged_payments_survive_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    for round in 1..=5 {
        let mut payrelay = Payrelay::start(options(dir.path(), &[], &[]));
        let mut client = Client::connect(payrelay.addr());
        for _ in 0..20 {
            acknowledged += 1;
            pay(&mut client, acknowledged);
        }
        payrelay.kill9();
        assert_eq!(acknowledged, round * 20);
    }
    let payrelay = Payrelay::start(options(dir.path(), &[], &[]));
    let mut client = Client::connect(payrelay.addr());
    for id in 1..=acknowledged {
        wait_until("every acknowledged payment to be delivered", LIMIT, || {
            let way = client.get(&format!("/payments/{id}")).json();
            assert_eq!(
                (&way["reservation_id"], &way["status"]),
                (&json!(id), &json!("COMPLETED")),
                "{way}"
            );
            way["notification"]["status"] == "DELIVERED"
        });
    }
}

#[test]
fn the_log_says_what_a_new_user_needs_to_see() {
    let dir = tempfile::tempdir().unwrap();
    let env = [
        ("PAYRELAY_SCHEDULER_INTERVAL", "50ms"),
        ("PAYRELAY_SERVICE_HOST", "x"),
        ("PAYRELAY_KAFKA_TOPIC", "other"),
    ];
    let file = dir.path().join("config.toml");
    fs::write(&file, "[http]\nbody_timeout = \"9s\"\n").unwrap();
    let first_line = format!(", configuration {}", file.display());
    let payrelay = Payrelay::start(options(dir.path(), &env, &[]));
    payrelay.wait_for_log(&first_line, LIMIT);
    let mut client = Client::connect(payrelay.addr());
    pay(&mut client, 1001);
    for line in [
        "slack.webhook_url is not set: messages go to this log only",
        "ignoring the environment variable PAYRELAY_SERVICE_HOST: it names no configuration key",
        "payrelay.db, no Kafka",
        "publisher.kind is \"application\", so these keys have no effect: kafka.topic; set",
        "after its commit: Payment 1 COMPLETED: user 1 paid 5 KRW for reservation 1001",
        // Perhaps not in the same line.
        "summary: published 1, ",
        ", delivered 1, ",
        "waiting: 0 (oldest 0 s) to publish, 0 (oldest 0 s) to consume, 0 (oldest 0 s) to \
            deliver; dead letters: 0",
    ] {
        payrelay.wait_for_log(line, LIMIT);
    }
}

/// Starts it with this number of descriptors, and returns its log once it serves.
fn log_with_descriptors(descriptors: u32, env: &[(&str, &str)]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let script = format!("ulimit -n {descriptors}; exec \"$0\" 2>log");
    let mut child = without_configuration(&mut Command::new("sh"))
        .args(["-c", &script, testkit::paths::binary().to_str().unwrap()])
        .current_dir(dir.path())
        .env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0")
        .envs(env.iter().copied())
        .spawn()
        .unwrap();
    let log = || fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    let serves = || log().contains("listening on http://") && log().ends_with('\n');
    wait_until("a payrelay that serves, or its end", LIMIT, || {
        serves() || child.try_wait().unwrap().is_some()
    });
    let log = log();
    let ended = child.try_wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(ended, None, "{log}");
    log
}

#[test]
fn descriptors_are_reserved_for_each_reader_and_channel() {
    let routes = "[[slack.route]]\nname = 'a'\nwebhook_url = 'http://x'\n";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("routes.toml");
    fs::write(&file, routes).unwrap();
    let env = [
        ("PAYRELAY_DATABASE_READERS", "64"),
        ("PAYRELAY_CONFIG", file.to_str().unwrap()),
    ];
    let log = log_with_descriptors(300, &env);
    assert!(
        log.contains("serving at most 74 connections at a time"),
        "{log}"
    );
}

#[test]
fn few_descriptors_leave_half_of_the_connections_to_other_addresses() {
    for env in [&[][..], &[("PAYRELAY_HTTP_CLIENT_CONNECTIONS_MAX", "2048")]] {
        let log = log_with_descriptors(300, env);
        assert!(
            log.contains(
                "serving at most 200 connections at a time, and at most 100 of one address"
            ),
            "{log}"
        );
    }
}

#[test]
fn a_start_on_a_full_disk_is_refused_with_advice() {
    let machine = Machine::new();
    for made in [false, true] {
        machine.set("full", "0");
        let output = run_to_exit(machine.options(&[]));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{error}");
        assert!(
            error.contains("free space") && !error.contains("kernel"),
            "{made}: {error}"
        );
        machine.clear("full");
        let mut payrelay = Payrelay::start(machine.options(&[]));
        pay(&mut Client::connect(payrelay.addr()), i64::from(made) + 1);
        payrelay.kill9();
    }
}

#[test]
fn a_command_finishes_although_its_output_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    drop(Payrelay::start(options(dir.path(), &[], &[])));
    let database = Connection::open(dir.path().join("payrelay.db")).unwrap();
    let letters = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 250) \
        INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, received_at) \
        SELECT 'a', 0, n, 'no', 1 FROM n";
    database.execute_batch(letters).unwrap();
    let unread = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(testkit::paths::binary());
        without_configuration(&mut command)
            .args(args)
            .current_dir(dir.path())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer);
        let mut child = command.spawn().unwrap();
        wait_for("the end of the command", LIMIT, || {
            child.try_wait().unwrap()
        })
        .code()
    };
    let commands: [&[&str]; 5] = [
        &["check-config"],
        &["token"],
        &["dead-letters", "list"],
        &["audit"],
        &["backup", "copy.db"],
    ];
    for args in commands {
        assert_eq!(unread(args), Some(0), "{args:?}");
    }
    assert_eq!(unread(&["fly"]), Some(64));
    let open = |count: i64| {
        let found = database.query_row(
            "SELECT count(*) FROM dead_letter WHERE state = 'OPEN'",
            [],
            |row| row.get(0),
        );
        assert_eq!(found, Ok(count));
    };
    assert_eq!(
        unread(&["dead-letters", "replay", "--all"]),
        Some(1),
        "none of them can be replayed"
    );
    let tried = database.query_row("SELECT count(*) FROM dead_letter_action", [], |row| {
        row.get(0)
    });
    assert_eq!(tried, Ok(250));
    open(250);
    assert_eq!(
        unread(&[
            "dead-letters",
            "discard",
            "--all",
            "--reason",
            "no",
            "--yes"
        ]),
        Some(0)
    );
    open(0);
}

#[test]
fn unwritable_output_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(testkit::paths::binary());
    let output = without_configuration(&mut command)
        .arg("token")
        .current_dir(dir.path())
        .stdout(full())
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(74) && error.contains("the output could not be written"),
        "{error}"
    );
}

#[test]
fn an_audit_with_an_unusable_certificate_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Payrelay::start(options(dir.path(), &[], &[])));
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_SECURITY", "tls"),
        ("PAYRELAY_KAFKA_CA_FILE", "nowhere.pem"),
    ];
    let (code, _, error) = run(dir.path(), &env, &["audit"]);
    assert!(
        code == Some(78) && error.contains("kafka.ca_file nowhere.pem: cannot be read"),
        "{error}"
    );
    let (code, _, error) = run(dir.path(), &env, &["audit", "--file-only"]);
    assert_eq!((code, error.as_str()), (Some(0), ""));
}

/// What payrelay says to systemd, message by message.
fn next_notification(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 1024];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn systemd_learns_that_payrelay_is_ready_lives_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let env = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "300000"),
    ];
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &env));
    assert_eq!(next_notification(&socket).trim(), "READY=1");
    let seen: Vec<String> = (0..6).map(|_| next_notification(&socket)).collect();
    let says = |text: &str| seen.iter().any(|message| message.trim() == text);
    assert!(says("WATCHDOG=1"), "{seen:?}");
    assert!(
        says("STATUS=0 unpublished, 0 unconsumed, 0 undelivered, 0 dead letters"),
        "{seen:?}"
    );
    let wait_for_message = |start: &str| {
        wait_until(start, Duration::from_secs(20), || {
            next_notification(&socket).starts_with(start)
        });
    };
    payrelay.signal("HUP");
    wait_for_message("RELOADING=1");
    wait_for_message("READY=1");
    assert!(payrelay.terminate().success());
    wait_for_message("STOPPING=1");
}
