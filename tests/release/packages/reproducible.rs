//! Two builds of the same commit, in two folders.

use std::fs;

use testkit::paths;

use super::{build_package, build_package_in, checksum, run};
use crate::report::Report;

#[test]
fn the_same_commit_gives_the_same_packages() {
    let repository = paths::repository().to_str().unwrap();
    let changes = run("git", &["-C", repository, "status", "--porcelain"]);
    assert!(changes.is_empty(), "commit the changes first: {changes}");
    let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
    let source = dir.path().join("another/folder");
    run(
        "git",
        &["clone", "-q", repository, source.to_str().unwrap()],
    );
    let target = dir.path().join("target");
    // The tools are the same.
    fs::create_dir(&target).unwrap();
    let [tools, link] = [paths::target().join("tools"), target.join("tools")];
    std::os::unix::fs::symlink(tools, link).unwrap();

    let mut report = Report::new(
        "reproducible",
        "Each package, built twice from one commit in two folders.",
    );
    let packages: [&[&str]; 4] = [&["deb", "amd64"], &["static"], &["image"], &["sbom"]];
    for arguments in packages {
        let first = checksum(&build_package(arguments));
        let second = checksum(&build_package_in(&source, &target, arguments));
        assert_eq!(first, second, "{arguments:?}");
        report.add(
            &arguments.join(" "),
            format!("the same: `{}...`", &first[..16]),
        );
    }
    report.finish();
}
