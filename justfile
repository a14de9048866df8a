# Short commands for work on payrelay: https://just.systems

# The fast lane, without Java: unit tests with fewer fuzz cases, and integration tests without
# Kafka and without those that open a thousand connections.
test:
    PAYRELAY_FUZZ_CASES=1000 cargo test --lib
    cargo test --test it -- tidy:: docs:: http:: idempotency:: outbox:: --skip a_thousand

# All tests, with real brokers.
test-all *args:
    scripts/test {{args}}

# Tests before a release, next to other programs: minutes, with an optimized build.
test-release *args:
    scripts/test-release {{args}}

# Formatting and lints.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo clippy --test release -- -D warnings

# The same as continuous integration.
ci:
    .ci/run

# Benchmarks; `just bench intake` runs one.
bench *args:
    cargo bench --bench {{args}}
