//! The sink of each channel at the last start: its webhook, or payrelay's log.

use rusqlite::{Connection, Transaction};

/// Where a channel's messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelSink {
    /// To its webhook.
    Webhook,
    /// To this process as log lines.
    Log,
}

impl ChannelSink {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Log => "log",
        }
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

/// Replaces the recorded sinks of the channels.
pub fn replace_channel_sinks(
    tx: &Transaction<'_>,
    sinks: &[(String, ChannelSink)],
) -> rusqlite::Result<()> {
    tx.execute("DELETE FROM channel_sink", [])?;
    for (name, sink) in sinks {
        tx.execute(
            "INSERT INTO channel_sink VALUES (?1, ?2)",
            (name, sink.as_str()),
        )?;
    }
    Ok(())
}
