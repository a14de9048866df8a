//! promtool, which checks and tests Prometheus' rules as Prometheus itself evaluates them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{env, fs};

const INSTALL: &str = "promtool is missing. scripts/test brings it; or install the Debian package: \
    apt-get install prometheus";

/// Where promtool is: on the path, or where `scripts/test` puts it.
pub fn path() -> PathBuf {
    let name = Path::new("promtool");
    let on_path = Command::new(name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match on_path {
        Ok(_) => return name.to_owned(),
        Err(error) => assert!(error.kind() == ErrorKind::NotFound, "promtool: {error}"),
    }
    let target = env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let targets = [
        Some(crate::paths::target()),
        Some(crate::paths::repository().join("target")),
        target,
    ];
    let tools = targets.into_iter().flatten();
    let found = tools
        .map(|target| target.join("tools/bin/promtool"))
        .find(|tool| tool.exists());
    found.unwrap_or_else(|| panic!("{INSTALL}"))
}

/// Runs promtool, and returns what it printed. It may fail.
pub fn try_run(arguments: &[&str]) -> Output {
    Command::new(path())
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("promtool: {error}"))
}

/// Runs promtool, which has to succeed, and returns what it printed.
#[track_caller]
pub fn run(arguments: &[&str]) -> String {
    let output = try_run(arguments);
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed).into_owned();
    assert!(
        output.status.success(),
        "promtool {arguments:?}: {}\n{printed}",
        output.status
    );
    printed
}

/// Has promtool read a text from a file.
#[track_caller]
pub fn run_with_file(arguments: &[&str], text: &str) -> String {
    let folder = tempfile::tempdir().expect("the machine has space for a folder");
    let file = folder.path().join("input.yml");
    fs::write(&file, text).expect("a fresh directory is writable");
    let file = file.to_str().expect("a temporary path is UTF-8");
    run(&[arguments, &[file]].concat())
}
