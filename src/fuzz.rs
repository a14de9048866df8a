//! Bytes from outside, for tests of parsers: every file of a corpus, then mutations of them. A
//! failing input is shrunk and saved in target/fuzz, to become a file of the corpus.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;

use testkit::mutations::{mutations, seeds, span};

/// No input may keep a parser busy for longer, however slow the machine.
const BOUND: Duration = Duration::from_secs(2);

/// How many attempts to shrink a failing input there are.
const SMALLER_TRIES: usize = 500;

/// Runs a parser's check over a corpus and `cases` mutations of it. The check panics on a fault; it
/// returns whether the parser accepted its input.
pub(crate) fn fuzz_corpus(
    name: &str,
    cases: usize,
    dictionary: &[&str],
    check: impl Fn(&[u8]) -> bool,
) {
    let seeds = seeds(name);
    for (file, bytes) in &seeds {
        let accepted =
            run_fuzz_case(&check, bytes).unwrap_or_else(|reason| panic!("{name}/{file}: {reason}"));
        assert!(
            accepted || !file.starts_with("ok-"),
            "{name}/{file} is refused"
        );
        assert!(
            !accepted || !file.starts_with("no-"),
            "{name}/{file} is accepted"
        );
    }
    for (case, bytes) in mutations(&seeds, cases, dictionary) {
        if let Err(reason) = run_fuzz_case(&check, &bytes) {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
            let shrunk = shrink_fuzz_input(&check, bytes);
            let path = folder.join(format!("{name}-{case}"));
            fs::create_dir_all(folder)
                .and_then(|()| fs::write(&path, &shrunk))
                .unwrap();
            panic!(
                "{name}, {case}: {reason}\nsmallest: \"{}\"\nleft in {}: name it and move it to \
                    tests/corpus/{name}",
                shrunk.escape_ascii(),
                path.display()
            );
        }
    }
}

/// Whether the input was accepted; or the message of the failed check. A slow check runs again: the
/// machine may have been busy.
fn run_fuzz_case(check: &impl Fn(&[u8]) -> bool, bytes: &[u8]) -> Result<bool, String> {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        let accepted = catch_unwind(AssertUnwindSafe(|| check(bytes))).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or("it panicked".to_owned())
        })?;
        fastest = fastest.min(start.elapsed());
        if fastest < BOUND {
            return Ok(accepted);
        }
    }
    Err(format!("it needed {fastest:?}"))
}

/// Removes every piece that the failure does not need.
fn shrink_fuzz_input(check: &impl Fn(&[u8]) -> bool, mut bytes: Vec<u8>) -> Vec<u8> {
    let mut rng = Rng::with_seed(0);
    for _ in 0..SMALLER_TRIES {
        if bytes.is_empty() {
            break;
        }
        let (start, end) = span(bytes.len(), &mut rng);
        let without = [&bytes[..start], &bytes[end..]].concat();
        if run_fuzz_case(check, &without).is_err() {
            bytes = without;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::mutations::mutated;

    #[test]
    fn a_fuzz_failure_is_found_shrunk_and_reported() {
        let check = |bytes: &[u8]| !bytes.windows(2).any(|pair| pair == b"\r\n");
        let panics = |bytes: &[u8]| {
            assert!(check(bytes), "there it is");
            true
        };
        let mut rng = Rng::with_seed(7);
        let seeds = vec![
            ("a".to_owned(), b"one 22 three".to_vec()),
            ("b".to_owned(), b"{\"four\": 5}".to_vec()),
        ];
        let found = (0..5000)
            .map(|_| mutated(&seeds, &["x"], &mut rng))
            .find(|bytes| !check(bytes))
            .unwrap();
        assert_eq!(
            run_fuzz_case(&panics, &found),
            Err("there it is".to_owned())
        );
        assert_eq!(shrink_fuzz_input(&panics, found), b"\r\n");
    }

    #[test]
    fn the_same_seed_makes_the_same_fuzz_input() {
        let seeds = seeds("body");
        let inputs = |seed| {
            let mut rng = Rng::with_seed(seed);
            (0..50)
                .map(|_| mutated(&seeds, &["user_id"], &mut rng))
                .collect::<Vec<_>>()
        };
        assert_eq!(inputs(3), inputs(3));
        assert_ne!(inputs(3), inputs(4));
    }
}
