//! The limit of file descriptors: raised as far as allowed, else fewer connections.

use std::num::NonZeroUsize;

use payrelay::config::Config;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// For everything that does not grow with the configuration: 29 descriptors are open from the
/// start, and 8 are for the local socket. The rest is for Kafka's brokers.
const RESERVED: usize = 94;

/// Each connection needs a descriptor, and the usual limit is 1,024. Raises the limit as far as
/// allowed. Where that is not enough, serves fewer connections, so that the database, Kafka and
/// Slack always find a descriptor.
pub(super) fn raise_descriptor_limit(config: &mut Config) {
    // A reader has the file and its WAL open; a channel a connection, and one for DNS.
    let reserved = RESERVED + 2 * (config.database.readers.get() + 1 + config.slack.routes.len());
    let http = &mut config.http;
    let wanted = http.connections_max.get() + reserved;
    let limit = raised_descriptor_limit(wanted as u64);
    if is_descriptor_limit_enough(limit, wanted as u64) {
        return;
    }
    let capacity = usize::try_from(limit.unwrap_or(u64::MAX))
        .unwrap_or(usize::MAX)
        .saturating_sub(reserved);
    http.lower_connections_max(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN));
    log::warn!(
        event = "descriptors_short", connections = http.connections_max.get();
        "serving at most {} connections at a time, and at most {} of one address: more need \
            {wanted} descriptors (ulimit -n)",
        http.connections_max,
        http.client_connections_max
    );
}

/// The limit after an attempt to raise it to `wanted`; `None` is without limit.
fn raised_descriptor_limit(wanted: u64) -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    if is_descriptor_limit_enough(limit.current, wanted) {
        return limit.current;
    }
    let current = if is_descriptor_limit_enough(limit.maximum, wanted) {
        Some(wanted)
    } else {
        limit.maximum
    };
    let raised = Rlimit {
        current,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => current,
        Err(_) => limit.current,
    }
}

fn is_descriptor_limit_enough(limit: Option<u64>, wanted: u64) -> bool {
    limit.is_none_or(|limit| limit >= wanted)
}
