//! The sink of each channel at the last start.

use rusqlite::{Connection, OptionalExtension, Transaction};

use crate::domain::text_enum::text_enum;

text_enum! {
    /// Where a channel's messages go.
    pub enum ChannelSink {
        /// To its webhook.
        Webhook = "webhook",
        /// To this process as log lines.
        Log = "log",
    }
}

/// The channels that had a webhook at the last start, each with its number of waiting deliveries.
/// Used at the start only.
pub fn webhook_channel_backlogs(connection: &Connection) -> rusqlite::Result<Vec<(String, i64)>> {
    connection
        .prepare(
            "SELECT channel, (SELECT count(*) FROM delivery d WHERE d.channel = s.channel \
                AND d.status IN ('PENDING', 'SENDING')) FROM channel_sink s \
                WHERE sink = 'webhook' ORDER BY channel",
        )?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

/// The channels of the last start.
pub fn channel_names(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached("SELECT channel FROM channel_sink ORDER BY channel")?
        .query_map([], |row| row.get(0))?
        .collect()
}

/// How many deliveries wait for each channel, also for one that is no longer configured.
pub fn waiting_by_channel(connection: &Connection) -> rusqlite::Result<Vec<(String, i64)>> {
    connection
        .prepare_cached(
            "SELECT channel, count(*) FROM delivery WHERE status IN ('PENDING', 'SENDING') \
                GROUP BY channel ORDER BY channel",
        )?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

/// The last error of a channel's oldest waiting delivery.
pub fn last_channel_error(
    connection: &Connection,
    channel: &str,
) -> rusqlite::Result<Option<String>> {
    connection
        .prepare_cached(
            "SELECT last_error FROM delivery WHERE channel = ?1 \
                AND status IN ('PENDING', 'SENDING') ORDER BY outbox_id LIMIT 1",
        )?
        .query_row([channel], |row| row.get(0))
        .optional()
        .map(Option::flatten)
}

/// Replaces the recorded sinks of the channels.
pub fn replace_channel_sinks(
    tx: &Transaction<'_>,
    sinks: &[(String, ChannelSink)],
) -> rusqlite::Result<()> {
    tx.execute("DELETE FROM channel_sink", [])?;
    for (name, sink) in sinks {
        tx.execute("INSERT INTO channel_sink VALUES (?1, ?2)", (name, sink))?;
    }
    Ok(())
}
