# Short commands for work on payrelay: https://just.systems

# The fast lane, without Java: unit tests, and integration tests without Kafka.
test:
    cargo test --lib
    cargo test --test it -- tidy:: docs:: http:: idempotency:: outbox::

# All tests, with real brokers.
test-all *args:
    scripts/test {{args}}

# Formatting and lints.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# The same as continuous integration.
ci:
    .ci/run

# Benchmarks; `just bench intake` runs one.
bench *args:
    cargo bench --bench {{args}}
