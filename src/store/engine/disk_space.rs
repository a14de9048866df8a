//! Watches the free space of the disk, and whether the file still exists. With too little space,
//! payments are refused before the disk is full, so that stored events can still be published,
//! delivered and purged.
//!
//! It watches on a thread of its own: a disk that hangs must not hang its readers.

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
use super::files::sibling_file;
use crate::runtime::health::{Health, HealthHandle};
use crate::runtime::worker::Stop;
use crate::store::error::StoreError;

/// How old the result may be. At full load the WAL and the file grow by some 10 MB a second.
const INTERVAL: Duration = Duration::from_millis(250);

/// The sizes of a database's files, and the free space of their disk, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct FileSizes {
    /// The database.
    pub database_bytes: u64,
    /// Its WAL.
    pub wal_bytes: u64,
    /// Free for payrelay's user; `None`: unknown.
    pub disk_free_bytes: Option<u64>,
}

impl FileSizes {
    /// The sizes now. A missing file has none.
    pub fn of_database(database: &Path) -> Self {
        let length = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
        Self {
            database_bytes: length(database),
            wal_bytes: length(&sibling_file(database, "-wal")),
            disk_free_bytes: statvfs(database)
                .ok()
                .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize)),
        }
    }
}

/// How much free space there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DiskSpace {
    Ok,
    /// Less than twice the minimum.
    Low,
    /// Less than the minimum.
    Critical,
}

impl DiskSpace {
    /// A worse level ends only with an eighth more free space than it began with. So temporary
    /// files do not switch the level to and fro.
    fn next_level(self, free: u64, min: u64) -> Self {
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

/// The result, for the threads that accept payments. Cloning it is cheap.
#[derive(Debug, Clone)]
pub(in crate::store) struct DiskAdmission {
    health: HealthHandle,
    short: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
}

impl DiskAdmission {
    /// Refuses while there is too little free space.
    pub(in crate::store) fn check(&self) -> Result<(), StoreError> {
        if !self.short.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        Err(StoreError::Full)
    }

    pub(in crate::store) fn state(&self) -> Health {
        self.health.get()
    }
}

/// The thread's side.
pub(in crate::store) struct DiskMonitor {
    database: PathBuf,
    /// The device and inode of the file that was opened.
    opened: Option<(u64, u64)>,
    min: u64,
    space: DiskSpace,
    admission: DiskAdmission,
    damage: CorruptionFlag,
    statvfs_failed: bool,
}

impl DiskMonitor {
    /// Checks once, so that the first payment finds a result.
    pub(in crate::store) fn new(
        database: &Path,
        min: u64,
        damage: CorruptionFlag,
    ) -> (Self, DiskAdmission) {
        let admission = DiskAdmission {
            health: HealthHandle::up(),
            short: Arc::default(),
            refused: Arc::default(),
        };
        let mut monitor = Self {
            database: database.to_owned(),
            opened: fs::metadata(database)
                .ok()
                .map(|file| (file.dev(), file.ino())),
            min,
            space: DiskSpace::Ok,
            admission: admission.clone(),
            damage,
            statvfs_failed: false,
        };
        monitor.check_disk();
        (monitor, admission)
    }

    /// Runs until a stop is requested.
    pub(in crate::store) fn run(mut self, stop: &Stop) {
        loop {
            stop.beat();
            select_biased! {
                recv(stop.signal()) -> _ => return,
                recv(after(INTERVAL)) -> _ => self.check_disk(),
            }
        }
    }

    fn check_disk(&mut self) {
        if self.file_was_replaced() {
            // SQLite would continue with a file that no process finds again.
            self.damage.set(&format!(
                "{} is not the file that was opened: it was moved or removed",
                self.database.display()
            ));
        }
        if self.min == 0 {
            return;
        }
        match statvfs(&self.database) {
            Ok(stat) => {
                self.statvfs_failed = false;
                self.apply_free_space(stat.f_bavail.saturating_mul(stat.f_frsize));
            }
            // The free space is unknown, so payments are accepted. On a full disk the write fails.
            Err(error) if !self.statvfs_failed => {
                self.statvfs_failed = true;
                log::warn!(
                    event = "disk_unknown";
                    "the free space of the disk is unknown: {error}"
                );
            }
            Err(_) => {}
        }
    }

    /// An error says nothing about the file.
    fn file_was_replaced(&self) -> bool {
        match fs::metadata(&self.database) {
            Ok(file) => Some((file.dev(), file.ino())) != self.opened,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    fn apply_free_space(&mut self, free: u64) {
        let before = self.space;
        let min = self.min;
        self.space = before.next_level(free, min);
        let free = disk_space_in_mib(free);
        // The line is logged last, so that its reader finds the new state in effect.
        match (before, self.space) {
            (before, now) if before == now => {}
            (_, DiskSpace::Critical) => {
                let error = format!(
                    "the disk has less than {} MiB free (database.min_free_bytes)",
                    disk_space_in_mib(min)
                );
                self.admission.health.fail(error);
                self.admission.short.store(true, Ordering::Relaxed);
                log::error!(
                    event = "disk_critical", free_mib = free;
                    "disk space critical: {free} MiB free, minimum {} \
                        (database.min_free_bytes); rejecting payments with 507, stored ones \
                        continue",
                    disk_space_in_mib(min)
                );
            }
            (DiskSpace::Critical, _) => {
                self.admission.short.store(false, Ordering::Relaxed);
                self.admission.health.recover();
                let refused = self.admission.refused.swap(0, Ordering::Relaxed);
                log::info!(
                    event = "disk_accepting_again", free_mib = free, refused = refused;
                    "the disk has {free} MiB free: accepting payments again; {refused} requests \
                        were refused"
                );
            }
            (_, DiskSpace::Low) => log::warn!(
                event = "disk_low", free_mib = free;
                "disk space low: {free} MiB free, below {} payments will be rejected \
                    (database.min_free_bytes); free space",
                disk_space_in_mib(min)
            ),
            _ => log::info!(
                event = "disk_enough", free_mib = free;
                "the disk has {free} MiB free: enough again"
            ),
        }
    }
}

fn disk_space_in_mib(bytes: u64) -> String {
    let tenths = bytes / (1024 * 1024 / 10);
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_space_levels_have_hysteresis() {
        use DiskSpace::{Critical, Low, Ok};
        let next = |free_bytes: &[u64]| {
            let mut space = Ok;
            let mut seen = Vec::new();
            for free in free_bytes {
                space = space.next_level(*free, 80);
                seen.push(space);
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

    fn disk_monitor(
        dir: &tempfile::TempDir,
        min: u64,
    ) -> (DiskMonitor, DiskAdmission, CorruptionFlag) {
        let path = dir.path().join("a.db");
        fs::write(&path, "").unwrap();
        let damage = CorruptionFlag::none();
        let (monitor, admission) = DiskMonitor::new(&path, min, damage.clone());
        (monitor, admission, damage)
    }

    #[test]
    fn a_full_disk_is_shown_until_space_is_freed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut monitor, admission, _) = disk_monitor(&dir, 1 << 20);
        monitor.apply_free_space(1 << 30);
        admission.check().unwrap();
        monitor.apply_free_space(1 << 19);
        assert!(matches!(admission.check(), Err(StoreError::Full)));
        let state = admission.state();
        assert!(state.is_failing() && state.error.unwrap().contains("less than 1.0 MiB"));
        monitor.apply_free_space(1 << 30);
        admission.check().unwrap();
        assert!(!admission.state().is_failing());
    }

    #[test]
    fn the_free_disk_space_is_checked_unless_the_limit_is_off() {
        let dir = tempfile::tempdir().unwrap();
        let (_, admission, _) = disk_monitor(&dir, 1 << 50);
        assert!(
            matches!(admission.check(), Err(StoreError::Full)),
            "no disk has a PiB of free space"
        );
        let (_, admission, _) = disk_monitor(&dir, 0);
        admission.check().unwrap();
    }

    #[test]
    fn the_disk_monitor_notices_a_file_that_was_moved() {
        let dir = tempfile::tempdir().unwrap();
        let (mut monitor, _, damage) = disk_monitor(&dir, 0);
        monitor.check_disk();
        damage.check().unwrap();
        fs::rename(dir.path().join("a.db"), dir.path().join("b.db")).unwrap();
        fs::write(dir.path().join("a.db"), "another").unwrap();
        monitor.check_disk();
        assert!(matches!(damage.check(), Err(StoreError::Damaged)));
    }
}
