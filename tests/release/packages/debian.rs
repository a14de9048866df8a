//! The Debian package: built, checked by lintian, and installed, upgraded, removed and purged in a
//! Debian that knows nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use testkit::paths;
use testkit::wait_for;

use super::report::Report;

const LIMIT: Duration = Duration::from_secs(30);

/// Runs a program, and panics with what it printed if it fails.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{program}: {error}. Debian's packages lintian, debootstrap and systemd have it")
    });
    let printed = text(&output);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {printed}"
    );
    printed
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn build_package() -> PathBuf {
    let script = paths::repository().join("scripts/package-deb");
    let output = Command::new(script).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    PathBuf::from(printed.lines().last().unwrap())
}

/// A Debian with its minimum and systemd's tools. It is brought once.
fn debian() -> PathBuf {
    let archive = paths::target().join("tools/debian-bookworm.tar");
    if !archive.exists() {
        let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
        let root = dir.path().to_str().unwrap();
        let include = "--include=systemd,curl";
        run(
            "debootstrap",
            &["--variant=minbase", include, "bookworm", root],
        );
        run("tar", &["-C", root, "-cf", archive.to_str().unwrap(), "."]);
    }
    archive
}

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

/// A Debian in a folder.
struct Machine {
    root: PathBuf,
}

impl Machine {
    fn new(root: &Path) -> Self {
        run(
            "tar",
            &[
                "-C",
                root.to_str().unwrap(),
                "-xf",
                debian().to_str().unwrap(),
            ],
        );
        Self { root: root.into() }
    }

    fn command(&self, program: &[&str]) -> Command {
        let mut command = Command::new("chroot");
        command.arg(&self.root).args(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    #[track_caller]
    fn run(&self, program: &[&str]) -> String {
        let output = self.command(program).output().unwrap();
        let printed = text(&output);
        assert!(output.status.success(), "{program:?}: {printed}");
        printed
    }

    fn install(&self, package: &Path) {
        fs::copy(package, self.root.join("payrelay.deb")).unwrap();
        self.run(&["dpkg", "-i", "/payrelay.deb"]);
    }

    fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// The service, as its unit starts it; no systemd runs here.
    fn start(&self) -> Child {
        let state = ["/var/lib/payrelay", "/run/payrelay"];
        for folder in state {
            self.run(&["install", "-d", "-o", "payrelay", "-g", "payrelay", folder]);
        }
        let serve = [
            "/usr/bin/payrelay",
            "serve",
            "--config",
            "/etc/payrelay/config.toml",
        ];
        let mut command = self.command(&["setpriv", "--reuid=payrelay", "--regid=payrelay"]);
        command.args(["--clear-groups", "--"]).args(serve);
        command.env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:18080");
        command.stderr(Stdio::null()).spawn().unwrap()
    }
}

fn stop(mut service: Child) {
    run("kill", &[&service.id().to_string()]);
    assert!(service.wait().unwrap().success());
}

fn pay(machine: &Machine, reservation: u32) {
    let body = format!(
        "{{\"user_id\": 42, \"reservations\": [{{\"reservation_id\": {reservation}, \
            \"seat_price\": 150000}}]}}"
    );
    let curl = [
        "curl",
        "-sf",
        "http://127.0.0.1:18080/payments",
        "-d",
        &body,
    ];
    let json = ["-H", "Content-Type: application/json"];
    wait_for("a payment", LIMIT, || {
        let output = machine.command(&[&curl[..], &json].concat()).output();
        output.unwrap().status.success().then_some(())
    });
}

#[test]
fn the_debian_package_lives_its_whole_life() {
    let package = build_package();
    let unit = paths::repository().join("packaging/systemd/payrelay.service");
    let unit = unit.to_str().unwrap();
    run(
        "systemd-analyze",
        &["security", "--offline=true", "--threshold=15", unit],
    );
    let complaints = run(
        "lintian",
        &["--fail-on=error,warning", package.to_str().unwrap()],
    );

    let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let machine = Machine::new(&root);
    machine.install(&package);
    let access = machine.run(&["stat", "-c", "%U:%G %a", "/etc/payrelay/config.toml"]);
    assert_eq!(access.trim(), "root:payrelay 640");
    let enabled = machine.run(&["systemctl", "is-enabled", "payrelay"]);
    assert_eq!(enabled.trim(), "enabled");

    // The command finds the service by the configuration of the package.
    let service = machine.start();
    pay(&machine, 1001);
    let timeline = machine.run(&["payrelay", "payment", "1"]);
    assert!(timeline.contains("delivered"), "{timeline}");
    stop(service);

    // An upgrade keeps the configuration, as the operator has changed it.
    let config = root.join("etc/payrelay/config.toml");
    let mine = fs::read_to_string(&config).unwrap() + "# mine\n";
    fs::write(&config, &mine).unwrap();
    machine.install(&later_version(&package, dir.path()));
    assert_eq!(fs::read_to_string(&config).unwrap(), mine);
    let service = machine.start();
    pay(&machine, 1002);
    stop(service);

    machine.run(&["dpkg", "-r", "payrelay"]);
    assert!(!machine.exists("usr/bin/payrelay") && machine.exists("etc/payrelay/config.toml"));
    let purged = machine.run(&["dpkg", "-P", "payrelay"]);
    assert!(!machine.exists("etc/payrelay/config.toml"));
    assert!(
        machine.exists("var/lib/payrelay/payrelay.db"),
        "the payments stay"
    );
    assert!(
        purged.contains("the payments stay in /var/lib/payrelay"),
        "{purged}"
    );

    let mut report = Report::new(
        "debian",
        "The package in a minimal Debian 12: installed, upgraded, removed, purged.",
    );
    let size = fs::metadata(&package).unwrap().len();
    report.add("size of the package", format!("{} kB", size / 1000));
    report.add("lintian's complaints", complaints.lines().count());
    report.finish();
}
