//! The figures of a test, for docs/development/release-tests.md.

use std::fmt::Write as _;
use std::fs;

use testkit::paths;

/// Prints the figures, and leaves them for scripts/test-release, which writes the page.
pub fn write_figures(test: &str, what_ran: &str, figures: &[(&str, String)]) {
    let mut text = format!("## {test}\n\n{what_ran}\n\n| figure | value |\n|---|---|\n");
    for (figure, value) in figures {
        let _ = writeln!(text, "| {figure} | {value} |");
    }
    println!("{text}");
    let folder = paths::target().join("release-tests");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(format!("{test}.md")), text).unwrap();
}
