//! The static binary: it needs nothing of the machine, and how fast it is.

use std::fs;
use std::path::Path;
use std::time::Duration;

use testkit::child::KillOnDrop;
use testkit::{let_time_pass, paths};

use super::machine::{Machine, Service};
use super::{VERSION, build_package, run};
use crate::clients::Clients;
use crate::pages::{command_of, commands_of};
use crate::report::Report;

const CONNECTIONS: usize = 64;
const PART: Duration = Duration::from_secs(8);
const PAIRS: usize = 5;

fn serve(binary: &Path, folder: &Path) -> Service {
    let mut command = KillOnDrop::command(binary);
    command.current_dir(folder);
    command.env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0");
    Service::start(command, &folder.join("log"))
}

/// Payments a second from 64 connections, on a new database.
fn rate_of(binary: &Path) -> f64 {
    let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
    let service = serve(binary, dir.path());
    let clients = Clients::start(CONNECTIONS);
    clients.set_address(Some(service.address));
    let_time_pass(PART / 4);
    let before = clients.answered();
    let_time_pass(PART);
    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    let rate = (clients.answered() - before) as f64 / PART.as_secs_f64();
    clients.stop();
    service.stop();
    rate
}

#[test]
fn the_static_binary_runs_under_systemd_as_the_pages_say() {
    let archive = build_package(&["static"]);
    let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
    let machine = Machine::boot(&dir.path().join("root"));
    let file = format!("root/payrelay-{VERSION}-x86_64-linux.tar.gz");
    machine.bring(&archive, &file);
    let shown = machine.run_page("/root", &command_of("docs/how-to/install.md", "tar "));
    assert_eq!(shown.trim(), format!("payrelay {VERSION}"));
    let installed = machine.root.join("usr/bin/payrelay");
    let kind = run("file", &[installed.to_str().unwrap()]);
    assert!(kind.contains("static"), "{kind}");
    run_under_systemd(&machine);
    drop(machine);
    compare_with_glibc(&archive);
}

/// Each block of the page, in its order.
fn run_under_systemd(machine: &Machine) {
    let source = "root/source";
    for file in ["config.toml", "packaging/systemd/payrelay.service"] {
        let from = paths::repository().join(file);
        machine.bring(&from, &format!("{source}/{file}"));
    }
    machine.bring(
        &machine.root.join("usr/bin/payrelay"),
        &format!("{source}/target/release/payrelay"),
    );
    let webhook = machine.root.join(source).join("slack-webhook");
    fs::write(webhook, "https://hooks.slack.example/services/a/b/c\n").unwrap();
    for block in commands_of("docs/how-to/run-under-systemd.md") {
        if block.contains("daemon-reload") {
            // What the steps before it say in words.
            let database = "s|^path = \"payrelay.db\"|path = \"/var/lib/payrelay/payrelay.db\"|";
            machine.run(&["sed", "-i", database, "/etc/payrelay/config.toml"]);
            let unit = "/etc/systemd/system/payrelay.service";
            let lines = "s/^#\\(LoadCredential\\|Environment\\)/\\1/";
            machine.run(&["sed", "-i", lines, unit]);
        }
        let is_command = block.contains("payrelay status");
        let folder = if is_command { "/" } else { "/root/source" };
        let shown = machine.run_page(folder, &block);
        if block.contains("daemon-reload") {
            machine.wait_for_service();
            assert!(!shown.contains("messages go to this log only"), "{shown}");
        }
    }
    assert!(machine.exists("var/lib/payrelay/payrelay.db"));
}

/// glibc and musl in turn.
fn compare_with_glibc(archive: &Path) {
    build_package(&["deb", "amd64"]);
    let [dynamic, musl] = ["gnu", "musl"]
        .map(|library| format!("x86_64-unknown-linux-{library}/release/payrelay"))
        .map(|path| paths::target().join(path));
    let mut ratios: Vec<f64> = (0..PAIRS)
        .map(|_| rate_of(&musl) / rate_of(&dynamic))
        .collect();
    ratios.sort_by(f64::total_cmp);
    let mut report = Report::new(
        "static",
        "The static binary with musl, and the one of the Debian package with glibc, in pairs.",
    );
    let size = fs::metadata(archive).unwrap().len();
    report.add("size of the archive", format!("{} kB", size / 1000));
    let [least, median, most] = [ratios[0], ratios[PAIRS / 2], ratios[PAIRS - 1]];
    report.add(
        "payments a second from 64 connections, musl by glibc: least, median, most",
        format!("{least:.2}, {median:.2}, {most:.2}"),
    );
    report.finish();
}
