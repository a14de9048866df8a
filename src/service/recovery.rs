//! The start on an existing database: what the last process left, and what the configuration has
//! changed.

use super::start_error::ServiceStartError;
use crate::config::{self, Config, PublisherKind};
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;
use crate::runtime::plural::counted;
use crate::slack::channel;
use crate::store::channel_sink::{self, ChannelSink};
use crate::store::unconsumed::{self, UnconsumedPage};
use crate::store::{Store, StoreError, delivery, node_role, outbox, route, topic};

/// Continues after a process that ended, or after a change of the configuration.
pub(super) fn recover_service(store: &Store, config: &Config) -> Result<(), ServiceStartError> {
    let role = config.node.role;
    if role == NodeRole::Edge {
        return recover_edge(store);
    }
    leave_edge(store)?;
    store.write(move |tx| node_role::save_node_role(tx, role))?;
    save_service_sinks(store, config)?;
    let routes = config.slack.routes.clone();
    let unknown = store.write(move |tx| {
        route::replace_routes(tx, &routes).and_then(|()| delivery::recover_deliveries(tx))
    })?;
    if unknown > 0 {
        log::warn!(
            event = "deliveries_interrupted", deliveries = unknown;
            "{} in flight when payrelay last stopped: sending again (may appear twice)",
            counted(unknown, "delivery")
        );
    }
    if config.publisher.kind == PublisherKind::Application
        && store.write(|tx| topic::abandon_other_topics(tx, None))?
    {
        let count = backfill_service(store)?;
        log::warn!(
            event = "publisher_changed", events = count;
            "events no longer pass through Kafka: backfilled {} from the outbox",
            counted(count, "published event")
        );
    }
    Ok(())
}

/// Before an edge becomes single: each of its events is on the shared topic, for others to deliver.
fn leave_edge(store: &Store) -> Result<(), ServiceStartError> {
    if store.read(node_role::node_role)? == NodeRole::Single {
        return Ok(());
    }
    let waiting = store.read(outbox::count_unpublished_events)?;
    if waiting > 0 {
        return Err(ServiceStartError::EdgeEventsWait { count: waiting });
    }
    while store.write(node_role::advance_edge_mark)? {}
    Ok(())
}

/// An edge delivers nothing: what this node has to deliver itself comes first.
fn recover_edge(store: &Store) -> Result<(), ServiceStartError> {
    let waiting = store.read(unconsumed::count_own_deliveries)?;
    if waiting > 0 {
        return Err(ServiceStartError::DeliveriesWait { count: waiting });
    }
    store.write(|tx| node_role::save_node_role(tx, NodeRole::Edge))?;
    while store.write(node_role::advance_edge_mark)? {}
    Ok(())
}

/// Gives every published event a delivery. With Kafka the consumer does that.
fn backfill_service(store: &Store) -> Result<usize, StoreError> {
    let mut after = 0;
    let mut count = 0;
    loop {
        let UnconsumedPage { events, next } =
            store.read(|connection| unconsumed::page_of_unconsumed(connection, after))?;
        let ids: Vec<i64> = events.iter().map(|event| event.outbox_id).collect();
        count += store
            .write(move |tx| unconsumed::backfill_unconsumed(tx, None, &ids, Timestamp::now()))?;
        match next {
            Some(next) => after = next,
            None => return Ok(count),
        }
    }
}

/// Records the sink of each channel. Refuses to write payments to the log that wait for a webhook:
/// the operator may have forgotten to set it.
fn save_service_sinks(store: &Store, config: &Config) -> Result<(), ServiceStartError> {
    let slack = &config.slack;
    let sink = |url: Option<&config::Secret>| match (slack.sink, url) {
        (config::Sink::Auto, Some(_)) => ChannelSink::Webhook,
        _ => ChannelSink::Log,
    };
    let sinks: Vec<_> = channel::channel_webhooks(slack)
        .map(|(name, url)| (name.to_owned(), sink(url)))
        .collect();
    if slack.sink == config::Sink::Auto {
        for (channel, count) in store.read(channel_sink::webhook_channel_backlogs)? {
            // The payments of a channel that is gone go to other channels, at last to the default.
            let (_, sink) = sinks
                .iter()
                .find(|(name, _)| *name == channel)
                .unwrap_or(&sinks[0]);
            if *sink == ChannelSink::Log && count > 0 {
                return Err(ServiceStartError::WebhookGone { channel, count });
            }
        }
    }
    store.write(move |tx| channel_sink::replace_channel_sinks(tx, &sinks))?;
    Ok(())
}
