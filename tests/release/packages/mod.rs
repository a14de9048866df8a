//! The packages of scripts/package: installed and used as the how-to pages say, on the machines
//! that they are for.

mod arm;
mod debian;
mod image;
mod machine;
mod reproducible;
mod static_binary;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::paths;

/// The version of the packages.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Builds a package in the repository, and returns its path.
fn build_package(arguments: &[&str]) -> PathBuf {
    build_package_in(paths::repository(), &paths::target(), arguments)
}

/// Builds a package in a copy of the source.
fn build_package_in(source: &Path, target: &Path, arguments: &[&str]) -> PathBuf {
    let mut command = Command::new(source.join("scripts/package"));
    // As from a shell: the Cargo that runs the tests has set variables for them.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_") && name != "CARGO_HOME" {
            command.env_remove(name.as_ref());
        }
    }
    let output = command
        .args(arguments)
        .env("CARGO_TARGET_DIR", target)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        printed(&output)
    );
    let paths = String::from_utf8_lossy(&output.stdout).into_owned();
    PathBuf::from(paths.lines().last().unwrap())
}

/// Runs a program, and panics with its output if it fails.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{program}: {error}; docs/development/testing.md has the packages to install")
    });
    let text = printed(&output);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

fn printed(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// The SHA-256 of a file.
fn checksum(file: &Path) -> String {
    let line = run("sha256sum", &[file.to_str().unwrap()]);
    line.split(' ').next().unwrap_or_default().to_owned()
}
