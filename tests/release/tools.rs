//! Programs that scripts/test-release brings into the target directory.

use std::path::PathBuf;
use std::process::Command;

use testkit::paths;

/// The folder of the tools.
pub fn tools_folder() -> PathBuf {
    paths::target().join("tools/bin")
}

/// The tool, whose command line `version` prints `expected`.
#[track_caller]
pub fn find_tool(name: &str, version: &str, expected: &str) -> PathBuf {
    let tool = tools_folder().join(name);
    let output = Command::new(&tool).arg(version).output();
    let found = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    assert!(
        found.as_ref().is_ok_and(|found| found == expected),
        "this test needs {name} {expected} at {}, and found {found:?}: run scripts/test-release, \
            which installs it",
        tool.display()
    );
    tool
}
