//! The number of rows as a value of SQL.

/// A row count as an SQL value.
pub(super) fn row_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
