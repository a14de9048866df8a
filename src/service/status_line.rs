//! The line that `systemctl status` shows.

use crate::sampler::Samples;
use crate::store::Store;

/// What fails and what waits.
pub(super) fn describe_status(store: &Store, samples: &Samples) -> String {
    let Some(sample) = samples.last() else {
        return "started".to_owned();
    };
    let states = [
        ("database", store.database_state()),
        ("disk", store.disk_state()),
    ];
    let failing = states.into_iter().filter(|(_, health)| health.is_failing());
    let mut parts: Vec<String> = failing
        .map(|(name, health)| format!("{name}: {}", health.error.unwrap_or_default()))
        .collect();
    let backlog = &sample.backlog;
    parts.push(format!(
        "{} unpublished, {} unconsumed, {} undelivered, {} dead letters",
        backlog.unpublished.count,
        backlog.unconsumed.count,
        backlog.undelivered().count,
        backlog.dead_letters.count
    ));
    parts.join("; ")
}
