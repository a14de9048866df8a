//! Helpers to read rows and to pass values to SQL.

use rusqlite::types::Type;

/// A stored word that this version does not know.
pub(super) fn unknown(column: usize, word: &str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(
        column,
        Type::Text,
        format!("unknown word {word:?}").into(),
    )
}

/// A row count as an SQL value.
pub(super) fn row_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
