//! Plain English as a test: words that a new reader stumbles over are refused everywhere.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::ROOT;

/// Each refused word or phrase, and words to use instead.
const REFUSED: [(&str, &str); 54] = [
    ("tell", "deliver, notify, report, return"),
    ("beside", "alongside, while payrelay is running"),
    ("room", "space, capacity, limit"),
    ("rooms", "spaces, limits"),
    ("whom", "the client, the user"),
    ("copied back", "checkpointed"),
    ("under way", "in progress"),
    ("lives on", "continues"),
    ("everybody", "every client, every process"),
    ("told", "deliver, notify, report, return"),
    ("tells", "returns, reports, says"),
    ("telling", "delivering, reporting"),
    ("taken", "accepted, consumed, acquired, read"),
    ("took", "accepted, consumed, acquired, needed"),
    ("untaken", "unconsumed"),
    ("anew", "again, recreated"),
    ("whoever", "the client, the operator, the caller"),
    ("nobody", "no client, no thread"),
    ("somebody", "a client, an operator, a process"),
    ("anybody", "any client, any process"),
    ("heed", "record, abort if, observe"),
    ("heeded", "recorded"),
    ("set aside", "dead-lettered, reserved"),
    ("put aside", "dead-lettered, reserved"),
    ("kept aside", "dead-lettered"),
    ("is away", "is unavailable"),
    ("are away", "are unavailable"),
    ("was away", "was unavailable"),
    ("at fault", "invalid, offending"),
    ("in force", "in effect, active"),
    ("goes on", "continues, resumes"),
    ("go on", "continue, resume"),
    ("for so long", "up to N, for this duration"),
    ("so many", "N, up to N"),
    ("what came of", "the outcome of"),
    ("what became of", "the outcome of"),
    ("stand in", "fake, mock server"),
    ("stands in", "replaces"),
    ("gives way", "yields"),
    ("folded", "checkpointed"),
    ("heeds", "records, observes"),
    ("teller", "notifier fixture"),
    ("no one", "no client, no thread"),
    ("someone", "a client, an operator"),
    ("everyone", "every client, every process"),
    ("anyone", "any client, any process"),
    ("what became", "the outcome"),
    ("take away", "become unavailable"),
    ("goes away", "becomes unavailable"),
    ("unstored", "pending"),
    ("unsettled", "unsaved outcome"),
    ("the last word", "the outcome"),
    ("earlier life", "earlier incarnation, earlier process"),
    ("takes over", "replaces"),
];

/// In the store, the log of the database is the WAL.
const REFUSED_IN_THE_STORE: (&str, &str) = ("the log", "the WAL, or payrelay's log");

/// Files that keep a refused word, each with its reason.
const EXCEPTIONS: [(&str, &str, &str); 3] = [
    (
        "tests/it/tidy/plain_words.rs",
        "",
        "this list has to name the words",
    ),
    (
        "tests/proptest-regressions/slack.txt",
        "everyone",
        "proptest writes this head",
    ),
    (
        "crates/testkit/src/tls.rs",
        "everyone",
        "a key of the broker's configuration",
    ),
];

/// Every text that a person may read.
pub fn texts() -> Vec<(String, String)> {
    let mut waiting: Vec<PathBuf> = [
        "src",
        "crates",
        "tests",
        "benches",
        "docs",
        "examples",
        "packaging",
        "scripts",
        ".github",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "config.toml",
        "schema.sql",
        "Cargo.toml",
        "justfile",
    ]
    .iter()
    .map(|name| Path::new(ROOT).join(name))
    .collect();
    let mut found = Vec::new();
    while let Some(path) = waiting.pop() {
        // What scripts/package makes: the text of a licence, pages of the commands.
        if path.ends_with("packaging/stage") {
            continue;
        }
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
        } else if let Ok(text) = fs::read_to_string(&path) {
            let name = path.strip_prefix(ROOT).unwrap().to_str().unwrap();
            found.push((name.to_owned(), text));
        }
    }
    found
}

/// The output of `--help` of payrelay and of each of its commands.
fn help_texts() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut waiting = vec![Vec::<String>::new()];
    while let Some(command) = waiting.pop() {
        let output = Command::new(env!("CARGO_BIN_EXE_payrelay"))
            .args(&command)
            .arg("--help")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "payrelay {command:?} --help failed"
        );
        let text = String::from_utf8(output.stdout).unwrap();
        let commands = text
            .lines()
            .skip_while(|line| *line != "Commands:")
            .skip(1)
            .take_while(|line| line.starts_with("  "))
            .filter(|line| !line.starts_with("   "))
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| *name != "help");
        waiting.extend(commands.map(|name| [command.as_slice(), &[name.to_owned()]].concat()));
        found.push((format!("payrelay {} --help", command.join(" ")), text));
    }
    found
}

/// The words of a text in lower case, each with its line. `isTaken` and `is_taken` are two words.
fn words(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let mut word = String::new();
        for letter in line.chars().chain([' ']) {
            let ends = !letter.is_alphabetic() || (letter.is_uppercase() && !word.is_empty());
            // An acronym is one word.
            let acronym = letter.is_uppercase() && word.chars().all(char::is_uppercase);
            if ends && !acronym && !word.is_empty() {
                found.push((number, word.to_lowercase()));
                word.clear();
            }
            if letter.is_alphabetic() {
                word.push(letter);
            }
        }
    }
    found
}

/// The refused phrases of a text, each with the line where it begins. A phrase may continue on the
/// next line.
fn refused_phrases(
    words: &[(usize, String)],
    refused: &[(&'static str, &'static str)],
) -> Vec<(usize, &'static str, &'static str)> {
    let mut by_first_word = HashMap::<&str, Vec<_>>::new();
    for (phrase, instead) in refused {
        let parts: Vec<&str> = phrase.split(' ').collect();
        let entry = by_first_word.entry(parts[0]).or_default();
        entry.push((parts, *phrase, *instead));
    }
    let mut found = Vec::new();
    for (at, (line, word)) in words.iter().enumerate() {
        for (parts, phrase, instead) in by_first_word.get(word.as_str()).into_iter().flatten() {
            let here = words[at..].iter().map(|(_, word)| word.as_str());
            if here.take(parts.len()).eq(parts.iter().copied()) {
                found.push((*line, *phrase, *instead));
            }
        }
    }
    found
}

#[test]
fn no_text_has_a_refused_word() {
    assert!(EXCEPTIONS.len() <= 10);
    let mut problems = Vec::new();
    for (name, text) in texts().into_iter().chain(help_texts()) {
        let mut refused = REFUSED.to_vec();
        if name.starts_with("src/store/") || name == "schema.sql" {
            refused.push(REFUSED_IN_THE_STORE);
        }
        refused.retain(|(phrase, _)| {
            let is_exception = |(file, word, _): &(&str, &str, &str)| {
                *file == name && (word.is_empty() || word == phrase)
            };
            !EXCEPTIONS.iter().any(is_exception)
        });
        for (line, phrase, instead) in refused_phrases(&words(&text), &refused) {
            problems.push(format!("{name}:{line}: \"{phrase}\": write {instead}"));
        }
    }
    let count = problems.len();
    assert!(
        problems.is_empty(),
        "{count} refused words:\n{}",
        problems.join("\n")
    );
}

#[test]
fn words_are_found_in_names_of_code_and_across_lines() {
    let text = "isTaken was_told HTTPServer\n/// set\n/// aside";
    let words = words(text);
    let found: Vec<&str> = words.iter().map(|(_, word)| word.as_str()).collect();
    assert_eq!(
        found,
        ["is", "taken", "was", "told", "httpserver", "set", "aside"]
    );
    let refused = refused_phrases(&words, &[("set aside", "dead-lettered")]);
    assert_eq!(refused, [(2, "set aside", "dead-lettered")]);
}
