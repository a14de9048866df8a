//! Enums of the domain and the store as values of SQL: each is stored as its text.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};

use super::channel_action::ChannelActionKind;
use super::channel_sink::ChannelSink;
use super::dead_letter::{DeadLetterAction, DeadLetterState};
use super::delivery::{Carrier, DeliveryStatus};
use super::outbox::EventStatus;
use crate::domain::event::EventType;
use crate::domain::node_role::NodeRole;
use crate::domain::payment::Status;

/// Stores an enum as its text. A text that this version does not know is an error.
macro_rules! stored_as_text {
    ($($name:ty),+ $(,)?) => {$(
        impl ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                Ok(self.as_str().into())
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                let text = value.as_str()?;
                Self::parse(text).ok_or_else(|| {
                    FromSqlError::Other(format!("unknown word {text:?}").into())
                })
            }
        }
    )+};
}

stored_as_text!(
    Carrier,
    ChannelActionKind,
    ChannelSink,
    DeadLetterAction,
    DeadLetterState,
    DeliveryStatus,
    EventStatus,
    NodeRole,
    EventType,
    Status,
);

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    #[test]
    fn a_stored_text_is_read_back_and_an_unknown_one_is_an_error() {
        let connection = Connection::open_in_memory().unwrap();
        let read = |text: &dyn ToSql| {
            connection.query_row("SELECT ?1", [text], |row| row.get::<_, DeliveryStatus>(0))
        };
        for status in DeliveryStatus::ALL {
            assert_eq!(read(status).unwrap(), *status);
        }
        let error = read(&"LOST").unwrap_err().to_string();
        assert!(error.contains("unknown word \"LOST\""), "{error}");
    }
}
