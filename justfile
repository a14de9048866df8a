# Short commands for work on payrelay: https://just.systems

# Unit tests and the integration tests that need no Java: about 30 s after the build.
test:
    cargo test --lib
    cargo test --test it -- tidy:: http:: idempotency:: outbox::

# Everything, with real brokers: about 12 minutes on two cores.
test-all *args:
    scripts/test {{args}}

# Formatting and lints.
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings

# What continuous integration runs.
ci:
    .ci/run

# Benchmarks; `just bench intake` runs one.
bench *args:
    cargo bench --bench {{args}}
