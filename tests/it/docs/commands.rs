//! The commands of README, tutorial and how-to pages, run against the real binary; and their
//! configuration examples, checked by it.

use super::fences::{Block, blocks, has_commands};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;
use std::{env, fs};
use testkit::process::{Options, Payrelay};

/// Blocks of shell that no test can run. Each has a marker that names the reason:
/// `<!-- not run: it needs root -->`. Those with `<!-- run by: the release tests -->` do not count:
/// tests/release runs them.
const NOT_RUN_MAX: usize = 13;

/// What a page calls payrelay's address.
const ADDRESS: &str = "http://127.0.0.1:8080";

/// curl that fails on an HTTP error, and notes the status of each response. `$0.status` gets a line
/// for each request: the status, and curl's exit code.
const CURL: &str = r#"#!/bin/bash
PATH=${PATH#*:}
curl --fail-with-body -w '%{stderr}status=%{http_code}\n' "$@" 2> "$0.stderr"
code=$?
cat "$0.stderr" >&2
echo "$(sed -n 's/^status=//p' "$0.stderr" | tail -n 1) $code" >> "$0.status"
exit $code
"#;

/// A running payrelay, and the folder in which a page's commands run.
struct Reader {
    folder: tempfile::TempDir,
    payrelay: Payrelay,
    /// All that the commands have printed.
    output: String,
}

impl Reader {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["backups", "etc", "var", "bin"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let webhook = "https://hooks.slack.example/services/a/b/c\n";
        fs::write(folder.path().join("etc/slack-webhook"), webhook).unwrap();
        let curl = folder.path().join("bin/curl");
        fs::write(&curl, CURL).unwrap();
        fs::set_permissions(&curl, fs::Permissions::from_mode(0o755)).unwrap();
        let payrelay = Payrelay::start(Options::new(folder.path(), &[]));
        Self {
            folder,
            payrelay,
            output: String::new(),
        }
    }

    /// Runs a block. A page shows an HTTP error on purpose with `<!-- shows: 422 -->`.
    fn run(&mut self, block: &Block) {
        let needs_stop = block.text.contains("payrelay restore");
        if needs_stop {
            assert!(self.payrelay.terminate().success());
        }
        let output = self.bash(&self.script(block));
        let statuses = self.statuses();
        let shown = format!(
            "{}: {}\n{}{}",
            block.place(),
            block.text,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        if let Some(status) = block.marked("shows") {
            assert_eq!(statuses, [format!("{status} 22")], "{shown}");
        } else {
            assert!(output.status.success(), "{shown}");
            let is_fine = |line: &String| line.starts_with('2') && line.ends_with(" 0");
            assert!(statuses.iter().all(is_fine), "{statuses:?}: {shown}");
            let requests = block.text.matches("curl ").count();
            assert_eq!(statuses.len(), requests, "{shown}");
        }
        self.output += &String::from_utf8_lossy(&output.stdout);
        self.output.push('\n');
        if needs_stop {
            self.payrelay = Payrelay::start(Options::new(self.folder.path(), &[]));
        }
    }

    /// The commands of a block, with the paths and the address of this test.
    fn script(&self, block: &Block) -> String {
        let folder = self.folder.path().display();
        let mut script = block
            .text
            .replace(ADDRESS, &format!("http://{}", self.payrelay.addr()))
            .replace("/backups/", &format!("{folder}/backups/"))
            .replace("/etc/payrelay/", &format!("{folder}/etc/"))
            .replace("/var/lib/payrelay/", &format!("{folder}/var/"))
            .replace("cargo run --release -- ", "payrelay ");
        if script.contains("export PAYRELAY_") {
            script += "payrelay check-config\n";
        }
        script
    }

    fn bash(&self, script: &str) -> Output {
        let binary = testkit::paths::binary();
        let usual = env::var("PATH").unwrap_or_default();
        let path = format!(
            "{}:{}:{usual}",
            self.folder.path().join("bin").display(),
            binary.parent().unwrap().display()
        );
        let mut command = Command::new("bash");
        // The environment of the tests must not configure the product.
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PAYRELAY_") {
                command.env_remove(name);
            }
        }
        command
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(self.folder.path())
            .env("PATH", path)
            .output()
            .unwrap()
    }

    /// Status and exit code of each curl since the last call.
    fn statuses(&self) -> Vec<String> {
        let file = self.folder.path().join("bin/curl.status");
        let text = fs::read_to_string(&file).unwrap_or_default();
        let _ = fs::remove_file(file);
        text.lines().map(str::to_owned).collect()
    }

    /// Whether the log or the output has a line, whatever its numbers.
    fn has_shown(&self, line: &str) -> bool {
        let expected = without_numbers(line);
        let log = self.payrelay.log();
        log.lines()
            .chain(self.output.lines())
            .any(|line| without_numbers(line).contains(&expected))
    }
}

/// A line with a `#` for each run of digits.
fn without_numbers(line: &str) -> String {
    let mut text = String::new();
    for sign in line.trim().chars() {
        if !sign.is_ascii_digit() {
            text.push(sign);
        } else if !text.ends_with('#') {
            text.push('#');
        }
    }
    text
}

fn is_run_here(block: &Block) -> bool {
    block.marked("not run").is_none() && block.marked("run by").is_none()
}

/// The page's blocks of shell, in order, each with the output that the page shows below it.
#[test]
fn every_shell_command_of_readme_tutorial_and_how_to_pages_runs() {
    let mut blocks = blocks();
    blocks.retain(|block| has_commands(&block.page));
    let shell = |block: &&Block| block.language == "sh";
    let not_run: Vec<_> = blocks
        .iter()
        .filter(|block| block.language == "sh" && block.marked("not run").is_some())
        .map(Block::place)
        .collect();
    assert!(not_run.len() <= NOT_RUN_MAX, "{not_run:#?}");
    let count = blocks
        .iter()
        .filter(shell)
        .filter(|block| is_run_here(block))
        .count();
    assert!(count >= 15, "{count} blocks");
    let pages: BTreeSet<_> = blocks
        .iter()
        .filter(shell)
        .filter(|block| is_run_here(block))
        .map(|block| block.page.as_str())
        .collect();
    for page in pages {
        let mut reader = Reader::new();
        for block in blocks.iter().filter(|block| block.page == page) {
            match block.language.as_str() {
                "sh" if is_run_here(block) => reader.run(block),
                "text" if block.marked("output").is_some() => {
                    for line in block.text.lines().filter(|line| !line.trim().is_empty()) {
                        testkit::wait_until(
                            &format!("{}: {line:?} in the log or the output", block.place()),
                            Duration::from_secs(10),
                            || reader.has_shown(line),
                        );
                    }
                }
                _ => {}
            }
        }
    }
}

#[test]
fn every_reason_for_not_running_a_block_is_named() {
    for block in blocks() {
        let Some(marker) = &block.marker else {
            continue;
        };
        let known = ["not run", "run by", "shows", "output"]
            .iter()
            .any(|name| block.marked(name).is_some_and(|rest| !rest.is_empty()));
        assert!(known, "{}: the marker {marker:?} is unknown", block.place());
    }
}

/// Every block of TOML is a configuration, once its placeholders are filled in.
#[test]
fn every_configuration_example_is_valid() {
    let mut count = 0;
    for block in blocks().iter().filter(|block| block.language == "toml") {
        count += 1;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        let config = block
            .text
            .replace("sha256:...", &format!("sha256:{}", "5".repeat(64)))
            .replace("/services/...", &format!("/services/{count}"))
            .lines()
            // The certificate files of an example are not on this machine.
            .filter(|line| !line.contains("_file ="))
            .collect::<Vec<_>>()
            .join("\n");
        fs::write(&file, &config).unwrap();
        let mut command = Command::new(testkit::paths::binary());
        command
            .args([Path::new("--config"), &file])
            .arg("check-config");
        if config.contains("sasl_mechanism") {
            command.env("PAYRELAY_KAFKA_SASL_PASSWORD", "secret");
        }
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}: {}",
            block.place(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    assert!(count >= 3, "{count} blocks");
}
