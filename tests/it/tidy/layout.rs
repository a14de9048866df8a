//! How the text of the code is laid out: the length of lines, and one variable a `let`.

use std::fs;
use std::path::Path;

use super::{ROOT, ROOTS, sources};

const COLUMNS_MAX: usize = 100;

/// Lines that cannot be broken, each by its file and its beginning.
const UNBREAKABLE: [(&str, &str); 1] = [
    // A value that is printed as it is.
    ("config.toml", "line_completed = "),
];

/// The code, and the files that a person edits as well.
fn texts() -> Vec<(String, String)> {
    let files = [
        "schema.sql",
        "config.toml",
        "Cargo.toml",
        "crates/testkit/Cargo.toml",
        "deny.toml",
        ".ci/run",
        "scripts/test",
        "scripts/test-release",
        "packaging/prometheus/alerts.yml",
    ];
    let read = |file: &str| {
        let text = fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
        (file.to_owned(), text)
    };
    let code = ROOTS.into_iter().flat_map(sources);
    code.chain(files.into_iter().map(read)).collect()
}

#[test]
fn lines_are_short() {
    let mut long = Vec::new();
    for (file, text) in texts() {
        for (number, line) in (1..).zip(text.lines()) {
            let columns = line.chars().count();
            let unbreakable = UNBREAKABLE
                .iter()
                .any(|(name, start)| file == *name && line.starts_with(start));
            if columns > COLUMNS_MAX && !unbreakable {
                long.push(format!("{file}:{number}: {columns} columns"));
            }
        }
    }
    assert!(long.is_empty(), "break these lines: {long:#?}");
}

/// The lines on which a `let` gives several values to several names, such as
/// `let (a, b) = (1, 2);`.
fn packed_lets(text: &str) -> Vec<usize> {
    let packed = |(at, _): &(usize, &str)| is_packed(&text[at + "let ".len()..]);
    text.match_indices("let (")
        .filter(packed)
        .map(|(at, _)| text[..at].matches('\n').count() + 1)
        .collect()
}

/// Whether a pattern in parentheses gets a tuple of expressions.
fn is_packed(pattern: &str) -> bool {
    let is_tuple = || {
        let rest = &pattern[closing(pattern)? + 1..];
        let value = rest.split_once(" = ")?.1;
        let has_type_only = rest.starts_with(" = ") || rest.starts_with(": ");
        let end = closing(value.strip_prefix('(').map(|_| value)?)?;
        let is_whole = value[end + 1..].starts_with(';');
        Some(has_type_only && is_whole && has_comma(&value[1..end]))
    };
    is_tuple().unwrap_or(false)
}

/// Where the parenthesis closes with which a text begins.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, sign) in text.char_indices() {
        match sign {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Whether a text has a comma outside of all brackets.
fn has_comma(text: &str) -> bool {
    let mut depth = 0;
    text.chars().any(|sign| {
        match sign {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        sign == ',' && depth == 0
    })
}

#[test]
fn each_variable_has_a_let_of_its_own() {
    let packed: Vec<_> = ROOTS
        .into_iter()
        .flat_map(sources)
        .filter(|(file, _)| !file.ends_with("tidy/layout.rs"))
        .flat_map(|(file, text)| {
            let lines = packed_lets(&text).into_iter();
            lines
                .map(|line| format!("{file}:{line}"))
                .collect::<Vec<_>>()
        })
        .collect();
    assert!(packed.is_empty(), "one let for each variable: {packed:#?}");
}

#[test]
fn packed_lets_are_recognized() {
    for packed in [
        "let (a, b) = (1, 2);",
        "let (mut a, b): (u8, u8) = (f(1, 2), g());",
        "let (a, b) = (\n    one(),\n    two(),\n);",
        "let ((a, _), b) = (pair(), 2);",
    ] {
        assert_eq!(packed_lets(packed), [1], "{packed}");
    }
    for other in [
        "let (a, b) = f(1, 2);",
        "let (a, b) = (1..9).fold((0, 1), step);",
        "let (a, b): (u8, u8) = (row.get(0));",
        "let (a, b) = if c { (1, 2) } else { (3, 4) };",
    ] {
        assert_eq!(packed_lets(other), [] as [usize; 0], "{other}");
    }
}
