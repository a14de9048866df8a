//! Seeds of random tests. Each test prints its seed, and `PAYRELAY_TEST_SEED` repeats it.

use std::env;

use proptest::test_runner::{Config, RngSeed};

const SEED: &str = "PAYRELAY_TEST_SEED";

/// The seed of a random test: from the environment, or else this default.
pub fn seed(default: impl FnOnce() -> u64) -> u64 {
    let seed = from_environment(SEED).unwrap_or_else(default);
    println!("{SEED}={seed}");
    seed
}

/// A configuration of proptest with this number of cases and a known seed. `PROPTEST_RNG_SEED`,
/// which other property tests read as well, goes before `PAYRELAY_TEST_SEED`.
pub fn proptest_config(cases: u32) -> Config {
    let seed = from_environment("PROPTEST_RNG_SEED").unwrap_or_else(|| seed(|| fastrand::u64(..)));
    println!("PROPTEST_RNG_SEED={seed}");
    Config {
        cases,
        rng_seed: RngSeed::Fixed(seed),
        ..Config::default()
    }
}

fn from_environment(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name} is no number: {text:?}")))
}
