//! How fast the disk syncs: each commit waits for one sync.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Checks, Verdict};
use crate::cli::table::show_age;

/// With slower syncs a single client waits noticeably.
const P50_MAX: Duration = Duration::from_millis(10);

/// With slower syncs clients run into their time limits.
const P99_MAX: Duration = Duration::from_millis(100);

/// As much as a small commit writes.
const BLOCK: [u8; 4096] = [0x5a; 4096];

/// A scratch file. Dropping it removes it.
struct ScratchFile {
    path: PathBuf,
    file: File,
}

impl ScratchFile {
    fn create(folder: &Path) -> io::Result<Self> {
        let path = folder.join(format!(".payrelay-doctor-{}", std::process::id()));
        let mut options = File::options();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Self { path, file })
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Measures for some seconds.
pub(super) fn check_sync(checks: &mut Checks, folder: &Path, seconds: u64) {
    match measure_syncs(folder, Duration::from_secs(seconds)) {
        Ok(times) => {
            let (verdict, detail) = judge_syncs(&times);
            checks.add(verdict, "disk", detail);
        }
        Err(error) => {
            let detail = format!("{} cannot be written: {error}", folder.display());
            checks.add(Verdict::Fail, "disk", detail);
        }
    }
}

/// The duration of each sync, in order of their size.
fn measure_syncs(folder: &Path, limit: Duration) -> io::Result<Vec<Duration>> {
    let mut scratch = ScratchFile::create(folder)?;
    let mut times = Vec::new();
    let started = Instant::now();
    while started.elapsed() < limit || times.is_empty() {
        let begun = Instant::now();
        scratch.file.write_all(&BLOCK)?;
        scratch.file.sync_data()?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

fn judge_syncs(times: &[Duration]) -> (Verdict, String) {
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    let p50 = at(50);
    let p99 = at(99);
    let verdict = if p50 > P50_MAX || p99 > P99_MAX {
        Verdict::Slow
    } else {
        Verdict::Ok
    };
    let per_second = Duration::from_secs(1).as_nanos() / p50.as_nanos().max(1);
    let detail = format!(
        "a sync takes {} at p50, {} at p99: some {per_second} commits a second; each carries the \
            payments of all requests that wait",
        show_sync(p50),
        show_sync(p99)
    );
    (verdict, detail)
}

fn show_sync(time: Duration) -> String {
    if time < Duration::from_millis(1) {
        format!("{} µs", time.as_micros())
    } else {
        show_age(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_judged_by_its_usual_and_its_slowest_syncs() {
        let judge = |ms: &[u64]| {
            let times: Vec<_> = ms.iter().copied().map(Duration::from_millis).collect();
            judge_syncs(&times)
        };
        let (verdict, detail) = judge(&[2]);
        assert_eq!(verdict, Verdict::Ok);
        assert!(
            detail.contains("2 ms at p50") && detail.contains("some 500 commits"),
            "{detail}"
        );
        assert_eq!(judge(&[18, 18, 18]).0, Verdict::Slow);
        let mut times = vec![1; 98];
        times.extend([200, 200]);
        assert_eq!(judge(&times).0, Verdict::Slow);
    }

    #[test]
    fn the_measurement_of_a_disk_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let times = measure_syncs(dir.path(), Duration::ZERO).unwrap();
        assert_eq!(times.len(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
