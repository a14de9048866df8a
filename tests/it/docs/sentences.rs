//! The length of sentences, on every page.

use super::fences::prose;
use super::pages;
use std::fs;

const WORDS_MAX: usize = 25;

/// Made from config.toml.
const GENERATED: &str = "docs/reference/configuration.md";

/// The sentences of a page, each with the line where its paragraph begins. A list item and a cell
/// of a table are paragraphs of their own.
fn sentences(text: &str) -> Vec<(usize, String)> {
    let mut paragraphs: Vec<(usize, String)> = Vec::new();
    let mut continues = false;
    for (number, line) in (1..).zip(prose(text).lines()) {
        let trimmed = line.trim();
        if trimmed.starts_with('|') {
            // The parts of a cell are a list.
            let parts = trimmed
                .split(['|', ';'])
                .map(|part| (number, part.to_owned()));
            paragraphs.extend(parts);
            continues = false;
            continue;
        }
        let is_item = trimmed.starts_with("- ")
            || trimmed
                .split_once(". ")
                .is_some_and(|(first, _)| first.parse::<u32>().is_ok());
        if trimmed.is_empty() || trimmed.starts_with('#') || is_item || !continues {
            paragraphs.push((number, String::new()));
        }
        continues = !trimmed.is_empty() && !trimmed.starts_with('#');
        if let Some((_, paragraph)) = paragraphs.last_mut() {
            paragraph.push_str(trimmed);
            paragraph.push(' ');
        }
    }
    paragraphs
        .into_iter()
        .flat_map(|(number, paragraph)| {
            split(&plain(&paragraph))
                .into_iter()
                .map(move |sentence| (number, sentence))
        })
        .collect()
}

/// Without code, and without the targets of links: inline code is one word.
fn plain(text: &str) -> String {
    let mut words = String::new();
    for (index, part) in text.split('`').enumerate() {
        words.push_str(if index % 2 == 0 { part } else { "code" });
    }
    let mut plain = String::new();
    for (index, part) in words.split("](").enumerate() {
        let rest = if index == 0 {
            part
        } else {
            part.split_once(')').map_or("", |(_, rest)| rest)
        };
        plain.push_str(rest);
    }
    plain
}

/// Sentences end with a sign and a space. "e.g." and the like are not used.
fn split(text: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    for word in text.split_whitespace() {
        if let Some(sentence) = found.last_mut() {
            sentence.push_str(word);
            sentence.push(' ');
        }
        let end = word.trim_end_matches(['*', '_', ')', '"']);
        if end.ends_with(['.', '?', '!', ':']) {
            found.push(String::new());
        }
    }
    found
}

/// How many words a sentence has. Signs alone are none.
fn count(sentence: &str) -> usize {
    sentence
        .split_whitespace()
        .filter(|word| word.contains(char::is_alphanumeric))
        .count()
}

#[test]
fn no_sentence_is_longer_than_25_words() {
    let root = std::path::Path::new(super::ROOT);
    let mut long = Vec::new();
    for page in pages().into_iter().chain([root.join("CHANGELOG.md")]) {
        let name = page.strip_prefix(root).unwrap().display().to_string();
        if name == GENERATED {
            continue;
        }
        for (line, sentence) in sentences(&fs::read_to_string(&page).unwrap()) {
            let words = count(&sentence);
            if words > WORDS_MAX {
                long.push(format!("{name}:{line}: {words} words: {sentence}"));
            }
        }
    }
    assert!(long.is_empty(), "{} sentences: {long:#?}", long.len());
}

#[test]
fn sentences_end_where_a_reader_pauses() {
    let page = "# A title\n\nOne `x y` two\nthree. Four [five](six seven): eight.\n\n- nine;\n- ten; 11\n| a b; c |\n";
    let found: Vec<_> = sentences(page)
        .into_iter()
        .map(|(_, sentence)| count(&sentence))
        .filter(|words| *words > 0)
        .collect();
    assert_eq!(found, [2, 4, 2, 1, 1, 2, 2, 1]);
}
