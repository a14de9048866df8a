//! Databases with millions of payments, made once by SQL.

use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::path::PathBuf;

use rusqlite::Connection;

use super::{folder, print_line, start_without_kafka};
use crate::paths::target;

/// The hash of the schema: a database of an earlier one is of no use.
fn schema() -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    include_str!("../../../../schema.sql").hash(&mut hasher);
    hasher.finish()
}

/// A database with this number of payments, of a tenth as many users, all of them published and
/// delivered. It is made once, by SQL on payrelay's own schema.
pub fn grown(rows: u64) -> PathBuf {
    let path = target()
        .join("figures")
        .join(format!("grown-{rows}-{}.db", schema()));
    if path.exists() {
        return path;
    }
    fs::create_dir_all(target().join("figures")).expect("the target directory is writable");
    let dir = folder();
    assert!(start_without_kafka(dir.path(), &[]).terminate().success());
    let made = dir.path().join("payrelay.db");
    let connection = Connection::open(&made).expect("the database opens");
    print_line(&format!(
        "making a database of {rows} finished payments, once"
    ));
    connection
        .execute_batch(&insert_finished(rows))
        .expect("the statements are right");
    drop(connection);
    fs::rename(made, &path).expect("both are on one disk");
    path
}

/// SQL that makes this number of payments, all of them published and delivered.
fn insert_finished(rows: u64) -> String {
    let users = rows / 10;
    let numbers = format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})"
    );
    let at = "1700000000000000 + i";
    format!(
        "PRAGMA journal_mode = OFF;
         PRAGMA synchronous = OFF;
         PRAGMA cache_size = -1000000;
         BEGIN;
         {numbers} INSERT INTO payment
            (id, user_id, reservation_id, amount, currency, status, executed_at, previous_id)
            SELECT i, i % {users}, i, 100, 'KRW', 'COMPLETED', {at},
                iif(i > {users}, i - {users}, NULL) FROM n;
         INSERT INTO user_history (user_id, last_payment_id)
            SELECT user_id, max(id) FROM payment GROUP BY user_id;
         {numbers} INSERT INTO outbox
            (id, payment_id, user_id, type, status, created_at, published_at,
             \"partition\", \"offset\")
            SELECT i, i, i % {users}, 'payment.completed', 'PUBLISHED', {at}, {at}, 0, i FROM n;
         {numbers} INSERT INTO delivery
            (outbox_id, channel, status, attempts, created_at, delivered_at, delivered_in)
            SELECT i, 'default', 'DELIVERED', 1, {at}, {at}, 'single' FROM n;
         UPDATE node SET consumed_through = {rows};
         COMMIT;
         PRAGMA journal_mode = WAL;"
    )
}
