//! The node's id in the database, which never changes.

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior};

use crate::domain::node_id::NodeId;
use crate::domain::timestamp::Timestamp;

/// The stored id; the first start stores the configured one, or a random one.
pub(super) fn load_or_create_node_id(
    connection: &mut Connection,
    configured: Option<&NodeId>,
) -> rusqlite::Result<NodeId> {
    let tx = Transaction::new(connection, TransactionBehavior::Immediate)?;
    let stored: Option<String> = tx
        .query_row("SELECT id FROM node", [], |row| row.get(0))
        .optional()?;
    let id = match stored {
        Some(id) => id,
        None => create_node_id(&tx, configured)?,
    };
    tx.commit()?;
    NodeId::parse(&id).ok_or_else(|| {
        rusqlite::Error::FromSqlConversionFailure(
            0,
            rusqlite::types::Type::Text,
            "not a node id".into(),
        )
    })
}

fn create_node_id(tx: &Transaction<'_>, configured: Option<&NodeId>) -> rusqlite::Result<String> {
    let id = match configured {
        Some(id) => id.as_str().to_owned(),
        None => tx.query_row("SELECT 'n' || lower(hex(randomblob(6)))", [], |row| {
            row.get(0)
        })?,
    };
    tx.execute(
        "INSERT INTO node (id, created_at) VALUES (?1, ?2)",
        (&id, Timestamp::now().as_micros()),
    )?;
    Ok(id)
}
