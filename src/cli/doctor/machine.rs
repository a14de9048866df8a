//! The file system of the database, and other processes that have it open, from /proc.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Checks, Verdict};
use payrelay::store::local_socket::database_lock_holder;

/// File systems of other machines: SQLite's locks and its shared memory need one machine.
const REMOTE: [&str; 8] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "ceph",
    "fuse.sshfs",
    "glusterfs",
];

/// File systems in memory: nothing on them survives the power.
const MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

pub(super) fn check_file_system(checks: &mut Checks, folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let whole = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let Some((kind, source)) = mount_of_path(&mounts, &whole) else {
        return checks.add(
            Verdict::Note,
            "file system",
            "unknown: /proc does not show it",
        );
    };
    let (verdict, advice) = if REMOTE.contains(&kind) {
        (Verdict::Fail, ": a database needs a local file system")
    } else if MEMORY.contains(&kind) {
        (
            Verdict::Fail,
            ": it is memory, and nothing survives the power",
        )
    } else {
        (Verdict::Ok, "")
    };
    checks.add(
        verdict,
        "file system",
        format!("{kind} on {source}{advice}"),
    );
}

/// The type and the source of the mount that has a path (`proc_pid_mountinfo(5)`): the longest
/// mount point, and of two the later one.
fn mount_of_path<'a>(mounts: &'a str, path: &Path) -> Option<(&'a str, &'a str)> {
    let found = mounts.lines().filter_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let point = place.split(' ').nth(4)?;
        let mut words = kind.split(' ');
        let mount = (words.next()?, words.next()?);
        path.starts_with(point).then_some((point.len(), mount))
    });
    found
        .max_by_key(|(length, _)| *length)
        .map(|(_, mount)| mount)
}

/// Another program that has the database open may hold its locks, or copy it.
pub(super) fn check_other_processes(checks: &mut Checks, database: &Path) {
    let Ok(file) = fs::canonicalize(database) else {
        return;
    };
    let holder = database_lock_holder(database).ok().flatten();
    let own = std::process::id().to_string();
    for (id, name) in processes_with_file(&file) {
        if id != own && Some(&id) != holder.as_ref() {
            let advice = advice_on_process(&name);
            let detail = format!("{name} (process {id}) has the database open{advice}");
            checks.add(Verdict::Note, "other processes", detail);
        }
    }
}

/// litestream's earlier versions and payrelay's checkpoints hinder each other, and the replica may
/// be damaged.
fn advice_on_process(name: &str) -> &'static str {
    if name == "litestream" {
        ": litestream 0.5.15 or later is needed"
    } else {
        ""
    }
}

/// Whether the system's clock follows others, as systemd says.
pub(super) fn judge_synchronisation() -> (Verdict, &'static str) {
    let output = Command::new("timedatectl")
        .args(["show", "--property=NTPSynchronized", "--value"])
        .output();
    let answer = output.map(|output| output.stdout).unwrap_or_default();
    match answer.trim_ascii() {
        b"yes" => (Verdict::Ok, "synchronised"),
        b"no" => (Verdict::Note, "not synchronised: start an NTP service"),
        _ => (
            Verdict::Ok,
            "timedatectl does not say whether it is synchronised",
        ),
    }
}

/// The processes that have a file open, as far as this user may see them.
fn processes_with_file(file: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        let descriptors = fs::read_dir(entry.path().join("fd"));
        let opens: Vec<PathBuf> = descriptors
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
            .collect();
        if opens.iter().any(|open| open == file) {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push((id, name.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_a_path_is_the_longest_one() {
        let mounts = "27 1 254:0 / / rw - ext4 /dev/vda rw\n\
            30 27 0:25 / /mnt rw,relatime shared:1 - nfs4 shop:/data rw\n\
            31 27 0:26 / /mnt/a rw - tmpfs none rw\n";
        let mount = |path: &str| mount_of_path(mounts, Path::new(path));
        assert_eq!(mount("/var/lib"), Some(("ext4", "/dev/vda")));
        assert_eq!(mount("/mnt/b"), Some(("nfs4", "shop:/data")));
        assert_eq!(mount("/mnt/a/b"), Some(("tmpfs", "none")));
        assert_eq!(mount("/mnta"), Some(("ext4", "/dev/vda")));
        assert_eq!(mount_of_path("", Path::new("/")), None);
    }
}
