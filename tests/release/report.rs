//! The figures of a test, for docs/development/release-tests.md.

use std::fmt::{Display, Write as _};
use std::fs;

use testkit::paths;

/// A section of the page.
pub struct Report {
    name: String,
    section: String,
}

impl Report {
    /// A section for the test of this name.
    pub fn new(name: &str, what_ran: &str) -> Self {
        Self {
            name: name.to_owned(),
            section: format!("## {name}\n\n{what_ran}\n\n| figure | value |\n|---|---|\n"),
        }
    }

    /// Adds a row.
    pub fn add(&mut self, figure: &str, value: impl Display) {
        let _ = writeln!(self.section, "| {figure} | {value} |");
    }

    /// Prints the section, and leaves it for scripts/test-release, which writes the page.
    pub fn finish(self) {
        println!("{}", self.section);
        let folder = paths::target().join("release-tests");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{}.md", self.name)), self.section).unwrap();
    }
}
