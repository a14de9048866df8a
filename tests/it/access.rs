//! Who may call the real binary, how much of it one client gets, and what clients that are slow on
//! purpose cost the others.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rusqlite::Connection;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use testkit::http::{Client, Response, payment, request};
use testkit::process::{Options, Payrelay, origin_with_sudo, run_command};
use testkit::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(20);

/// A token as an `[[http.token]]`.
fn token(name: &str, access: &str, token: &str) -> String {
    format!(
        "[[http.token]]\nname = '{name}'\naccess = '{access}'\nhash = 'sha256:{:x}'\n",
        Sha256::digest(token)
    )
}

fn three_tokens() -> String {
    token("monitoring", "read-only", "look")
        + &token("till", "full", "pay")
        + &token("boss", "admin", "rule")
}

fn start(dir: &Path, config: &str, env: &[(&str, &str)]) -> Payrelay {
    fs::write(dir.join("config.toml"), config).unwrap();
    Payrelay::start(Options::new(dir, env))
}

/// What a request with a token, or none, is answered.
fn ask(client: &mut Client, start: &str, token: Option<&str>, body: &str) -> Response {
    let headers = token.map_or_else(String::new, |token| {
        format!("Authorization: Bearer {token}\r\n")
    });
    ask_with(client, start, &headers, body)
}

fn ask_with(client: &mut Client, start: &str, headers: &str, body: &str) -> Response {
    client
        .send_raw(request(start, headers, body).as_bytes())
        .unwrap();
    client.read_response()
}

fn hang_up(payrelay: &Payrelay) {
    Command::new("kill")
        .args(["-HUP", &payrelay.pid().to_string()])
        .status()
        .unwrap();
}

#[test]
fn a_printed_token_is_accepted_with_its_printed_hash() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("config.toml"),
        "what is wrong here does not matter to it",
    )
    .unwrap();
    let (code, printed, _) = run_command(dir.path(), &[], &["token"]);
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(
        (code, lines.len(), lines[0].len()),
        (Some(0), 2, 64),
        "{printed}"
    );
    assert_ne!(run_command(dir.path(), &[], &["token"]).1, printed);
    let config = format!(
        "[[http.token]]\nname = 'till'\naccess = 'full'\n{}\n",
        lines[1]
    );
    let payrelay = start(dir.path(), &config, &[]);
    let mut client = Client::connect(payrelay.addr());
    assert_eq!(
        ask(
            &mut client,
            "POST /payments",
            Some(lines[0]),
            &payment(1, 0)
        )
        .status,
        201
    );
    let hash = lines[1].split('"').nth(1).unwrap();
    assert_eq!(
        ask(&mut client, "POST /payments", Some(hash), &payment(2, 0)).status,
        401,
        "the hash is no token"
    );
}

/// Each request with its body, and the statuses of the responses to: no token, an unknown one,
/// read-only, full, admin.
const ACCESS_CASES: [(&str, &str, [u16; 5]); 12] = [
    ("POST /payments", PAYMENT, [401, 401, 403, 201, 201]),
    ("GET /payments/1", "", [401, 401, 200, 200, 200]),
    (
        "GET /users/1/payment-history",
        "",
        [401, 401, 200, 200, 200],
    ),
    ("GET /admin/channels", "", [401, 401, 403, 403, 200]),
    ("GET /admin/dead-letters", "", [401, 401, 403, 403, 200]),
    (
        "POST /admin/channels/default/resume",
        "",
        [401, 401, 403, 403, 202],
    ),
    (
        "POST /admin/dead-letters/discard?all=true",
        "",
        [401, 401, 403, 403, 200],
    ),
    ("GET /health/live", "", [200, 200, 200, 200, 200]),
    ("GET /health/ready", "", [200, 401, 200, 200, 200]),
    // A client without a token does not learn what there is.
    ("GET /nothing", "", [401, 401, 404, 404, 404]),
    ("DELETE /payments/1", "", [401, 401, 405, 405, 405]),
    ("GET /payments/x", "", [401, 401, 404, 404, 404]),
];

const PAYMENT: &str = r#"{"user_id": 1, "reservations": [{"reservation_id": 1, "seat_price": 5}]}"#;

/// The challenge says what is wrong with the token, and an error has a problem as its body.
fn assert_refusal(answer: &Response, expected: u16, token: Option<&str>) {
    let challenge = match (expected, token) {
        (401, None) => Some("Bearer realm=\"payrelay\""),
        (401, _) => Some("Bearer realm=\"payrelay\", error=\"invalid_token\""),
        (403, _) => Some("Bearer realm=\"payrelay\", error=\"insufficient_scope\""),
        _ => None,
    };
    assert_eq!(answer.header("www-authenticate"), challenge);
    if expected >= 400 {
        assert_eq!(
            answer.header("content-type"),
            Some("application/problem+json")
        );
        assert_eq!(answer.json()["status"], expected);
    }
}

#[test]
fn each_token_allows_what_its_access_level_says() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &three_tokens(), &[]);
    let mut client = Client::connect(payrelay.addr());
    let tokens = [None, Some("wrong"), Some("look"), Some("pay"), Some("rule")];
    for (start, body, expected) in ACCESS_CASES {
        for (token, expected) in tokens.into_iter().zip(expected) {
            let answer = ask(&mut client, start, token, body);
            assert_eq!(answer.status, expected, "{start} with {token:?}");
            assert_refusal(&answer, expected, token);
        }
    }
    for header in ["Basic bG9vazo=", "Bearer", "Bearer look look", "look"] {
        let header_line = format!("Authorization: {header}\r\n");
        let answer = ask_with(&mut client, "GET /payments/1", &header_line, "");
        assert_eq!(answer.status, 401, "{header}");
    }
    let bare = ask(&mut client, "GET /health/ready", None, "").json();
    assert_eq!(bare, json!({"status": "ready"}));
    let whole = ask(&mut client, "GET /health/ready", Some("look"), "").json();
    assert!(
        whole["node"].is_string() && whole["components"]["database"]["state"] == "up",
        "{whole}"
    );
}

#[test]
fn administrative_actions_record_their_token_or_the_local_user() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &three_tokens(), &[]);
    let mut client = Client::connect(payrelay.addr());
    for path in ["relay/resume", "channels/default/resume"] {
        let answer = ask(
            &mut client,
            &format!("POST /admin/{path}"),
            Some("rule"),
            "",
        );
        assert_eq!(answer.status, 202, "{path}");
        assert_eq!(answer.json()["requested"], "resume", "{path}");
    }
    let user = [("SUDO_USER", "operator")];
    for args in [
        ["outbox", "resume"].as_slice(),
        &["channels", "resume", "default"],
    ] {
        assert_eq!(run_command(dir.path(), &user, args).0, Some(0), "{args:?}");
    }
    let database = Connection::open(dir.path().join("payrelay.db")).unwrap();
    for table in ["relay_action", "channel_action"] {
        let mut query = database
            .prepare(&format!("SELECT origin FROM {table} ORDER BY id"))
            .unwrap();
        let origins: Vec<String> = query
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(
            origins,
            ["http, token boss", &origin_with_sudo()],
            "{table}"
        );
    }
}

#[test]
fn a_public_address_needs_a_token() {
    let dir = tempfile::tempdir().unwrap();
    for args in [["serve"], ["check-config"]] {
        let (code, _, error) =
            run_command(dir.path(), &[("PAYRELAY_HTTP_LISTEN", "0.0.0.0:0")], &args);
        assert_eq!(code, Some(78), "{error}");
        for part in [
            "http.listen = \"0.0.0.0:0\"",
            "set an [[http.token]]",
            "payrelay token",
            "127.0.0.1",
        ] {
            assert!(error.contains(part), "{part} is missing from:\n{error}");
        }
    }
    let payrelay = start(
        dir.path(),
        &three_tokens(),
        &[("PAYRELAY_HTTP_LISTEN", "0.0.0.0:0")],
    );
    let address = SocketAddr::from(([127, 0, 0, 1], payrelay.addr().port()));
    let mut client = Client::connect(address);
    assert_eq!(
        ask(&mut client, "POST /payments", None, &payment(1, 0)).status,
        401
    );
    assert_eq!(
        ask(&mut client, "POST /payments", Some("pay"), &payment(1, 0)).status,
        201
    );
}

#[test]
fn requests_from_web_pages_are_refused_without_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(
        dir.path(),
        "[http]\npublic_url = 'http://pay.local:8080/'\n",
        &[],
    );
    let mut client = Client::connect(payrelay.addr());
    for host in [
        "evil.example",
        "127.0.0.1.evil.example:8080",
        "localhost.evil.example",
    ] {
        for (start, body) in [
            ("POST /payments", payment(1, 0)),
            ("GET /users/1/payment-history", String::new()),
        ] {
            let answer = ask_with(&mut client, start, &format!("Host: {host}\r\n"), &body);
            assert_eq!(
                (answer.status, answer.header("content-type")),
                (421, Some("application/problem+json")),
                "{host}"
            );
            assert!(
                answer.json()["detail"]
                    .as_str()
                    .unwrap()
                    .contains("http.public_url")
            );
        }
    }
    for start in [
        "POST /payments",
        "POST /admin/dead-letters/discard?all=true",
    ] {
        for origin in ["https://evil.example", "null", "http://127.0.0.1:8080"] {
            let answer = ask_with(
                &mut client,
                start,
                &format!("Origin: {origin}\r\n"),
                &payment(1, 0),
            );
            assert_eq!(answer.status, 403, "{start} from {origin}");
        }
    }
    assert_eq!(client.get("/payments/1").status, 404, "nothing was stored");
    for (reservation, host) in (1..).zip([
        "pay.local:8080",
        "localhost",
        "x.localhost:1",
        "192.0.2.1",
        "[::1]:8080",
    ]) {
        let body = payment(reservation, 0);
        assert_eq!(
            ask_with(
                &mut client,
                "POST /payments",
                &format!("Host: {host}\r\n"),
                &body
            )
            .status,
            201,
            "{host}"
        );
    }
}

#[test]
fn a_token_makes_host_and_origin_irrelevant() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &three_tokens(), &[]);
    let headers =
        "Host: shop.example\r\nOrigin: https://shop.example\r\nAuthorization: Bearer pay\r\n";
    assert_eq!(
        ask_with(
            &mut Client::connect(payrelay.addr()),
            "POST /payments",
            headers,
            &payment(1, 0)
        )
        .status,
        201
    );
}

/// Reloads a file that is refused, and waits until the log has said so once more.
fn assert_refused_reload(payrelay: &Payrelay, line: &str, change: impl FnOnce()) {
    let before = payrelay.count_in_log(line);
    change();
    hang_up(payrelay);
    wait_until("the refusal", LIMIT, || {
        payrelay.count_in_log(line) > before
    });
}

#[test]
fn sighup_replaces_the_tokens_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    let mut payrelay = start(dir.path(), &three_tokens(), &[]);
    let mut client = Client::connect(payrelay.addr());
    let mut post = |token, id| {
        let body = payment(id, 0);
        ask(&mut client, "POST /payments", Some(token), &body).status
    };
    assert_eq!(post("pay", 1), 201);

    let changed =
        "[http]\nbody_timeout = '11s'\n[slack]\nwebhook_url = 'https://hooks.example/hush'\n"
            .to_owned()
            + &token("till", "full", "new")
            + &token("boss", "read-only", "rule")
            + &token("shop", "full", "pay-too");
    fs::write(&config, changed).unwrap();
    hang_up(&payrelay);
    payrelay.wait_for_log(
        "SIGHUP: tokens: added shop; removed monitoring; changed till, boss",
        LIMIT,
    );
    payrelay.wait_for_log(
        "restart it for: http.body_timeout, slack.webhook_url",
        LIMIT,
    );
    // On the connection that was open all the time.
    for (token, expected) in [
        ("pay", 401),
        ("look", 401),
        ("rule", 403),
        ("new", 201),
        ("pay-too", 201),
    ] {
        assert_eq!(post(token, 2), expected, "{token}");
    }

    for wrong in [
        "[[http.token]]\nname = 'x'\n",
        "hush = ",
        "[http]\nbody_timeout = 'x'\n",
    ] {
        assert_refused_reload(&payrelay, "SIGHUP: nothing is changed", || {
            fs::write(&config, wrong).unwrap();
        });
        assert_eq!(post("new", 3), 201, "{wrong}");
    }
    // Nor does a file that has lost its tokens, or is lost itself, let every client in.
    for lost in [
        |config: &Path| fs::write(config, "").unwrap(),
        |config: &Path| fs::remove_file(config).unwrap(),
    ] {
        assert_refused_reload(&payrelay, "http.token: there is none any more", || {
            lost(&config);
        });
        assert_eq!(client.get("/payments/1").status, 401);
    }
    assert!(!payrelay.log().contains("hush"), "{}", payrelay.log());
    assert_eq!(payrelay.terminate().code(), Some(0));
}

#[test]
fn a_stop_does_not_wait_for_reloads() {
    let dir = tempfile::tempdir().unwrap();
    let mut payrelay = start(dir.path(), &three_tokens(), &[]);
    for _ in 0..50 {
        hang_up(&payrelay);
    }
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
}

#[test]
fn payrelay_shows_no_token_and_no_hash() {
    let dir = tempfile::tempdir().unwrap();
    let secret = "s3cret-of-the-till";
    let wrong = "n0-such-t0ken";
    let hash = format!("{:x}", Sha256::digest(secret));
    let env = [("PAYRELAY_LOG", "trace")];
    let mut payrelay = start(dir.path(), &token("till", "read-only", secret), &env);
    let mut shown = String::new();
    for (start, token) in [
        ("GET /payments/1", secret),
        ("POST /payments", secret),
        ("GET /health/ready", secret),
        ("GET /admin/channels", secret),
        ("GET /payments/1", wrong),
        ("POST /payments", wrong),
    ] {
        let mut client = Client::connect(payrelay.addr());
        let answer = ask(&mut client, start, Some(token), &payment(1, 0));
        writeln!(
            shown,
            "{:?}\n{}",
            answer.headers,
            String::from_utf8_lossy(&answer.body)
        )
        .unwrap();
    }
    // One that broke the head, and one that sent it as the path.
    for broken in [
        format!("GET / HTTP/1.1\r\nAuthorization: Bearer {secret}\r\nbroken\r\n\r\n"),
        format!("{secret}\r\n\r\n"),
    ] {
        let mut client = Client::connect(payrelay.addr());
        client.send_raw(broken.as_bytes()).unwrap();
        assert_eq!(client.read_response().status, 400);
    }
    hang_up(&payrelay);
    payrelay.wait_for_log("SIGHUP: tokens: none changed", LIMIT);
    for args in [&["check-config"][..], &["--help"], &["help", "token"]] {
        let (code, out, error) = run_command(dir.path(), &env, args);
        assert_eq!(code, Some(0), "{error}");
        shown += &(out + &error);
    }
    assert!(shown.contains("hash = \"***\""), "{shown}");
    // The hash where the token belongs, the token where its hash belongs: reported, and not shown.
    let misplaced =
        token("till", "full", "x").replace(&format!("sha256:{:x}", Sha256::digest("x")), secret);
    fs::write(dir.path().join("config.toml"), misplaced).unwrap();
    let (code, out, error) = run_command(dir.path(), &[], &["check-config"]);
    assert_eq!(code, Some(78));
    shown += &(out + &error);
    hang_up(&payrelay);
    payrelay.wait_for_log("SIGHUP: nothing is changed", LIMIT);
    assert_eq!(payrelay.terminate().code(), Some(0));
    shown += &payrelay.log();
    for hidden in [secret, wrong, &hash, &hash.to_uppercase()] {
        assert!(!shown.contains(hidden), "{hidden} is shown:\n{shown}");
    }
}

#[test]
fn every_response_forbids_browsers_to_render_it() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), &three_tokens(), &[]);
    let mut client = Client::connect(payrelay.addr());
    let body = payment(1, 0);
    for (start, token, body, status) in [
        ("POST /payments", Some("pay"), body.as_str(), 201),
        ("GET /payments/1", Some("look"), "", 200),
        ("GET /health/live", None, "", 200),
        ("GET /health/ready", None, "", 200),
        ("GET /payments/1", None, "", 401),
        ("POST /payments", Some("look"), "", 403),
        ("GET /nothing", Some("look"), "", 404),
        ("PUT /payments", Some("look"), "", 405),
        ("POST /payments", Some("pay"), "{", 400),
    ] {
        let answer = ask(&mut client, start, token, body);
        assert_eq!(answer.status, status, "{start}");
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            (
                "content-security-policy",
                "default-src 'none'; frame-ancestors 'none'",
            ),
            ("cache-control", "no-store"),
        ] {
            assert_eq!(answer.header(name), Some(value), "{start}");
        }
    }
}

#[test]
fn each_client_has_its_own_rate_limit() {
    let dir = tempfile::tempdir().unwrap();
    let config = "[http]\nclient_requests_per_second = 5\n".to_owned() + &three_tokens();
    let payrelay = start(dir.path(), &config, &[]);
    let mut client = Client::connect(payrelay.addr());
    let mut statuses = Vec::new();
    for _ in 0..100 {
        let answer = ask(&mut client, "GET /payments/1", Some("look"), "");
        if answer.status == 429 {
            assert_eq!(answer.header("retry-after"), Some("1"));
            assert!(
                answer.json()["detail"]
                    .as_str()
                    .unwrap()
                    .contains("http.client_requests_per_second")
            );
        }
        statuses.push(answer.status);
    }
    let accepted = statuses.iter().filter(|status| **status == 404).count();
    assert!(
        statuses[..5].iter().all(|status| *status == 404),
        "{statuses:?}"
    );
    assert!(
        statuses.contains(&429) && accepted < 100,
        "{accepted} of 100"
    );
    // Another token on the same connection; and no supervisor takes it for dead.
    assert_eq!(
        ask(&mut client, "POST /payments", Some("pay"), &payment(1, 0)).status,
        201
    );
    for _ in 0..50 {
        assert_eq!(ask(&mut client, "GET /health/live", None, "").status, 200);
    }
    // Guesses count against the address.
    let guesses: Vec<_> = (0..100)
        .map(|_| ask(&mut client, "GET /payments/1", Some("guess"), "").status)
        .collect();
    assert!(
        guesses.contains(&401) && guesses.contains(&429),
        "{guesses:?}"
    );
    wait_until("the pace to recover", LIMIT, || {
        ask(&mut client, "GET /payments/1", Some("look"), "").status == 200
    });
}

#[test]
fn an_address_without_tokens_has_a_rate_limit() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), "[http]\nclient_requests_per_second = 3\n", &[]);
    let statuses: Vec<_> = (0..100)
        .map(|_| Client::connect(payrelay.addr()).get("/payments/1").status)
        .collect();
    assert!(
        statuses.contains(&404) && statuses.contains(&429),
        "a new connection is no new client: {statuses:?}"
    );
}

#[test]
fn incomplete_bodies_are_limited_for_each_client_and_in_total() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start_with_small_limits(dir.path(), "30s");
    let whole = |token: &str| whole_body(&payrelay, token);
    let half = |token: &str| half_body(&payrelay, token);
    // Tried until the half body was there before the whole one: that one is refused then.
    let ((mut first, rest), refused) =
        wait_for("the limit of one client to be reached", LIMIT, || {
            let begun = half("1");
            let answer = whole("1");
            (answer.status != 201).then_some((begun, answer))
        });
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (429, Some("1"))
    );
    assert!(
        refused.json()["detail"]
            .as_str()
            .unwrap()
            .contains("http.client_body_bytes_max")
    );
    assert_eq!(whole("2").status, 201, "another client has its own limit");
    let small = ask(
        &mut Client::connect(payrelay.addr()),
        "POST /payments",
        Some("1"),
        &payment(2, 0),
    );
    assert_eq!(
        small.status, 201,
        "a body that is there at once counts for nothing"
    );

    let (_second, refused) = wait_for("the limit of all to be reached", LIMIT, || {
        let begun = half("2");
        let answer = whole("3");
        (answer.status != 201).then_some((begun, answer))
    });
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (503, Some("1"))
    );
    assert!(
        refused.json()["detail"]
            .as_str()
            .unwrap()
            .contains("http.bodies_bytes_max")
    );

    first.send_raw(rest.as_bytes()).unwrap();
    assert_eq!(first.read_response().status, 201);
    assert_eq!(
        [whole("1").status, whole("3").status],
        [201, 201],
        "the response releases the share"
    );
}

#[test]
fn a_timed_out_body_releases_its_share() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start_with_small_limits(dir.path(), "1s");
    let mut given_up = wait_for("the limit of one client to be reached", LIMIT, || {
        let (begun, _) = half_body(&payrelay, "1");
        let answer = whole_body(&payrelay, "1");
        (answer.status == 429).then_some(begun)
    });
    assert_eq!(given_up.read_response().status, 408);
    assert_eq!(whole_body(&payrelay, "1").status, 201);
}

/// Limits of one body for each of three clients, and of two for all of them.
fn start_with_small_limits(dir: &Path, body_timeout: &str) -> Payrelay {
    let limits =
        "body_bytes_max = 65536\nclient_body_bytes_max = 65536\nbodies_bytes_max = 120000\n";
    let tokens =
        token("one", "full", "1") + &token("two", "full", "2") + &token("three", "full", "3");
    start(
        dir,
        &format!("[http]\nbody_timeout = '{body_timeout}'\n{limits}{tokens}"),
        &[],
    )
}

fn whole_body(payrelay: &Payrelay, token: &str) -> Response {
    ask(
        &mut Client::connect(payrelay.addr()),
        "POST /payments",
        Some(token),
        &payment(1, 60_000),
    )
}

/// A body that has begun, and the rest of it.
fn half_body(payrelay: &Payrelay, token: &str) -> (Client, String) {
    let mut client = Client::connect(payrelay.addr());
    let text = request(
        "POST /payments",
        &format!("Authorization: Bearer {token}\r\n"),
        &payment(1, 60_000),
    );
    let (sent, rest) = text.split_at(text.len() - 5000);
    client.send_raw(sent.as_bytes()).unwrap();
    (client, rest.to_owned())
}

#[test]
fn connections_of_one_address_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = start(dir.path(), "[http]\nclient_connections_max = 4\n", &[]);
    let mut kept: Vec<_> = (0..4).map(|_| Client::connect(payrelay.addr())).collect();
    assert!(
        kept.iter_mut()
            .all(|client| client.get("/health/live").status == 200)
    );
    for _ in 0..20 {
        assert!(Client::connect(payrelay.addr()).closed_by_server());
    }
    assert!(
        kept.iter_mut()
            .all(|client| client.get("/health/live").status == 200),
        "those that are there stay"
    );
    let line =
        "refused connections beyond http.client_connections_max (1), the last from 127.0.0.1";
    payrelay.wait_for_log(line, LIMIT);
    let before = payrelay.descriptors();
    kept.truncate(1);
    wait_until("the server to see that they are gone", LIMIT, || {
        payrelay.descriptors() <= before - 3
    });
    assert_eq!(
        payrelay.log().matches("client_connections_max").count(),
        1,
        "{}",
        payrelay.log()
    );
    assert_eq!(
        Client::connect(payrelay.addr()).get("/health/live").status,
        200
    );
}
