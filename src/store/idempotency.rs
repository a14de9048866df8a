//! Requests with an Idempotency-Key, and the ids of their payments. A payment never changes, so the
//! first response can be written again from them, byte for byte, while its key is kept.

use super::payment::{self, COLUMNS};
use super::row::row_limit;
use crate::domain::payment::Payment;
use rusqlite::{Connection, OptionalExtension, Result as SqlResult, Transaction};
use std::time::{Duration, Instant};

/// A request's key, and the hash of its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotentRequest {
    /// The client whose idempotency key it is: two clients may use the same key.
    pub client: String,
    /// The key, as the client chose it.
    pub key: String,
    /// SHA-256 of the body.
    pub body_hash: [u8; 32],
}

/// How long this database has been served: the time since the start, plus the arrival of the newest
/// key before it. It never jumps, and stands still while payrelay is stopped.
#[derive(Debug, Clone, Copy)]
pub struct IdempotencyClock {
    before: Duration,
    started: Instant,
}

impl IdempotencyClock {
    pub(super) fn resume(connection: &Connection) -> SqlResult<Self> {
        let newest: Option<i64> = connection
            .prepare(
                "SELECT arrived_at FROM idempotency_key WHERE id > 0 ORDER BY id DESC LIMIT 1",
            )?
            .query_row([], |row| row.get(0))
            .optional()?;
        let before =
            Duration::from_micros(newest.and_then(|at| u64::try_from(at).ok()).unwrap_or(0));
        Ok(Self {
            before,
            started: Instant::now(),
        })
    }

    pub(super) fn now(&self) -> Duration {
        self.before + self.started.elapsed()
    }
}

fn idempotency_key_micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

/// The outcome of a request with a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdempotentOutcome {
    /// It was executed now.
    Executed(Vec<Payment>),
    /// It was executed before: these are the first payments.
    Replayed(Vec<Payment>),
    /// The key belongs to another body.
    KeyReused,
}

/// The stored first request that used a key.
struct StoredKey {
    body_hash: Vec<u8>,
    first_payment_id: i64,
    payment_count: i64,
}

/// Executes the payments, unless the same request was executed before: then returns its payments.
/// The key is stored in the same transaction, and never more than `keys_max` keys are.
pub fn execute_once_per_key(
    tx: &Transaction<'_>,
    request: &IdempotentRequest,
    keys_max: usize,
    arrived_at: Duration,
    pay: impl FnOnce() -> SqlResult<Vec<Payment>>,
) -> SqlResult<IdempotentOutcome> {
    match find_idempotency_key(tx, request)? {
        Some(stored) if stored.body_hash == request.body_hash => {
            payments_of_idempotency_key(tx, &stored).map(IdempotentOutcome::Replayed)
        }
        Some(_) => Ok(IdempotentOutcome::KeyReused),
        None => {
            let payments = pay()?;
            insert_idempotency_key(tx, request, &payments, arrived_at)?;
            // One in, one out: between two purges there are never more keys.
            if count_idempotency_keys(tx)? > row_limit(keys_max) {
                tx.prepare_cached(
                    "DELETE FROM idempotency_key WHERE id = (SELECT id FROM idempotency_key \
                        WHERE id > 0 ORDER BY id LIMIT 1)",
                )?
                .execute([])?;
            }
            Ok(IdempotentOutcome::Executed(payments))
        }
    }
}

fn find_idempotency_key(
    tx: &Transaction<'_>,
    request: &IdempotentRequest,
) -> SqlResult<Option<StoredKey>> {
    tx.prepare_cached(
        "SELECT body_hash, first_payment_id, payment_count FROM idempotency_key WHERE client = ?1 \
            AND \"key\" = ?2",
    )?
    .query_row((&request.client, &request.key), |row| {
        Ok(StoredKey {
            body_hash: row.get(0)?,
            first_payment_id: row.get(1)?,
            payment_count: row.get(2)?,
        })
    })
    .optional()
}

fn insert_idempotency_key(
    tx: &Transaction<'_>,
    request: &IdempotentRequest,
    payments: &[Payment],
    arrived_at: Duration,
) -> SqlResult<()> {
    let Some(first) = payments.first() else {
        return Ok(());
    };
    tx.prepare_cached(
        "INSERT INTO idempotency_key (client, \"key\", body_hash, first_payment_id, \
            payment_count, arrived_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute((
        &request.client,
        &request.key,
        request.body_hash,
        first.id,
        row_limit(payments.len()),
        idempotency_key_micros(arrived_at),
    ))?;
    Ok(())
}

/// The payments of a request have consecutive ids: one transaction, one writer.
fn payments_of_idempotency_key(
    tx: &Transaction<'_>,
    stored: &StoredKey,
) -> SqlResult<Vec<Payment>> {
    tx.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM payment p WHERE p.id >= ?1 AND p.id < ?1 + ?2 ORDER BY p.id"
    ))?
    .query_map(
        (stored.first_payment_id, stored.payment_count),
        payment::read_payment_row,
    )?
    .collect()
}

/// How many keys are stored: the highest id minus the lowest, plus one. That is exact, because ids
/// have no gaps and the lowest are deleted first.
pub fn count_idempotency_keys(connection: &Connection) -> SqlResult<i64> {
    let end = |sql: &str| {
        connection
            .prepare_cached(sql)?
            .query_row([], |row| row.get(0))
            .optional()
    };
    let first: Option<i64> =
        end("SELECT id FROM idempotency_key WHERE id > 0 ORDER BY id LIMIT 1")?;
    let last: Option<i64> =
        end("SELECT id FROM idempotency_key WHERE id > 0 ORDER BY id DESC LIMIT 1")?;
    Ok(first.zip(last).map_or(0, |(first, last)| last - first + 1))
}

/// Deletes at most `limit` keys, oldest first: those that arrived before `cutoff`, and those in
/// excess of `keys_max`. Returns how many.
pub fn purge_idempotency_keys(
    tx: &Transaction<'_>,
    cutoff: Duration,
    keys_max: usize,
    limit: usize,
) -> SqlResult<usize> {
    let surplus = count_idempotency_keys(tx)?.saturating_sub(row_limit(keys_max));
    let oldest: Vec<(i64, i64)> = tx
        .prepare_cached(
            "SELECT id, arrived_at FROM idempotency_key WHERE id > 0 ORDER BY id LIMIT ?1",
        )?
        .query_map([row_limit(limit)], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<SqlResult<_>>()?;
    let first = oldest.first().map_or(0, |(id, _)| *id);
    let mut delete = tx.prepare_cached("DELETE FROM idempotency_key WHERE id = ?1")?;
    let mut deleted = 0;
    for (id, arrived_at) in oldest {
        if arrived_at >= idempotency_key_micros(cutoff) && id - first >= surplus {
            break;
        }
        delete.execute([id])?;
        deleted += 1;
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::payment::{NewPayment, Reservation};
    use crate::domain::timestamp::Timestamp;
    use crate::store::engine::open;
    use crate::store::payment;
    use rusqlite::TransactionBehavior;

    const KEYS_MAX: usize = 10;

    fn idempotent_request(client: &str, key: &str, body: u8) -> IdempotentRequest {
        IdempotentRequest {
            client: client.into(),
            key: key.into(),
            body_hash: [body; 32],
        }
    }

    fn pay_with_idempotency_key(
        tx: &Transaction<'_>,
        request: &IdempotentRequest,
        now: u32,
    ) -> Option<Vec<Payment>> {
        let reservations = (1..=3)
            .map(|id| Reservation {
                reservation_id: id,
                seat_price: 5,
            })
            .collect();
        let new = NewPayment {
            user_id: 7,
            reservations,
        };
        let arrived_at = Duration::from_micros(now.into());
        let now = Timestamp::from_micros(now.into());
        match execute_once_per_key(tx, request, KEYS_MAX, arrived_at, || {
            payment::execute_payments(tx, &new, "KRW", None, now)
        })
        .unwrap()
        {
            IdempotentOutcome::Executed(payments) | IdempotentOutcome::Replayed(payments) => {
                Some(payments)
            }
            IdempotentOutcome::KeyReused => None,
        }
    }

    fn with_idempotency_keys(test: impl FnOnce(Transaction<'_>)) {
        let dir = tempfile::tempdir().unwrap();
        let (mut connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        test(Transaction::new(&mut connection, TransactionBehavior::Immediate).unwrap());
    }

    #[test]
    fn an_idempotency_key_has_one_response_for_one_client_and_one_body() {
        with_idempotency_keys(|tx| {
            let first =
                pay_with_idempotency_key(&tx, &idempotent_request("", "k", 1), 100).unwrap();
            assert_eq!(
                first.iter().map(|payment| payment.id).collect::<Vec<_>>(),
                [1, 2, 3]
            );
            let second =
                pay_with_idempotency_key(&tx, &idempotent_request("", "l", 1), 200).unwrap();
            assert!(second.iter().all(|payment| payment.failure.is_some()));
            assert_eq!(
                pay_with_idempotency_key(&tx, &idempotent_request("", "k", 1), 300),
                Some(first)
            );
            assert_eq!(
                pay_with_idempotency_key(&tx, &idempotent_request("", "l", 1), 300),
                Some(second),
                "also for FAILED payments"
            );
            assert_eq!(
                pay_with_idempotency_key(&tx, &idempotent_request("", "k", 2), 300),
                None
            );
            assert_eq!(
                pay_with_idempotency_key(&tx, &idempotent_request("other", "k", 2), 300).unwrap()
                    [0]
                .id,
                7
            );
            assert_eq!(count_idempotency_keys(&tx).unwrap(), 3);
        });
    }

    #[test]
    fn a_rolled_back_request_leaves_no_idempotency_key() {
        with_idempotency_keys(|tx| {
            tx.execute_batch("SAVEPOINT job").unwrap();
            pay_with_idempotency_key(&tx, &idempotent_request("", "k", 1), 100).unwrap();
            tx.execute_batch("ROLLBACK TO job; RELEASE job").unwrap();
            assert_eq!(count_idempotency_keys(&tx).unwrap(), 0);
            assert_eq!(
                pay_with_idempotency_key(&tx, &idempotent_request("", "k", 2), 200).unwrap()[0].id,
                1
            );
        });
    }

    #[test]
    fn the_number_of_idempotency_keys_is_bounded_and_the_oldest_are_deleted_first() {
        with_idempotency_keys(|tx| {
            for number in 0..25 {
                pay_with_idempotency_key(
                    &tx,
                    &idempotent_request("", &number.to_string(), 1),
                    100 + number,
                )
                .unwrap();
                assert!(count_idempotency_keys(&tx).unwrap() <= 10);
            }
            let kept: Vec<String> = tx
                .prepare("SELECT \"key\" FROM idempotency_key ORDER BY id")
                .unwrap()
                .query_map([], |row| row.get(0))
                .unwrap()
                .map(Result::unwrap)
                .collect();
            assert_eq!(
                kept,
                (15..25)
                    .map(|number| number.to_string())
                    .collect::<Vec<_>>()
            );
        });
    }

    #[test]
    fn the_purge_deletes_old_and_excess_idempotency_keys_in_batches() {
        with_idempotency_keys(|tx| {
            for number in 0..10 {
                pay_with_idempotency_key(
                    &tx,
                    &idempotent_request("", &number.to_string(), 1),
                    100 + number,
                )
                .unwrap();
            }
            let purge = |cutoff, keys_max, limit| {
                purge_idempotency_keys(&tx, Duration::from_micros(cutoff), keys_max, limit).unwrap()
            };
            assert_eq!(purge(100, 10, 5), 0);
            assert_eq!(purge(103, 10, 2), 2);
            assert_eq!(purge(103, 10, 2), 1);
            assert_eq!(purge(0, 4, 2), 2);
            assert_eq!(purge(0, 4, 2), 1);
            assert_eq!(
                (purge(0, 4, 2), count_idempotency_keys(&tx).unwrap()),
                (0, 4)
            );
            assert_eq!(purge(1000, 4, 100), 4);
            assert_eq!(count_idempotency_keys(&tx).unwrap(), 0);
        });
    }

    #[test]
    fn the_age_of_an_idempotency_key_depends_on_no_system_clock() {
        let dir = tempfile::tempdir().unwrap();
        let (connection, _) = open::open_database(&dir.path().join("a.db"), None).unwrap();
        let first = IdempotencyClock::resume(&connection).unwrap();
        assert!(
            first.now() < Duration::from_mins(1),
            "a new database has no service time"
        );
        let insert = "INSERT INTO idempotency_key (client, key, body_hash, first_payment_id, \
            payment_count, arrived_at) VALUES ('', ?1, x'', 0, 0, ?2)";
        connection
            .pragma_update(None, "foreign_keys", false)
            .unwrap();
        // Independent of the clock, this key arrived after seven hours of service, and the next
        // ones arrive later.
        connection
            .execute(insert, ("old", 7 * 3600 * 1_000_000_i64))
            .unwrap();
        let resumed = IdempotencyClock::resume(&connection).unwrap();
        assert!(
            resumed.now() >= Duration::from_hours(7) && resumed.now() < Duration::from_hours(8)
        );
        assert!(resumed.now() <= resumed.now(), "it never goes back");
    }
}
