//! The container image, by the commands of docs/how-to/run-in-a-container.md. Podman takes the
//! place of Docker, with the network of this machine: it needs no daemon.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testkit::listen::free_port;
use testkit::paths;
use testkit::wait_for;

use super::{VERSION, build_package, printed, run};
use crate::pages::{check_commands_known, command_of};
use crate::report::Report;

const PAGE: &str = "docs/how-to/run-in-a-container.md";

const LIMIT: Duration = Duration::from_mins(1);

/// Containers that share nothing with others on this machine.
struct Podman {
    folder: PathBuf,
    port: u16,
    /// The token and its hash, once there is one.
    token: String,
    hash: String,
}

impl Podman {
    fn new(folder: &Path) -> Self {
        let port = free_port().local_addr().unwrap().port();
        let limits = "default_ulimits = [\"nofile=4096:4096\", \"nproc=4096:4096\"]";
        let engine = "[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\n";
        let config = format!("[containers]\nnetns = \"host\"\n{limits}\n{engine}");
        fs::write(folder.join("containers.conf"), config).unwrap();
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{0}/graph\"\nrunroot = \"{0}/run\"\n",
            folder.display()
        );
        fs::write(folder.join("storage.conf"), storage).unwrap();
        let podman = run("sh", &["-c", "command -v podman"]);
        symlink(podman.trim(), folder.join("docker")).unwrap();
        Self {
            folder: folder.into(),
            port,
            token: String::new(),
            hash: String::new(),
        }
    }

    fn command(&self, script: &str) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(&self.folder)
            .env("PATH", format!("{}:{path}", self.folder.display()))
            .env("CONTAINERS_CONF", self.folder.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.folder.join("storage.conf"))
            .env("TOKEN", &self.token)
            .env("HASH", &self.hash);
        command
    }

    /// Runs a block of the page, on a free port.
    #[track_caller]
    fn run_page(&self, needle: &str) -> String {
        let listen = format!("-e PAYRELAY_HTTP_LISTEN=127.0.0.1:{}", self.port);
        let block = command_of(PAGE, needle)
            .replace("-p 127.0.0.1:8080:8080", &listen)
            .replace("127.0.0.1:8080", &format!("127.0.0.1:{}", self.port));
        let output = self.command(&block).output().unwrap();
        let text = printed(&output);
        assert!(output.status.success(), "{block}: {text}");
        text
    }

    fn succeeds(&self, script: &str) -> bool {
        self.command(script).output().unwrap().status.success()
    }
}

#[test]
fn the_image_runs_as_the_page_says() {
    let image = build_package(&["image"]);
    let needles = ["docker load", " token", "docker run -d", "curl", "exec"];
    check_commands_known(PAGE, &needles);
    let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
    let file_of_page = format!("payrelay-{VERSION}-image.tar");
    fs::copy(&image, dir.path().join(file_of_page)).unwrap();
    let mut podman = Podman::new(dir.path());
    podman.run_page("docker load");
    let tokens = podman.run_page(" token");
    podman.token = tokens.lines().next().unwrap().to_owned();
    podman.hash = tokens.split('"').nth(1).unwrap().to_owned();

    let name = format!("payrelay:{VERSION}");
    let output = podman.command(&format!("docker run --rm {name}")).output();
    let output = output.unwrap();
    let refusal = printed(&output);
    assert_eq!(output.status.code(), Some(78), "{refusal}");
    assert!(refusal.contains("[[http.token]]"), "{refusal}");

    podman.run_page("docker run -d");
    wait_for("a healthy container", LIMIT, || {
        podman
            .succeeds("podman healthcheck run payrelay")
            .then_some(())
    });
    let paid = podman.run_page("curl");
    assert!(paid.contains("\"COMPLETED\""), "{paid}");
    let shown = podman.run_page("exec");
    assert!(shown.contains("listening on"), "{shown}");
    let mut code = podman.command("docker inspect -f '{{.State.ExitCode}}' payrelay");
    let code = printed(&code.output().unwrap());
    assert_eq!(code.trim(), "0");
    let licence = "index .Config.Labels \"org.opencontainers.image.licenses\"";
    let labels = format!("docker inspect -f '{{{{{licence}}}}} {{{{.Config.Env}}}}' payrelay");
    let labels = printed(&podman.command(&labels).output().unwrap());
    assert!(labels.starts_with("MIT OR Apache-2.0 "), "{labels}");
    assert!(
        labels.contains("SQLITE_TMPDIR=/var/lib/payrelay"),
        "{labels}"
    );
    // The volume keeps the payment for the next container.
    assert!(podman.succeeds("docker rm payrelay"));
    podman.run_page("docker run -d");
    let payment = "docker exec payrelay /payrelay payment 1";
    wait_for("the payment", LIMIT, || {
        podman.succeeds(payment).then_some(())
    });
    assert!(podman.succeeds("docker stop -t 15 payrelay && docker rm payrelay"));

    let mut report = Report::new("image", "The image, run by Podman.");
    let size = fs::metadata(&image).unwrap().len();
    report.add("size of the archive", format!("{} kB", size / 1000));
    report.finish();
}

/// The whole example needs a registry with the image of Kafka, so it is only checked.
#[test]
fn the_compose_example_is_valid_and_asks_for_a_token() {
    let file = paths::repository().join("packaging/compose/compose.yaml");
    let compose = |hash: &str| {
        let mut command = Command::new("docker-compose");
        command.args(["-f", file.to_str().unwrap(), "config"]);
        command.env("PAYRELAY_TOKEN_HASH", hash).output().unwrap()
    };
    let refused = compose("");
    assert!(!refused.status.success());
    let refusal = printed(&refused);
    assert!(refusal.contains("payrelay token"), "{refusal}");
    let hash = format!("sha256:{}", "ab".repeat(32));
    let accepted = compose(&hash);
    let shown = printed(&accepted);
    assert!(
        accepted.status.success() && shown.contains(&hash),
        "{shown}"
    );
    assert!(shown.contains(&format!("payrelay:{VERSION}")), "{shown}");

    // payrelay accepts the variables of the example.
    let mut check = Command::new(paths::binary());
    for line in shown.lines() {
        if let Some((name, value)) = line.trim().split_once(": ")
            && name.starts_with("PAYRELAY_")
        {
            check.env(name, value);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let output = check.current_dir(&dir).arg("check-config").output();
    let text = printed(&output.unwrap());
    assert!(text.contains("kafka:9092"), "{text}");
}
