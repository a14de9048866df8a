//! The places that tests use: the repository, the built binary, and a folder for temporary files.
//!
//! Cargo puts a test or benchmark into `<target>/<profile>/deps`, and the binary that it is built
//! with into `<target>/<profile>`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The folder of the workspace.
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The payrelay that this test or benchmark was built with.
pub fn binary() -> PathBuf {
    let binary = profile().join("payrelay");
    assert!(
        binary.exists(),
        "{} does not exist: build it with cargo build",
        binary.display()
    );
    binary
}

/// The target directory, on the disk of the checkout. `/tmp` may be memory, where an fsync costs
/// nothing.
pub fn target() -> PathBuf {
    let profile = profile();
    let target = profile
        .parent()
        .expect("a profile is in a target directory");
    target.to_owned()
}

/// A folder for temporary files in the target directory.
pub fn temporary() -> PathBuf {
    let folder = target().join("tmp");
    fs::create_dir_all(&folder).expect("the target directory is writable");
    folder
}

fn profile() -> PathBuf {
    let test = env::current_exe().expect("the test knows its own file");
    let deps = test.parent().expect("the test is in a folder");
    let profile = deps.parent().expect("that folder is in the profile's");
    profile.to_owned()
}
