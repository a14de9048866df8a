//! How dense the code may be: the length of functions and of files.

use super::{ROOTS, code, sources};

/// Lines of a function, from its name to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;

/// At most one function in twenty may have more lines.
const FUNCTION_LINES_USUAL: usize = 50;

/// Lines of code in a source file, without comments, blank lines and unit tests.
const FILE_LINES_MAX: usize = 400;

/// The functions of a file: the line on which each begins, its name and its lines. rustfmt puts the
/// closing brace below the first letter.
fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let mut words = line.split_whitespace().skip_while(|word| {
            matches!(*word, "const" | "async" | "in")
                || word.starts_with("pub")
                || word.ends_with(')')
        });
        if words.next() != Some("fn") {
            continue;
        }
        let name = words.next().unwrap_or_default();
        let name = name.split(['(', '<']).next().unwrap_or_default();
        let closing = format!("{}}}", " ".repeat(indent));
        let length = lines[first..]
            .iter()
            .position(|line| *line == closing)
            .map_or(1, |after| after + 1);
        // A declaration in a trait ends on its line or on the next ones.
        let is_declaration = lines[first..]
            .iter()
            .find(|line| line.ends_with([';', '{', '}']))
            .is_some_and(|line| line.ends_with(';') || line.ends_with('}'));
        found.push((
            first + 1,
            name.to_owned(),
            if is_declaration { 1 } else { length },
        ));
    }
    found
}

/// The functions of some folders may not be long, and few of them may be of medium length.
fn assert_short_functions(folders: &[&str], functions_min: usize) {
    let mut count = 0;
    let mut long = Vec::new();
    for (file, text) in folders.iter().copied().flat_map(sources) {
        for (line, name, length) in functions(&text) {
            count += 1;
            if length > FUNCTION_LINES_USUAL {
                long.push((length, format!("{file}:{line} {name}: {length} lines")));
            }
        }
    }
    assert!(
        count > functions_min,
        "only {count} functions were found in {folders:?}"
    );
    long.sort();
    let too_long: Vec<_> = long
        .iter()
        .filter(|(length, _)| *length > FUNCTION_LINES_MAX)
        .collect();
    assert!(too_long.is_empty(), "split these: {too_long:#?}");
    assert!(
        long.len() * 20 <= count,
        "{} of {count} functions are longer than {FUNCTION_LINES_USUAL} lines: {long:#?}",
        long.len()
    );
}

#[test]
fn functions_are_short() {
    let [src, others @ ..] = ROOTS;
    assert_short_functions(&[src], 1000);
    assert_short_functions(&others, 800);
}

#[test]
fn source_files_are_short() {
    let long: Vec<_> = sources("src")
        .into_iter()
        .filter(|(file, _)| !file.ends_with("/tests.rs"))
        .map(|(file, text)| {
            (
                code(&text)
                    .lines()
                    .filter(|line| !line.trim().is_empty())
                    .count(),
                file,
            )
        })
        .filter(|(lines, _)| *lines > FILE_LINES_MAX)
        .collect();
    assert!(long.is_empty(), "split these: {long:#?}");
}
