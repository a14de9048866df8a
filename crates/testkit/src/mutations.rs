//! A corpus, and mutations of it in the same order in every run.
//!
//! A corpus is a folder of tests/corpus. A file whose name begins with `ok-` has to be accepted,
//! one that begins with `no-` to be refused. `PAYRELAY_FUZZ_CASES` says how many mutations there
//! are, `PAYRELAY_TEST_SEED` which ones.

use fastrand::Rng;

use crate::random;
use std::{env, fs};

/// Longer ones are cut: what is large is in the corpus itself.
const BYTES_MAX: usize = 128 * 1024;

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

/// Mutated inputs, each with its name; the environment may change their number.
pub fn mutations<'a>(
    seeds: &'a [(String, Vec<u8>)],
    cases: usize,
    dictionary: &'a [&str],
) -> impl Iterator<Item = (String, Vec<u8>)> + 'a {
    let cases = number("PAYRELAY_FUZZ_CASES", cases);
    let seed = random::seed(|| 1);
    (0..cases).map(move |case| {
        let mut rng = Rng::with_seed(seed << 40 | case as u64);
        (
            format!("seed-{seed}-case-{case}"),
            mutated(seeds, dictionary, &mut rng),
        )
    })
}

fn number(variable: &str, default: usize) -> usize {
    env::var(variable).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number"))
    })
}

/// The files of a corpus, by name.
pub fn seeds(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = crate::paths::repository().join("tests/corpus").join(name);
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let read = |entry: fs::DirEntry| {
        let name = entry
            .file_name()
            .into_string()
            .expect("the names of the corpus are UTF-8");
        (
            name,
            fs::read(entry.path()).expect("the corpus can be read"),
        )
    };
    let mut seeds: Vec<_> = entries
        .map(|entry| read(entry.expect("the corpus can be read")))
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{name} has no corpus");
    seeds
}

/// Somewhere in this number of bytes; mostly short, sometimes all.
pub fn span(len: usize, rng: &mut Rng) -> (usize, usize) {
    let start = rng.usize(..=len);
    let longest = if rng.bool() {
        len - start
    } else {
        8.min(len - start)
    };
    (start, start + rng.usize(..=longest))
}

pub fn mutated(seeds: &[(String, Vec<u8>)], dictionary: &[&str], rng: &mut Rng) -> Vec<u8> {
    // A large one takes as long as many small ones.
    let mut any = || {
        let bytes = &seeds[rng.usize(..seeds.len())].1;
        if bytes.len() < 4096 || rng.u8(..16) == 0 {
            bytes
        } else {
            &seeds[rng.usize(..seeds.len())].1
        }
    };
    let mut bytes = any().clone();
    let other = any();
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
        _ => dictionary
            .get(rng.usize(..dictionary.len().max(1)))
            .map_or(Vec::new(), |word| word.as_bytes().to_vec()),
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
            let Some(from) = (start..bytes.len()).find(digits) else {
                return;
            };
            let to = (from..bytes.len())
                .find(|at| !digits(at))
                .unwrap_or(bytes.len());
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
