//! The power fails: at any moment, what was acknowledged is on the disk.
//!
//! A run of the real binary is recorded, with every write and every sync. Then the power fails at
//! hundreds of points of it. Each time the store opens what the disk may hold.

use std::env;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use payrelay::config;
use payrelay::store::Store;
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

use super::{Acknowledged, for_at_least, kill, load, verify};
use testkit::hostile::Machine;
use testkit::hostile::disk::{Disk, Survival, lay_out};
use testkit::process::Payrelay;

/// Syncs cost nothing there, and what they do is not what is asked here.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    folder.unwrap()
}

/// Opens what is there as payrelay does, and looks into it.
fn open_and_verify(folder: &Path, acknowledged: &[Acknowledged]) {
    let path = folder.join("payrelay.db");
    let one = NonZeroUsize::MIN;
    let settings = config::Database {
        path: path.clone(),
        queue_max: one,
        readers: one,
        min_free_bytes: 0,
    };
    drop(Store::open(&settings, None).unwrap_or_else(|error| panic!("{error}")));
    let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    verify(&connection, acknowledged);
}

/// How many points, unless `HOSTILE_POINTS` says otherwise.
const POINTS: u64 = 100;

/// Fails the power at random points of what was recorded; `PAYRELAY_TEST_SEED` chooses others.
pub(super) fn fail_everywhere(machine: &Machine, acknowledged: &[Acknowledged]) -> Disk {
    let points = env::var("HOSTILE_POINTS").map_or(POINTS, |text| text.parse().unwrap());
    let seed = testkit::random::seed(|| 1);
    let journal = machine.journal();
    let length = u64::try_from(journal.len()).unwrap();
    let mut random = fastrand::Rng::with_seed(seed);
    // As many in the first megabyte, where everything is made, as one in eight.
    let mut points: Vec<u64> = (0..points)
        .map(|n| {
            random.u64(
                0..if n % 8 == 0 {
                    length.min(1 << 20)
                } else {
                    length
                },
            )
        })
        .chain([length])
        .collect();
    points.sort_unstable();
    let mut disk = Disk::new(journal);
    for point in points {
        disk.advance(usize::try_from(point).unwrap());
        let survival = match random.u8(0..8) {
            0 => Survival::Nothing,
            1 => Survival::Everything,
            2..=3 => Survival::Writes(random.f64()),
            _ => Survival::Sectors(random.f64()),
        };
        let promised: Vec<_> = acknowledged
            .iter()
            .filter(|payment| payment.journal <= point)
            .cloned()
            .collect();
        let folder = scratch();
        lay_out(&disk.crash(survival, &mut random), folder.path());
        let verified = std::panic::catch_unwind(|| open_and_verify(folder.path(), &promised));
        assert!(
            verified.is_ok(),
            "the power failed at {point} of {length} (seed {seed}), {survival:?} survived"
        );
    }
    disk
}

#[test]
fn acknowledged_payments_survive_a_power_failure_at_any_moment() {
    let machine = Machine::recorded();
    let mut acknowledged = Vec::new();
    // Killed, killed, stopped: what one process has left unsynced the next one builds on.
    for stop in ["die", "die", "TERM", "die"] {
        let mut payrelay = Payrelay::start(machine.options(&[]));
        acknowledged.extend(
            load(
                &machine,
                payrelay.addr(),
                16,
                for_at_least(Duration::from_millis(1500)),
            )
            .acknowledged,
        );
        if stop == "die" {
            kill(&machine, payrelay);
        } else {
            assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
        }
    }
    eprintln!(
        "{} payments, {} bytes",
        acknowledged.len(),
        machine.journal_length()
    );
    assert!(acknowledged.len() > 100, "{}", acknowledged.len());
    let disk = fail_everywhere(&machine, &acknowledged);
    assert!(
        disk.synced("payrelay.db") >= 2,
        "a checkpoint ran on the way: {}",
        disk.synced("payrelay.db")
    );
}
