//! A real database in a folder of its own, with its threads, for tests of what stands on it.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use payrelay::config;
use payrelay::domain::payment::{NewPayment, Payment, Reservation};
use payrelay::domain::payment_record::RecordFormat;
use payrelay::domain::timestamp::Timestamp;
use payrelay::runtime::worker::{Worker, WorkerGroup};
use payrelay::store::outbox;
use payrelay::store::publication::{self, Destination, Receipt};
use payrelay::store::{OfflineStore, OpenError, Store, payment};
use tempfile::TempDir;

use super::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(10);

/// Waits until the payrelay that works on this database has published and delivered everything. One
/// look at all tables: an event that is published and not yet consumed from the topic is in no
/// backlog.
#[track_caller]
pub fn wait_until_all_is_delivered(database: &Path, limit: Duration) {
    let untold = "SELECT count(*) FROM outbox o LEFT JOIN delivery d ON d.outbox_id = o.id \
                  WHERE o.status <> 'PUBLISHED' OR d.status IS NOT 'DELIVERED'";
    let offline = OfflineStore::open(database).expect("the database is there");
    wait_until("everything to be published and delivered", limit, || {
        offline
            .read(|connection| connection.query_row(untold, [], |row| row.get::<_, i64>(0)))
            .expect("it can be read")
            == 0
    });
}

/// An open store; dropping it stops its threads, and fails the test if they do not end.
pub struct Database {
    store: Option<Store>,
    workers: Vec<Worker>,
    dir: TempDir,
}

impl Database {
    pub fn open() -> Self {
        Self::open_in(tempfile::tempdir().expect("the machine has space for a folder"))
    }

    /// In a folder that goes with it.
    pub fn open_in(dir: TempDir) -> Self {
        let size = |number| NonZeroUsize::new(number).expect("is not zero");
        let path = dir.path().join("payrelay.db");
        let settings = config::Database {
            path,
            queue_max: size(1024),
            readers: size(2),
            min_free_bytes: 0,
        };
        // Another test may be starting a process. Until its exec that has a copy of every
        // descriptor, also of the lock file that was just closed.
        let opened = wait_for("the lock of the one before", LIMIT, || {
            match Store::open(&settings, None) {
                Err(OpenError::Locked { .. }) => None,
                opened => Some(opened.expect("the database opens")),
            }
        });
        let (store, workers) = opened
            .start(&WorkerGroup::default())
            .expect("threads start");
        Self {
            store: Some(store),
            workers,
            dir,
        }
    }

    /// Stops it; what is left is its folder.
    pub fn close(mut self) -> TempDir {
        let elsewhere = tempfile::tempdir().expect("the machine has space for a folder");
        std::mem::replace(&mut self.dir, elsewhere)
    }

    pub fn store(&self) -> &Store {
        self.store.as_ref().expect("it is open until it is dropped")
    }

    /// Pays reservations, as a client's request does.
    pub fn pay(&self, user_id: i64, reservations: impl IntoIterator<Item = i64>) -> Vec<Payment> {
        self.pay_at(Timestamp::now(), user_id, reservations)
    }

    pub fn pay_at(
        &self,
        at: Timestamp,
        user_id: i64,
        ids: impl IntoIterator<Item = i64>,
    ) -> Vec<Payment> {
        let reservations = ids
            .into_iter()
            .map(|id| Reservation {
                reservation_id: id,
                seat_price: 100,
            })
            .collect();
        let new = NewPayment {
            user_id,
            reservations,
        };
        self.store()
            .write(move |tx| payment::execute_payments(tx, &new, "KRW", None, at))
            .expect("the payment is stored")
    }

    /// Has every event arrive in the delivery table, as the application publisher does.
    pub fn publish(&self) {
        let publish = |tx: &payrelay::store::Transaction<'_>| {
            let receipt = |event: payrelay::domain::event::Event| Receipt {
                outbox_id: event.outbox_id,
                place: Destination::Delivery,
            };
            let receipts: Vec<_> =
                outbox::unpublished_outbox_events(tx, 0, usize::MAX, RecordFormat::Id)?
                    .into_iter()
                    .map(receipt)
                    .collect();
            publication::record_publications(tx, &receipts, Timestamp::now())
        };
        self.store()
            .write(publish)
            .expect("the events are published");
    }

    /// The file, for changes that no client could make.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("payrelay.db")
    }

    /// One number out of the database.
    pub fn number(&self, sql: &str) -> i64 {
        self.store()
            .read(|connection| connection.query_row(sql, [], |row| row.get(0)))
            .expect("the query is right")
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        drop(self.store.take());
        let deadline = Instant::now() + LIMIT;
        for worker in self.workers.drain(..) {
            let late = worker.stop(deadline).err();
            assert!(late.is_none() || std::thread::panicking(), "{late:?}");
        }
    }
}
