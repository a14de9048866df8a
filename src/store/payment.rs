//! Payments, their history, and the outbox rows that are written with them.

use super::outbox::{INSERT_OUTBOX_EVENT, insert_outbox_row};
use crate::domain::event::EventType;
use crate::domain::payment::{NewPayment, Payment, Reservation, Status};
use crate::domain::timestamp::Timestamp;
use crate::domain::trace_context::TraceContext;
use rusqlite::ffi::SQLITE_CONSTRAINT_UNIQUE;
use rusqlite::{Connection, OptionalExtension, Result as SqlResult, Row, Statement, Transaction};

/// The reason of a FAILED payment: the reservation already has a COMPLETED one.
const ALREADY_PAID: &str = "already paid";

/// Executes a request: stores, for each reservation, a COMPLETED or FAILED payment, its history and
/// its event. An error rolls back all of it; a FAILED payment is no error of the request.
pub fn execute_payments(
    tx: &Transaction<'_>,
    new: &NewPayment,
    currency: &str,
    trace: Option<&TraceContext>,
    now: Timestamp,
) -> SqlResult<Vec<Payment>> {
    let mut previous = last_payment_of_user(tx, new.user_id)?;
    let mut payments = Vec::with_capacity(new.reservations.len());
    let mut insert_payment = tx.prepare_cached(INSERT_PAYMENT)?;
    let mut insert_event = tx.prepare_cached(INSERT_OUTBOX_EVENT)?;
    for reservation in &new.reservations {
        let mut payment = new_payment_row(new.user_id, reservation, currency, now);
        if insert_payment_row(&mut insert_payment, &payment, previous)?
            == PaymentInsert::AlreadyPaid
        {
            payment.status = Status::Failed;
            payment.failure = Some(ALREADY_PAID.to_owned());
            payment.paid_by = payment_that_paid(tx, payment.reservation_id)?;
            insert_payment_row(&mut insert_payment, &payment, previous)?;
        }
        payment.id = tx.last_insert_rowid();
        let kind = EventType::from(payment.status);
        insert_outbox_row(
            &mut insert_event,
            (payment.id, payment.user_id),
            kind,
            trace,
            now,
        )?;
        previous = Some(payment.id);
        payments.push(payment);
    }
    tx.prepare_cached(
        "INSERT INTO user_history (user_id, last_payment_id) VALUES (?1, ?2) \
         ON CONFLICT (user_id) DO UPDATE SET last_payment_id = excluded.last_payment_id",
    )?
    .execute((new.user_id, previous))?;
    Ok(payments)
}

/// When the last payment was executed.
pub fn last_payment_time(connection: &Connection) -> SqlResult<Option<Timestamp>> {
    connection
        .prepare_cached("SELECT executed_at FROM payment WHERE id = (SELECT max(id) FROM payment)")?
        .query_row([], |row| row.get(0).map(Timestamp::from_micros))
        .optional()
}

fn last_payment_of_user(connection: &Connection, user_id: i64) -> SqlResult<Option<i64>> {
    connection
        .prepare_cached("SELECT last_payment_id FROM user_history WHERE user_id = ?1")?
        .query_row([user_id], |row| row.get(0))
        .optional()
}

/// A payment that is not inserted yet, and may turn out FAILED.
fn new_payment_row(
    user_id: i64,
    reservation: &Reservation,
    currency: &str,
    now: Timestamp,
) -> Payment {
    Payment {
        id: 0,
        user_id,
        reservation_id: reservation.reservation_id,
        amount: reservation.seat_price,
        currency: currency.to_owned(),
        status: Status::Completed,
        failure: None,
        paid_by: None,
        executed_at: now,
    }
}

/// The payment that has paid a reservation.
fn payment_that_paid(connection: &Connection, reservation_id: i64) -> SqlResult<Option<i64>> {
    connection
        .prepare_cached(
            "SELECT id FROM payment WHERE reservation_id = ?1 AND status = 'COMPLETED'",
        )?
        .query_row([reservation_id], |row| row.get(0))
        .optional()
}

/// The COMPLETED payment of a reservation, if there is one.
pub fn find_payment_of_reservation(
    connection: &Connection,
    reservation_id: i64,
) -> SqlResult<Option<Payment>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM payment p WHERE p.reservation_id = ?1 AND p.status = 'COMPLETED'"
        ))?
        .query_row([reservation_id], read_payment_row)
        .optional()
}

/// The outcome of inserting a payment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PaymentInsert {
    Inserted,
    /// The reservation has a COMPLETED payment.
    AlreadyPaid,
}

const INSERT_PAYMENT: &str = "INSERT INTO payment (user_id, reservation_id, amount, currency, \
    status, failure, executed_at, previous_id) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";

/// Inserts a payment. The partial unique index reports a reservation that is already paid.
fn insert_payment_row(
    insert: &mut Statement<'_>,
    payment: &Payment,
    previous: Option<i64>,
) -> SqlResult<PaymentInsert> {
    let inserted = insert.execute((
        payment.user_id,
        payment.reservation_id,
        payment.amount,
        &payment.currency,
        payment.status,
        &payment.failure,
        payment.executed_at.as_micros(),
        previous,
    ));
    match inserted {
        Ok(_) => Ok(PaymentInsert::Inserted),
        Err(rusqlite::Error::SqliteFailure(error, _))
            if error.extended_code == SQLITE_CONSTRAINT_UNIQUE =>
        {
            Ok(PaymentInsert::AlreadyPaid)
        }
        Err(error) => Err(error),
    }
}

/// A page of a user's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HistoryPage {
    /// Payments, newest first.
    Payments(Vec<Payment>),
    /// The page has no beginning: its payment is not one of this user.
    NotOfUser,
}

/// At most `limit` payments of a user, from the one before payment `before`, or from the newest.
pub fn payment_history(
    connection: &Connection,
    user_id: i64,
    before: Option<i64>,
    limit: usize,
) -> SqlResult<HistoryPage> {
    let mut step = connection.prepare_cached(&format!(
        "SELECT {COLUMNS}, p.previous_id FROM payment p WHERE p.id = ?1 AND p.user_id = ?2"
    ))?;
    let mut at = |id| {
        step.query_row((id, user_id), |row| {
            Ok((
                read_payment_row(row)?,
                row.get::<_, Option<i64>>(COLUMN_COUNT)?,
            ))
        })
        .optional()
    };
    let mut next = match before {
        None => last_payment_of_user(connection, user_id)?,
        Some(before) => match at(before)? {
            Some((_, previous)) => previous,
            None => return Ok(HistoryPage::NotOfUser),
        },
    };
    let mut payments = Vec::new();
    while let Some(id) = next.filter(|_| payments.len() < limit) {
        let Some((payment, previous)) = at(id)? else {
            break;
        };
        payments.push(payment);
        next = previous;
    }
    Ok(HistoryPage::Payments(payments))
}

/// The columns that [`read_payment_row`] expects, from a table `p`. For a FAILED payment they name
/// the payment that has paid its reservation, found by the index `payment_paid`.
pub(super) const COLUMNS: &str = "p.id, p.user_id, p.reservation_id, p.amount, p.currency, \
    p.status, p.failure, p.executed_at, \
    CASE WHEN p.status = 'FAILED' THEN (SELECT paid.id FROM payment paid \
    WHERE paid.reservation_id = p.reservation_id AND paid.status = 'COMPLETED') END";

/// The number of [`COLUMNS`].
pub(super) const COLUMN_COUNT: usize = 9;

/// A payment from the first columns of a row.
pub(super) fn read_payment_row(row: &Row<'_>) -> SqlResult<Payment> {
    Ok(Payment {
        id: row.get(0)?,
        user_id: row.get(1)?,
        reservation_id: row.get(2)?,
        amount: row.get(3)?,
        currency: row.get(4)?,
        status: row.get(5)?,
        failure: row.get(6)?,
        executed_at: Timestamp::from_micros(row.get(7)?),
        paid_by: row.get(8)?,
    })
}
