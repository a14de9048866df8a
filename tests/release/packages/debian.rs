//! The Debian package in a Debian that knows nothing else, by the commands of
//! docs/how-to/install.md and docs/how-to/upgrade.md.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::browser::Browser;
use testkit::{paths, wait_for};

use super::machine::{ADDRESS, Machine};
use super::{VERSION, build_package, run};
use crate::pages::{check_commands_known, command_of};
use crate::report::Report;

const LIMIT: Duration = Duration::from_mins(1);

const INSTALL: &str = "docs/how-to/install.md";
const UPGRADE: &str = "docs/how-to/upgrade.md";

/// The package as a later version.
fn later_version(package: &Path, dir: &Path) -> PathBuf {
    let tree = dir.join("later");
    let later = dir.join("payrelay_later.deb");
    let [from, to, into] = [package, &tree, &later].map(|path| path.to_str().unwrap());
    run("dpkg-deb", &["-R", from, to]);
    let control = tree.join("DEBIAN/control");
    let changed: Vec<String> = fs::read_to_string(&control)
        .unwrap()
        .lines()
        .map(|line| match line.strip_prefix("Version: ") {
            Some(version) => format!("Version: {version}.later"),
            None => line.to_owned(),
        })
        .collect();
    fs::write(&control, changed.join("\n") + "\n").unwrap();
    run("dpkg-deb", &["--root-owner-group", "-b", to, into]);
    later
}

/// The newest version of glibc that the binary needs, as in `(2, 34)`.
fn newest_glibc(binary: &Path) -> (u32, u32) {
    let symbols = run("objdump", &["-T", binary.to_str().unwrap()]);
    let versions = symbols.split("GLIBC_").skip(1).filter_map(|rest| {
        let version = rest.split([')', ' ', '\n']).next()?;
        let mut parts = version.split('.').map(str::parse);
        Some((parts.next()?.ok()?, parts.next()?.ok()?))
    });
    versions.max().unwrap()
}

#[test]
fn the_debian_package_lives_its_whole_life() {
    let package = build_package(&["deb", "amd64"]);
    check_package(&package);
    let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
    let machine = Machine::boot(&dir.path().join("root"));
    machine.bring(&package, &format!("root/payrelay_{VERSION}-1_amd64.deb"));
    let known = ["apt install", "curl", "restart", "tar ", "apt purge"];
    check_commands_known(INSTALL, &known);
    check_commands_known(UPGRADE, &["backup", "apt install", "status"]);

    install(&machine);
    pay_and_look(&machine);
    restart_and_crash(&machine);
    upgrade(&machine, &later_version(&package, dir.path()));
    remove(&machine);
}

fn install(machine: &Machine) {
    machine.run_page("/root", &command_of(INSTALL, "apt install"));
    machine.wait_for_service();
    let access = machine.run(&["stat", "-c", "%U:%G %a", "/etc/payrelay/config.toml"]);
    assert_eq!(access.trim(), "root:payrelay 640");
    let enabled = machine.run(&["systemctl", "is-enabled", "payrelay"]);
    assert_eq!(enabled.trim(), "enabled");
    assert_eq!(machine.property("WatchdogUSec"), "30s");
}

/// The commands of the page, and the page of payrelay in a browser.
fn pay_and_look(machine: &Machine) {
    let browser = Browser::start();
    browser.open(&format!("http://{ADDRESS}/ui/"));
    let shown = machine.run_page("/root", &command_of(INSTALL, "curl"));
    assert!(shown.contains("delivered"), "{shown}");
    browser.wait_for_text("#stored", "1 payment in the last minute", LIMIT);
    browser.screenshot("debian-package");
    let status = wait_for("the state in systemd", LIMIT, || {
        let text = machine.property("StatusText");
        text.contains("0 unpublished").then_some(text)
    });
    println!("{status}");
}

fn restart_and_crash(machine: &Machine) {
    let before = machine.wait_for_service();
    machine.run_page("/root", &command_of(INSTALL, "restart"));
    let restarted = machine.wait_for_service();
    assert_ne!(before, restarted);
    machine.run(&["systemctl", "kill", "-s", "KILL", "payrelay"]);
    wait_for("another process", LIMIT, || {
        (machine.wait_for_service() != restarted).then_some(())
    });
    // systemd does not start it again with a configuration that is wrong.
    machine.run(&["sh", "-c", "echo '[htp]' >> /etc/payrelay/config.toml"]);
    machine.run(&["sh", "-c", "! systemctl restart payrelay"]);
    let failed = machine.run(&["sh", "-c", "! systemctl is-failed payrelay || true"]);
    assert!(failed.contains("failed"), "{failed}");
    let log = machine.run(&["journalctl", "-u", "payrelay", "-p", "err"]);
    assert!(log.contains("[htp]"), "{log}");
    machine.run(&["sed", "-i", "$d", "/etc/payrelay/config.toml"]);
    machine.run(&["systemctl", "restart", "payrelay"]);
}

/// An upgrade keeps the configuration, as the operator has changed it, and starts nothing that was
/// stopped.
fn upgrade(machine: &Machine, later: &Path) {
    let before = machine.wait_for_service();
    let config = machine.root.join("etc/payrelay/config.toml");
    let mine = fs::read_to_string(&config).unwrap() + "# mine\n";
    fs::write(&config, &mine).unwrap();
    machine.run(&["install", "-d", "-o", "payrelay", "/backups"]);
    machine.run_page("/root", &command_of(UPGRADE, "backup"));
    assert!(machine.exists("backups/before-upgrade.db"));
    machine.bring(later, "root/payrelay_NEW.deb");
    machine.run_page("/root", &command_of(UPGRADE, "apt install"));
    assert_eq!(fs::read_to_string(&config).unwrap(), mine);
    assert_ne!(machine.wait_for_service(), before, "the new version runs");
    let shown = machine.run_page("/root", &command_of(UPGRADE, "status"));
    assert!(shown.contains("backup"), "{shown}");
    let payment = machine.run(&["payrelay", "payment", "1"]);
    assert!(payment.contains("delivered"), "{payment}");

    machine.run(&["systemctl", "stop", "payrelay"]);
    machine.run(&[
        "apt-get",
        "install",
        "--reinstall",
        "/root/payrelay_NEW.deb",
    ]);
    assert_eq!(machine.property("ActiveState"), "inactive");
    machine.run(&["systemctl", "start", "payrelay"]);
}

fn remove(machine: &Machine) {
    machine.run(&["apt", "remove", "payrelay"]);
    assert!(!machine.exists("usr/bin/payrelay") && machine.exists("etc/payrelay/config.toml"));
    let purged = machine.run_page("/root", &command_of(INSTALL, "apt purge"));
    assert!(!machine.exists("etc/payrelay/config.toml"));
    assert!(
        machine.exists("var/lib/payrelay/payrelay.db"),
        "the payments stay"
    );
    let notice = "the payments stay in /var/lib/payrelay";
    assert!(purged.contains(notice), "{purged}");
}

/// The unit is hardened, lintian is content, and the package asks for the glibc that it needs.
fn check_package(package: &Path) {
    let unit = paths::repository().join("packaging/systemd/payrelay.service");
    let unit = unit.to_str().unwrap();
    let limit = ["--offline=true", "--threshold=15"];
    run(
        "systemd-analyze",
        &[&["security"], &limit[..], &[unit]].concat(),
    );
    let file = package.to_str().unwrap();
    let complaints = run("lintian", &["--fail-on=error,warning", file]);
    let binary = paths::target().join("x86_64-unknown-linux-gnu/release/payrelay");
    let (major, minor) = newest_glibc(&binary);
    let depends = run("dpkg-deb", &["-f", file, "Depends"]);
    let needs = format!("libc6 (>= {major}.{minor})");
    assert!(depends.contains(&needs), "{needs}: {depends}");

    let mut report = Report::new(
        "debian",
        "The package in a minimal Debian 12 with its own systemd: installed, paid, looked at in a \
            browser, restarted, killed, upgraded, removed, purged.",
    );
    let size = fs::metadata(package).unwrap().len();
    report.add("size of the package", format!("{} kB", size / 1000));
    report.add("lintian's complaints", complaints.lines().count());
    report.add("glibc", format!("{major}.{minor} or later"));
    report.finish();
}
