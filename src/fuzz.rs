//! Bytes from outside, for tests of parsers: every file of a corpus, then mutations of them, each in the same order in
//! every run.
//!
//! A corpus is a folder of tests/corpus. A file whose name begins with `ok-` has to be taken, one that begins with `no-` to
//! be refused. `PAYRELAY_FUZZ_CASES` says how many mutations there are, `PAYRELAY_FUZZ_SEED` which ones. What fails is made
//! smaller and left in target/fuzz, to become a file of the corpus.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs};

use fastrand::Rng;

/// No input is to keep a parser busy for longer, on however slow a machine.
const BOUND: Duration = Duration::from_secs(2);

/// Longer ones are cut: what is large is in the corpus itself.
const BYTES_MAX: usize = 128 * 1024;

/// How often a failing input is tried to be made smaller.
const SMALLER_TRIES: usize = 500;

/// Numbers at which something begins or ends.
const NUMBERS: [&str; 16] = [
    "0",
    "-0",
    "1",
    "-1",
    "+1",
    "007",
    "1.0",
    "1e3",
    "1e999",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "999999999999999999999999999999999999999",
    "0x7f",
];

/// Bytes at which a parser may stumble, whatever it parses.
const NASTY: [&[u8]; 16] = [
    b"\0",
    b"\r\n",
    b"\n",
    b"\r",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xe2\x80\xae",
    b"\xcc\x81",
    b"\\ud800",
    b"\\u0000",
    b"\x1b[31m",
    b"%00",
    b"''\"\"",
    b"((((",
];

/// Runs a parser's check over a corpus and `cases` mutations of it. The check panics when something is not as it has to
/// be; it tells whether the parser took its input.
pub(crate) fn corpus(name: &str, cases: usize, dictionary: &[&str], check: impl Fn(&[u8]) -> bool) {
    let seeds = seeds(name);
    for (file, bytes) in &seeds {
        let taken = attempt(&check, bytes).unwrap_or_else(|reason| panic!("{name}/{file}: {reason}"));
        assert!(taken || !file.starts_with("ok-"), "{name}/{file} is refused");
        assert!(!taken || !file.starts_with("no-"), "{name}/{file} is taken");
    }
    let (cases, seed) = (number("PAYRELAY_FUZZ_CASES", cases), number("PAYRELAY_FUZZ_SEED", 1));
    for case in 0..cases {
        let mut rng = Rng::with_seed((seed as u64) << 40 | case as u64);
        let bytes = mutated(&seeds, dictionary, &mut rng);
        if let Err(reason) = attempt(&check, &bytes) {
            let (smaller, path) = (smaller(&check, bytes, &mut rng), finding(name, case));
            fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))
                .and_then(|()| fs::write(&path, &smaller))
                .unwrap();
            panic!(
                "{name}, seed {seed}, case {case}: {reason}\nsmallest: \"{}\"\nleft in {}: name it and move it to \
                 tests/corpus/{name}",
                smaller.escape_ascii(),
                path.display()
            );
        }
    }
}

fn number(variable: &str, default: usize) -> usize {
    env::var(variable).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

fn finding(name: &str, case: usize) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz").join(format!("{name}-{case}"))
}

/// The files of a corpus, by name.
fn seeds(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let read = |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    let mut seeds: Vec<_> = entries.map(|entry| read(entry.unwrap())).collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{name} has no corpus");
    seeds
}

/// Whether it was taken; or what the check said. One that is late is asked again: the machine may have been busy.
fn attempt(check: &impl Fn(&[u8]) -> bool, bytes: &[u8]) -> Result<bool, String> {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        let taken = catch_unwind(AssertUnwindSafe(|| check(bytes))).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or("it panicked".to_owned())
        })?;
        fastest = fastest.min(start.elapsed());
        if fastest < BOUND {
            return Ok(taken);
        }
    }
    Err(format!("it took {fastest:?}"))
}

/// Without every piece that the failure does not need.
fn smaller(check: &impl Fn(&[u8]) -> bool, mut bytes: Vec<u8>, rng: &mut Rng) -> Vec<u8> {
    for _ in 0..SMALLER_TRIES {
        if bytes.is_empty() {
            break;
        }
        let (start, end) = span(bytes.len(), rng);
        let without = [&bytes[..start], &bytes[end..]].concat();
        if attempt(check, &without).is_err() {
            bytes = without;
        }
    }
    bytes
}

/// Somewhere in so many bytes; mostly short, sometimes all.
fn span(len: usize, rng: &mut Rng) -> (usize, usize) {
    let start = rng.usize(..=len);
    let longest = if rng.bool() { len - start } else { 8.min(len - start) };
    (start, start + rng.usize(..=longest))
}

fn mutated(seeds: &[(String, Vec<u8>)], dictionary: &[&str], rng: &mut Rng) -> Vec<u8> {
    // A large one takes as long as many small ones.
    let mut any = || {
        let bytes = &seeds[rng.usize(..seeds.len())].1;
        if bytes.len() < 4096 || rng.u8(..16) == 0 { bytes } else { &seeds[rng.usize(..seeds.len())].1 }
    };
    let (mut bytes, other) = (any().clone(), any());
    for _ in 0..=rng.usize(..4) {
        mutate(&mut bytes, other, dictionary, rng);
    }
    bytes.truncate(BYTES_MAX);
    bytes
}

fn mutate(bytes: &mut Vec<u8>, other: &[u8], dictionary: &[&str], rng: &mut Rng) {
    let (start, end) = span(bytes.len(), rng);
    let word = |rng: &mut Rng| match rng.u8(..3) {
        0 => NUMBERS[rng.usize(..NUMBERS.len())].as_bytes().to_vec(),
        1 => NASTY[rng.usize(..NASTY.len())].to_vec(),
        _ => dictionary.get(rng.usize(..dictionary.len().max(1))).map_or(Vec::new(), |word| word.as_bytes().to_vec()),
    };
    match rng.u8(..10) {
        0 if !bytes.is_empty() => {
            let at = rng.usize(..bytes.len());
            bytes[at] ^= 1 << rng.u8(..8);
        }
        1 if !bytes.is_empty() => {
            let at = rng.usize(..bytes.len());
            bytes[at] = rng.u8(..);
        }
        2 => drop(bytes.drain(start..end)),
        3 => {
            let again = bytes[start..end].to_vec();
            drop(bytes.splice(start..start, again));
        }
        4 => bytes.truncate(start),
        5 => drop(bytes.splice(start..start, word(rng))),
        6 => drop(bytes.splice(start..end, word(rng))),
        7 => {
            // A whole number by another one.
            let digits = |at: &usize| bytes[*at].is_ascii_digit();
            let Some(from) = (start..bytes.len()).find(digits) else { return };
            let to = (from..bytes.len()).find(|at| !digits(at)).unwrap_or(bytes.len());
            let number = NUMBERS[rng.usize(..NUMBERS.len())].as_bytes();
            drop(bytes.splice(from..to, number.iter().copied()));
        }
        8 => {
            let (from, to) = span(other.len(), rng);
            drop(bytes.splice(start..end, other[from..to].iter().copied()));
        }
        _ => {
            let repeated = word(rng).repeat(rng.usize(1..200));
            drop(bytes.splice(start..start, repeated));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_found_made_small_and_told() {
        let check = |bytes: &[u8]| !bytes.windows(2).any(|pair| pair == b"\r\n");
        let panics = |bytes: &[u8]| {
            assert!(check(bytes), "there it is");
            true
        };
        let mut rng = Rng::with_seed(7);
        let seeds = vec![("a".to_owned(), b"one 22 three".to_vec()), ("b".to_owned(), b"{\"four\": 5}".to_vec())];
        let found = (0..5000).map(|_| mutated(&seeds, &["x"], &mut rng)).find(|bytes| !check(bytes)).unwrap();
        assert_eq!(attempt(&panics, &found), Err("there it is".to_owned()));
        assert_eq!(smaller(&panics, found, &mut rng), b"\r\n");
    }

    #[test]
    fn the_same_seed_is_the_same_input() {
        let seeds = seeds("body");
        let inputs = |seed| {
            let mut rng = Rng::with_seed(seed);
            (0..50).map(|_| mutated(&seeds, &["user_id"], &mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(inputs(3), inputs(3));
        assert_ne!(inputs(3), inputs(4));
    }
}
