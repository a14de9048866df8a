//! The local Unix socket: who may use it, its mode, and when its file is replaced or removed.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use testkit::child::without_configuration;
use testkit::http::{Client, ask_local, payment};
use testkit::process::{Options, Payrelay, run_command};
use testkit::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

fn start(dir: &Path, env: &[(&str, &str)]) -> Payrelay {
    Payrelay::start(Options::new(dir, env))
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("payrelay.db.sock")
}

/// A token that this test does not use: with it a network client needs one.
const TOKEN: &str = "[[http.token]]\nname = 'till'\naccess = 'full'\n\
    hash = 'sha256:5555555555555555555555555555555555555555555555555555555555555555'\n";

#[test]
fn a_client_of_the_local_socket_has_admin_access_without_a_token() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.toml"), TOKEN).unwrap();
    let payrelay = start(dir.path(), &[]);
    let path = socket(dir.path());
    assert_eq!(
        Client::connect(payrelay.addr()).get("/payments/1").status,
        401
    );
    let keyed = "Idempotency-Key: a\r\n";
    let paid = ask_local(&path, "POST /payments", keyed, &payment(1, 0));
    assert_eq!(paid.status, 201);
    // What a web page or a proxy would send.
    let headers = "Host: evil.example\r\nOrigin: http://evil.example\r\nVia: 1.1 proxy\r\n";
    let resume = "POST /admin/relay/resume";
    assert_eq!(ask_local(&path, resume, headers, "").status, 202);
    let ready = ask_local(&path, "GET /health/ready", "", "").json();
    assert_ne!(ready["node"], Value::Null, "{ready}");
    let database = rusqlite::Connection::open(dir.path().join("payrelay.db")).unwrap();
    let text = |sql| {
        database
            .query_row(sql, [], |row| row.get::<_, String>(0))
            .unwrap()
    };
    assert_eq!(text("SELECT client FROM idempotency_key"), "local");
    let origin = text("SELECT origin FROM relay_action");
    assert!(origin.starts_with("local user "), "{origin}");
}

#[test]
fn the_local_socket_has_its_mode_whatever_the_umask() {
    for umask in ["000", "077"] {
        let dir = tempfile::tempdir().unwrap();
        let mut child = without_configuration(&mut Command::new("sh"))
            .args(["-c", &format!("umask {umask}; exec \"$0\" 2>log")])
            .arg(testkit::paths::binary())
            .current_dir(dir.path())
            .env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0")
            .spawn()
            .unwrap();
        let log = || fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        wait_until("a payrelay that serves", LIMIT, || {
            log().contains("listening on http://") || child.try_wait().unwrap().is_some()
        });
        let found = fs::metadata(socket(dir.path()));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = found.unwrap_or_else(|error| panic!("{error}: {}", log()));
        assert!(found.file_type().is_socket());
        assert_eq!(found.permissions().mode() & 0o777, 0o660, "umask {umask}");
    }
}

#[test]
fn a_start_replaces_a_stale_local_socket_and_a_stop_removes_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = socket(dir.path());
    start(dir.path(), &[]).kill9();
    assert!(path.exists(), "kill -9 leaves it");
    let mut payrelay = start(dir.path(), &[]);
    assert_eq!(ask_local(&path, "GET /health/live", "", "").status, 200);
    // A second process of this database does not touch it.
    let (code, _, error) = run_command(dir.path(), &[], &[]);
    assert_eq!(code, Some(75), "{error}");
    assert_eq!(ask_local(&path, "GET /health/live", "", "").status, 200);
    assert!(payrelay.terminate().success());
    assert!(!path.exists());
}

#[test]
fn a_local_socket_that_cannot_be_bound_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("a".repeat(108));
    let key = ("PAYRELAY_HTTP_SOCKET", long.to_str().unwrap());
    for args in [&["check-config"][..], &[]] {
        let (code, _, error) = run_command(dir.path(), &[key], args);
        assert!(
            code == Some(78) && error.contains("that of a socket at most 107"),
            "{error}"
        );
    }
    assert!(!dir.path().join("payrelay.db").exists());
    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    let key = ("PAYRELAY_HTTP_SOCKET", file.to_str().unwrap());
    let (code, _, error) = run_command(dir.path(), &[key], &[]);
    assert!(
        code == Some(78) && error.contains("a file that is no socket"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    let other = tempfile::tempdir().unwrap();
    let _served = start(other.path(), &[]);
    let path = socket(other.path());
    let key = ("PAYRELAY_HTTP_SOCKET", path.to_str().unwrap());
    let (code, _, error) = run_command(dir.path(), &[key], &[]);
    assert!(
        code == Some(75) && error.contains("another process listens there"),
        "{error}"
    );
}

#[test]
fn the_local_socket_can_be_off_or_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    drop(start(dir.path(), &[("PAYRELAY_HTTP_SOCKET", "off")]));
    assert!(!socket(dir.path()).exists());
    let _payrelay = start(dir.path(), &[("PAYRELAY_HTTP_SOCKET", "elsewhere")]);
    let path = dir.path().join("elsewhere");
    assert_eq!(ask_local(&path, "GET /health/live", "", "").status, 200);
}

#[test]
fn no_token_has_the_name_of_the_local_clients() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("config.toml"),
        TOKEN.replace("till", "local"),
    )
    .unwrap();
    let (code, _, error) = run_command(dir.path(), &[], &["check-config"]);
    assert!(
        code == Some(78) && error.contains("clients of the local socket have this name"),
        "{error}"
    );
}

#[test]
fn a_flood_of_the_network_leaves_the_local_socket_free() {
    let dir = tempfile::tempdir().unwrap();
    let limits = [
        ("PAYRELAY_HTTP_CONNECTIONS_MAX", "1"),
        ("PAYRELAY_HTTP_CLIENT_CONNECTIONS_MAX", "1"),
        ("PAYRELAY_HTTP_CLIENT_REQUESTS_PER_SECOND", "1"),
    ];
    let payrelay = start(dir.path(), &limits);
    let mut only = Client::connect(payrelay.addr());
    assert_eq!(only.get("/").status, 200);
    assert_eq!(only.get("/").status, 429, "the network has its limit");
    let silent: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(socket(dir.path())).unwrap())
        .collect();
    for _ in 0..20 {
        let answer = ask_local(&socket(dir.path()), "GET /overview", "", "");
        assert_eq!(answer.status, 200);
    }
    drop(silent);
}
