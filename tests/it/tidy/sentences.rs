//! How long a sentence may be: of a comment, and of a page.

use std::fs;
use std::path::Path;

use super::plain_words::texts;
use super::{ROOT, ROOTS};

const WORDS_MAX: usize = 25;

/// A part of a text whose sentences belong together, and the line where it begins.
#[derive(Debug, PartialEq)]
struct Paragraph {
    line: usize,
    text: String,
}

/// Collects the lines of a page, or of a comment, as paragraphs.
#[derive(Default)]
struct Paragraphs {
    done: Vec<Paragraph>,
    open: Option<Paragraph>,
    in_code: bool,
}

impl Paragraphs {
    fn add(&mut self, line: usize, text: &str) {
        let text = text.trim().trim_start_matches("> ");
        if text.starts_with("```") {
            self.end();
            self.in_code = !self.in_code;
        } else if self.in_code {
        } else if text.is_empty() {
            self.end();
        } else if text.starts_with('|') {
            self.end();
            for cell in text.trim_matches('|').split('|') {
                self.begin(line, cell.trim());
            }
        } else if text.starts_with('#') {
            self.begin(line, text.trim_start_matches(['#', ' ']));
            self.end();
        } else if let Some(item) = list_item(text) {
            self.begin(line, item);
        } else if let Some(open) = &mut self.open {
            open.text.push(' ');
            open.text.push_str(text);
        } else {
            self.begin(line, text);
        }
    }

    fn begin(&mut self, line: usize, text: &str) {
        self.end();
        let text = text.to_owned();
        self.open = Some(Paragraph { line, text });
    }

    fn end(&mut self) {
        self.done.extend(self.open.take());
    }

    fn end_comment(&mut self) {
        self.end();
        self.in_code = false;
    }
}

/// The text of a list item, without its mark.
fn list_item(text: &str) -> Option<&str> {
    let unnumbered = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let numbered = unnumbered.len() < text.len();
    text.strip_prefix("- ")
        .or_else(|| text.strip_prefix("* "))
        .or_else(|| unnumbered.strip_prefix(". ").filter(|_| numbered))
}

fn extension(name: &str) -> Option<&str> {
    Path::new(name).extension()?.to_str()
}

/// The paragraphs of a page, or of the comments of a file.
fn paragraphs(name: &str, text: &str) -> Vec<Paragraph> {
    let marks: &[&str] = match extension(name) {
        Some("md") => &[],
        Some("rs") => &["//!", "///", "//"],
        Some("sql") => &["--"],
        _ => &["#"],
    };
    let mut found = Paragraphs::default();
    let mut before = None;
    for (number, line) in (1..).zip(text.lines()) {
        if marks.is_empty() {
            found.add(number, line);
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let comment = marks
            .iter()
            .find_map(|mark| Some((*mark, line.trim_start().strip_prefix(mark)?)));
        let kind = comment.map(|(mark, _)| (mark, indent));
        if kind != before {
            found.end_comment();
        }
        before = kind;
        if let Some((_, text)) = comment {
            found.add(number, text);
        } else if let Some(text) = trailing_comment(line, marks[marks.len() - 1]) {
            found.add(number, text);
            found.end_comment();
        }
    }
    found.end();
    found.done
}

/// The comment after code on the same line; a mark within a string begins none.
fn trailing_comment<'a>(line: &'a str, mark: &str) -> Option<&'a str> {
    let (code, comment) = line.split_once(&format!(" {mark} "))?;
    code.matches('"')
        .count()
        .is_multiple_of(2)
        .then_some(comment)
}

/// The words of each sentence of a paragraph. Code in backticks is one word, and so is an address.
fn sentences(paragraph: &str) -> Vec<Vec<String>> {
    let text: String = paragraph
        .split('`')
        .enumerate()
        .map(|(index, part)| if index % 2 == 1 { "code" } else { part })
        .collect();
    let mut found = vec![Vec::new()];
    for word in without_link_targets(&text).split_whitespace() {
        if word.contains(char::is_alphanumeric)
            && let Some(sentence) = found.last_mut()
        {
            sentence.push(word.to_owned());
        }
        let end = word.trim_end_matches([')', '"', '\'', '*', '_']);
        if end.ends_with(['.', '!', '?']) {
            found.push(Vec::new());
        }
    }
    found.retain(|sentence| !sentence.is_empty());
    found
}

/// `[the text](target)` as `the text`.
fn without_link_targets(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("](") {
        kept.push_str(&before.replacen('[', "", 1));
        rest = link.split_once(')').map_or("", |(_, after)| after);
    }
    kept + rest
}

/// The sentences that are too long, each with its file and line.
fn long_sentences(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for paragraph in paragraphs(name, text) {
        for sentence in sentences(&paragraph.text) {
            let count = sentence.len();
            if count > WORDS_MAX {
                let line = paragraph.line;
                found.push(format!("{name}:{line}: {count}: {}", sentence.join(" ")));
            }
        }
    }
    found
}

#[test]
fn sentences_are_short() {
    let is_checked = |name: &str| {
        let is_code = ROOTS.iter().any(|root| name.starts_with(root));
        match extension(name) {
            Some("rs") => is_code,
            Some("md") => true,
            _ => name == "schema.sql" || name == "config.toml",
        }
    };
    let long: Vec<_> = texts()
        .into_iter()
        .filter(|(name, _)| is_checked(name))
        .flat_map(|(name, text)| long_sentences(&name, &text))
        .collect();
    assert!(
        long.is_empty(),
        "more than {WORDS_MAX} words:\n{}",
        long.join("\n")
    );
}

#[test]
fn sentences_are_split_at_their_ends() {
    let split = |text| -> Vec<usize> { sentences(text).iter().map(Vec::len).collect() };
    assert_eq!(split("One two. Three four five! Six?"), [2, 3, 1]);
    assert_eq!(
        split("It needs 1.5 s (see `a b. c`). Then - it stops."),
        [6, 3]
    );
    assert_eq!(
        split("Read [the two pages](docs/a.md) of https://a.example/b."),
        [6]
    );
    assert_eq!(split("An end is: no end; at all"), [7]);
}

#[test]
fn paragraphs_are_found_in_comments_and_pages() {
    let text = |name, text: &str| -> Vec<String> {
        let found = paragraphs(name, text);
        found.into_iter().map(|part| part.text).collect()
    };
    let code = "//! One\n//! two.\n//!\n//! - an item\n//!   of two lines\n\
        fn f() {} // a trailing one\nlet url = \"a // b\";\n// Another.\n";
    assert_eq!(
        text("a.rs", code),
        [
            "One two.",
            "an item of two lines",
            "a trailing one",
            "Another."
        ]
    );
    let page = "# A head\nOne\ntwo.\n\n| a | b c |\n|---|---|\n```sh\ncode\n```\n1. First\n";
    assert_eq!(
        text("a.md", page),
        ["A head", "One two.", "a", "b c", "---", "---", "First"]
    );
    assert_eq!(
        text("a.sql", "-- One\n-- two\nSELECT 1; -- three"),
        ["One two", "three"]
    );
    let root = fs::read_to_string(Path::new(ROOT).join("config.toml")).unwrap();
    assert!(paragraphs("config.toml", &root).len() > 50);
}
