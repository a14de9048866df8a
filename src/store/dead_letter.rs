//! Records of the topic that are not ours or cannot be read, kept as they came, with the reason and the place.

use rusqlite::{Connection, Transaction};

use crate::clock::Timestamp;

/// A record that was kept aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where it was read.
    pub topic: String,
    /// Where on the topic.
    pub partition: i32,
    /// Where in the partition.
    pub offset: i64,
    /// Why it was kept aside.
    pub reason: String,
    /// As it came.
    pub key: Option<Vec<u8>>,
    /// As it came.
    pub value: Option<Vec<u8>>,
    /// Names and values; what is no text is shown with replacement characters.
    pub headers: Vec<(String, Option<String>)>,
}

/// Keeps a record. Keeping it again changes nothing.
pub fn insert(tx: &Transaction<'_>, letter: &DeadLetter, now: Timestamp) -> rusqlite::Result<()> {
    let headers = serde_json::to_string(&letter.headers)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
    tx.prepare_cached(
        "INSERT INTO dead_letter (topic, \"partition\", \"offset\", reason, \"key\", value, headers, received_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT DO NOTHING",
    )?
    .execute((
        &letter.topic,
        letter.partition,
        letter.offset,
        &letter.reason,
        &letter.key,
        &letter.value,
        headers,
        now.as_micros(),
    ))?;
    Ok(())
}

/// How many are kept.
pub(super) fn count(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("SELECT count(*) FROM dead_letter")?.query_row([], |row| row.get(0))
}
