//! Whether the disk has room, and the file is still there: with too little room, payments are
//! refused before the disk is full, so that what was taken can still be published, told and purged.
//!
//! It is asked on a thread of its own: a disk that hangs must not hang who wants to know.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{after, select_biased};
use rustix::fs::statvfs;

use super::corruption::CorruptionFlag;
use crate::runtime::health::{Health, HealthHandle};
use crate::runtime::worker::Stop;
use crate::store::error::StoreError;

/// How old the answer may be. At full load the log and the file grow by some 10 MB a second.
const INTERVAL: Duration = Duration::from_millis(250);

/// How much room there is, as the rest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DiskSpace {
    Ok,
    /// Less than twice what is needed.
    Low,
    /// Less than what is needed.
    Critical,
}

impl DiskSpace {
    /// A disk at the very edge does not change its mind with every file that comes and goes: what
    /// has been left is reached again with an eighth more.
    fn next(self, free: u64, min: u64) -> Self {
        let reached = |limit: u64, held: bool| {
            free >= if held {
                limit.saturating_add(min / 8)
            } else {
                limit
            }
        };
        if !reached(min, self == Self::Critical) {
            Self::Critical
        } else if !reached(min.saturating_mul(2), self != Self::Ok) {
            Self::Low
        } else {
            Self::Ok
        }
    }
}

/// What those who take payments see. Cloning it is cheap.
#[derive(Debug, Clone)]
pub(in crate::store) struct Admission {
    part: HealthHandle,
    short: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
}

impl Admission {
    /// Refuses while there is too little room.
    pub(in crate::store) fn check(&self) -> Result<(), StoreError> {
        if !self.short.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        Err(StoreError::Full)
    }

    pub(in crate::store) fn state(&self) -> Health {
        self.part.get()
    }
}

/// The thread's side.
pub(in crate::store) struct DiskMonitor {
    database: PathBuf,
    /// Which file that was when it was opened.
    identity: Option<(u64, u64)>,
    min: u64,
    room: DiskSpace,
    admission: Admission,
    damage: CorruptionFlag,
    statvfs_failed: bool,
}

impl DiskMonitor {
    /// Looks once, so that the first payment finds an answer.
    pub(in crate::store) fn new(
        database: &Path,
        min: u64,
        damage: CorruptionFlag,
    ) -> (Self, Admission) {
        let admission = Admission {
            part: HealthHandle::up(),
            short: Arc::default(),
            refused: Arc::default(),
        };
        let (database, identity) = (database.to_owned(), identity(database));
        let (room, statvfs_failed) = (DiskSpace::Ok, false);
        let mut watch = Self {
            database,
            identity,
            min,
            room,
            admission: admission.clone(),
            damage,
            statvfs_failed,
        };
        watch.look();
        (watch, admission)
    }

    /// Works until the stop.
    pub(in crate::store) fn run(mut self, stop: &Stop) {
        loop {
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(after(INTERVAL)) -> _ => self.look(),
            }
        }
    }

    fn look(&mut self) {
        if was_replaced(&self.database, self.identity) {
            // SQLite would go on with a file that nobody finds again.
            self.damage.set(&format!(
                "{} is not the file that was opened: it was moved or removed",
                self.database.display()
            ));
        }
        if self.min == 0 {
            return;
        }
        match statvfs(&self.database) {
            Ok(told) => {
                self.statvfs_failed = false;
                self.found(told.f_bavail.saturating_mul(told.f_frsize));
            }
            // Not a reason to refuse: the disk itself will.
            Err(error) if !self.statvfs_failed => {
                self.statvfs_failed = true;
                log::warn!("how much room the disk has cannot be told: {error}");
            }
            Err(_) => {}
        }
    }

    fn found(&mut self, free: u64) {
        let (before, min) = (self.room, self.min);
        self.room = before.next(free, min);
        let free = mib(free);
        // A line is written last: who reads it finds what it tells.
        match (before, self.room) {
            (before, now) if before == now => {}
            (_, DiskSpace::Critical) => {
                let error = format!(
                    "the disk has less than {} MiB left (database.min_free_bytes)",
                    mib(min)
                );
                self.admission.part.fail(error);
                self.admission.short.store(true, Ordering::Relaxed);
                log::error!(
                    "the disk has {free} MiB left: no payment is taken below {} \
                        (database.min_free_bytes); make room, what was taken goes on meanwhile",
                    mib(min)
                );
            }
            (DiskSpace::Critical, _) => {
                self.admission.short.store(false, Ordering::Relaxed);
                self.admission.part.recover();
                let refused = self.admission.refused.swap(0, Ordering::Relaxed);
                log::info!(
                    "the disk has {free} MiB left: payments are taken again; {refused} requests \
                        were refused"
                );
            }
            (_, DiskSpace::Low) => log::warn!(
                "the disk has {free} MiB left: below {} no payment will be taken \
                    (database.min_free_bytes); make room",
                mib(min)
            ),
            _ => log::info!("the disk has {free} MiB left, which is enough again"),
        }
    }
}

fn identity(file: &Path) -> Option<(u64, u64)> {
    fs::metadata(file).ok().map(|file| (file.dev(), file.ino()))
}

/// A look that fails says nothing of the file.
fn was_replaced(file: &Path, opened: Option<(u64, u64)>) -> bool {
    match fs::metadata(file) {
        Ok(file) => Some((file.dev(), file.ino())) != opened,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// For people.
fn mib(bytes: u64) -> String {
    let tenths = bytes / (1024 * 1024 / 10);
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_below_the_limit_and_does_not_waver_at_it() {
        use DiskSpace::{Critical, Low, Ok};
        let next = |rooms: &[u64]| {
            let mut room = Ok;
            let mut seen = Vec::new();
            for free in rooms {
                room = room.next(*free, 80);
                seen.push(room);
            }
            seen
        };
        assert_eq!(next(&[160, 159, 160, 169, 170]), [Ok, Low, Low, Low, Ok]);
        assert_eq!(
            next(&[80, 79, 80, 89, 90, 170]),
            [Low, Critical, Critical, Critical, Low, Ok]
        );
        assert_eq!(next(&[0, u64::MAX]), [Critical, Ok]);
    }

    fn watch(dir: &tempfile::TempDir, min: u64) -> (DiskMonitor, Admission, CorruptionFlag) {
        let path = dir.path().join("a.db");
        fs::write(&path, "").unwrap();
        let damage = CorruptionFlag::none();
        let (watch, admission) = DiskMonitor::new(&path, min, damage.clone());
        (watch, admission, damage)
    }

    #[test]
    fn what_is_refused_is_shown_and_ends_with_room() {
        let dir = tempfile::tempdir().unwrap();
        let (mut watch, admission, _) = watch(&dir, 1 << 20);
        watch.found(1 << 30);
        admission.check().unwrap();
        watch.found(1 << 19);
        assert!(matches!(admission.check(), Err(StoreError::Full)));
        let state = admission.state();
        assert!(state.is_failing() && state.error.unwrap().contains("less than 1.0 MiB"));
        watch.found(1 << 30);
        admission.check().unwrap();
        assert!(!admission.state().is_failing());
    }

    #[test]
    fn the_real_disk_is_asked_unless_the_limit_is_off() {
        let dir = tempfile::tempdir().unwrap();
        let (_, admission, _) = watch(&dir, 1 << 50);
        assert!(
            matches!(admission.check(), Err(StoreError::Full)),
            "nobody has a disk with a PiB of room"
        );
        let (_, admission, _) = watch(&dir, 0);
        admission.check().unwrap();
    }

    #[test]
    fn a_file_that_was_moved_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut watch, _, damage) = watch(&dir, 0);
        watch.look();
        damage.check().unwrap();
        fs::rename(dir.path().join("a.db"), dir.path().join("b.db")).unwrap();
        fs::write(dir.path().join("a.db"), "another").unwrap();
        watch.look();
        assert!(matches!(damage.check(), Err(StoreError::Damaged)));
    }
}
