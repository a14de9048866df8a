//! The commands of how-to pages that these tests run.

use std::fs;

use testkit::paths;

const MARKER: &str = "<!-- run by: the release tests -->";

/// The blocks of shell that the page marks, in their order.
pub fn commands_of(page: &str) -> Vec<String> {
    let text = fs::read_to_string(paths::repository().join(page)).unwrap();
    let blocks = text.split(MARKER).skip(1).map(|rest| {
        let (indent, block) = rest.split_once("```sh\n").unwrap();
        let block = block.split("```").next().unwrap_or_default();
        let indent = indent.trim_start_matches('\n');
        let lines = block
            .lines()
            .map(|line| line.strip_prefix(indent).unwrap_or(line));
        lines.collect::<Vec<_>>().join("\n")
    });
    blocks.collect()
}

/// The one block of the page that has `needle`.
#[track_caller]
pub fn command_of(page: &str, needle: &str) -> String {
    let blocks = commands_of(page);
    let mut found = blocks.iter().filter(|block| block.contains(needle));
    let block = found.next();
    assert!(
        block.is_some() && found.next().is_none(),
        "{page}: {needle}"
    );
    block.cloned().unwrap_or_default()
}

/// Panics if the page has a marked block without any of these.
#[track_caller]
pub fn check_commands_known(page: &str, known: &[&str]) {
    for block in commands_of(page) {
        let is_known = known.iter().any(|needle| block.contains(needle));
        assert!(is_known, "{page}: no test runs this block: {block}");
    }
}
