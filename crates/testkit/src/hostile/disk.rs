//! What a disk may hold after the power failed, from the journal of what was asked of it.
//!
//! What was synced is there. Of what was written since, anything may be there: each write, or each
//! sector of 512 bytes of it, or nothing; in any order. A name that was made or removed since the
//! folder was last synced may be there or not. A sync that failed has lost what it was to write,
//! although every reader of the file still sees it. Linux keeps such pages, and counts them as
//! written (<https://lwn.net/Articles/752063/>).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::Path;

const SECTOR: usize = 512;

/// As in `shim.c`.
const CREATE: u8 = 1;
const WRITE: u8 = 2;
const TRUNCATE: u8 = 3;
const SYNC_BEGIN: u8 = 4;
const SYNC_END: u8 = 5;
const SYNC_FAILED: u8 = 6;
const UNLINK: u8 = 7;

/// The folder itself, in the journal.
const FOLDER: &str = ".";

/// How much of what was not synced is there after all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Survival {
    Nothing,
    Everything,
    /// Each write with this probability.
    Writes(f64),
    /// Each sector of each write with this probability.
    Sectors(f64),
}

/// The disk at one point of the journal, and what has not reached it yet.
pub struct Disk {
    journal: Vec<u8>,
    at: usize,
    files: Vec<File>,
    /// Which file a name means to those who look now.
    names: BTreeMap<String, usize>,
    /// Which file it means on the disk.
    durable_names: BTreeMap<String, usize>,
    renamed: Vec<(usize, String, Option<usize>)>,
    /// Where each sync in progress began, and of what.
    syncs: HashMap<u64, (usize, Option<usize>)>,
    synced: BTreeMap<String, usize>,
}

#[derive(Default)]
struct File {
    durable: Vec<u8>,
    pending: Vec<(usize, Change)>,
}

enum Change {
    Write { offset: usize, bytes: Range<usize> },
    Truncate(usize),
}

struct Record {
    op: u8,
    name: String,
    number: u64,
    bytes: Range<usize>,
}

impl Disk {
    /// Before the first entry.
    pub fn new(journal: Vec<u8>) -> Disk {
        Disk {
            journal,
            at: 0,
            files: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            renamed: Vec::new(),
            syncs: HashMap::new(),
            synced: BTreeMap::new(),
        }
    }

    /// Continues to the last whole entry before `end`.
    pub fn advance(&mut self, end: usize) {
        while let Some((record, next)) = self.record(self.at).filter(|(_, next)| *next <= end) {
            self.apply(record);
            self.at = next;
        }
    }

    /// How often a file was synced so far.
    pub fn synced(&self, name: &str) -> usize {
        self.synced.get(name).copied().unwrap_or(0)
    }

    fn record(&self, at: usize) -> Option<(Record, usize)> {
        let number = |from: usize, length: usize| {
            let mut bytes = [0; 8];
            bytes[..length].copy_from_slice(&self.journal[from..from + length]);
            u64::from_le_bytes(bytes)
        };
        let size = |from| usize::try_from(number(from, 4)).expect("fits");
        if at + 17 > self.journal.len() || at + size(at) > self.journal.len() {
            return None;
        }
        let next = at + size(at);
        let data = at + 17 + size(at + 5);
        let name = std::str::from_utf8(&self.journal[at + 17..data])
            .expect("names are UTF-8")
            .to_owned();
        Some((
            Record {
                op: self.journal[at + 4],
                name,
                number: number(at + 9, 8),
                bytes: data..next,
            },
            next,
        ))
    }

    fn apply(&mut self, record: Record) {
        let Record {
            op,
            name,
            number,
            bytes,
        } = record;
        let file = self.names.get(&name).copied();
        let size = usize::try_from(number).expect("fits");
        let change = |disk: &mut Disk, change| {
            disk.files[file.expect("a file that is changed was made")]
                .pending
                .push((disk.at, change));
        };
        match op {
            CREATE => {
                let new = self.files.len();
                self.files.push(File::default());
                self.names.insert(name.clone(), new);
                self.renamed.push((self.at, name, Some(new)));
            }
            UNLINK => {
                self.names.remove(&name);
                self.renamed.push((self.at, name, None));
            }
            WRITE => change(
                self,
                Change::Write {
                    offset: size,
                    bytes,
                },
            ),
            TRUNCATE => change(self, Change::Truncate(size)),
            SYNC_BEGIN => drop(self.syncs.insert(
                number,
                (self.at, (name != FOLDER).then(|| file.expect("was made"))),
            )),
            SYNC_END | SYNC_FAILED => {
                *self.synced.entry(name).or_default() += usize::from(op == SYNC_END);
                let (began, file) = self
                    .syncs
                    .remove(&number)
                    .expect("a sync that ends has begun");
                match file {
                    None => self.sync_names(began, op == SYNC_END),
                    Some(file) => self.sync_file(file, began, op == SYNC_END),
                }
            }
            _ => panic!("the journal has an entry {op}"),
        }
    }

    fn sync_names(&mut self, began: usize, success: bool) {
        let renamed = std::mem::take(&mut self.renamed);
        let (before, after) = renamed.into_iter().partition(|(at, ..)| *at < began);
        self.renamed = after;
        for (_, name, file) in before.into_iter().filter(|_| success) {
            point(&mut self.durable_names, name, file);
        }
    }

    fn sync_file(&mut self, file: usize, began: usize, success: bool) {
        let File { durable, pending } = &mut self.files[file];
        for (at, change) in std::mem::take(pending) {
            if at >= began {
                pending.push((at, change));
            } else if success {
                match change {
                    Change::Write { offset, bytes } => write(durable, offset, &self.journal[bytes]),
                    Change::Truncate(length) => durable.resize(length, 0),
                }
            }
        }
    }

    /// A folder as it may look when the power fails now.
    pub fn crash(
        &self,
        survival: Survival,
        random: &mut fastrand::Rng,
    ) -> BTreeMap<String, Vec<u8>> {
        let mut names = self.durable_names.clone();
        for (_, name, file) in &self.renamed {
            if survives(survival, random) {
                point(&mut names, name.clone(), *file);
            }
        }
        names
            .into_iter()
            .map(|(name, file)| (name, self.content(&self.files[file], survival, random)))
            .collect()
    }

    fn content(&self, file: &File, survival: Survival, random: &mut fastrand::Rng) -> Vec<u8> {
        let mut content = file.durable.clone();
        for (_, change) in &file.pending {
            match change {
                Change::Truncate(length) if survives(survival, random) => {
                    content.resize(*length, 0);
                }
                Change::Write { offset, bytes } if matches!(survival, Survival::Sectors(_)) => {
                    let mut from = *offset;
                    let end = offset + bytes.len();
                    while from < end {
                        let to = end.min((from / SECTOR + 1) * SECTOR);
                        let part = bytes.start + from - offset..bytes.start + to - offset;
                        if survives(survival, random) {
                            write(&mut content, from, &self.journal[part]);
                        }
                        from = to;
                    }
                }
                Change::Write { offset, bytes } if survives(survival, random) => {
                    write(&mut content, *offset, &self.journal[bytes.clone()]);
                }
                Change::Truncate(_) | Change::Write { .. } => {}
            }
        }
        content
    }
}

fn survives(survival: Survival, random: &mut fastrand::Rng) -> bool {
    match survival {
        Survival::Nothing => false,
        Survival::Everything => true,
        Survival::Writes(probability) | Survival::Sectors(probability) => {
            random.f64() < probability
        }
    }
}

fn point(names: &mut BTreeMap<String, usize>, name: String, file: Option<usize>) {
    match file {
        Some(file) => drop(names.insert(name, file)),
        None => drop(names.remove(&name)),
    }
}

fn write(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if content.len() < offset + bytes.len() {
        content.resize(offset + bytes.len(), 0);
    }
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// Puts the files where a program can open them.
pub fn lay_out(files: &BTreeMap<String, Vec<u8>>, folder: &Path) {
    for (name, content) in files {
        fs::write(folder.join(name), content).expect("the machine has space for the files");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(op: u8, name: &str, number: u64, bytes: &[u8]) -> Vec<u8> {
        let total = u32::try_from(17 + name.len() + bytes.len()).unwrap();
        let mut entry = total.to_le_bytes().to_vec();
        entry.push(op);
        entry.extend(u32::try_from(name.len()).unwrap().to_le_bytes());
        entry.extend(number.to_le_bytes());
        entry.extend(name.as_bytes());
        entry.extend(bytes);
        entry
    }

    fn after(entries: &[Vec<u8>], survival: Survival) -> BTreeMap<String, Vec<u8>> {
        let mut disk = Disk::new(entries.concat());
        disk.advance(usize::MAX);
        disk.crash(survival, &mut fastrand::Rng::with_seed(1))
    }

    #[test]
    fn synced_bytes_survive_and_others_may_not() {
        let entries = [
            entry(CREATE, "a", 0, b""),
            entry(WRITE, "a", 0, b"old"),
            entry(SYNC_BEGIN, "a", 1, b""),
            entry(WRITE, "a", 0, b"new"),
            entry(SYNC_END, "a", 1, b""),
            entry(SYNC_BEGIN, FOLDER, 2, b""),
            entry(SYNC_END, FOLDER, 2, b""),
            entry(UNLINK, "a", 0, b""),
        ];
        let content = |n: usize, survival| after(&entries[..n], survival).get("a").cloned();
        assert_eq!(
            content(5, Survival::Nothing),
            None,
            "the name was not synced"
        );
        assert_eq!(
            content(7, Survival::Nothing).unwrap(),
            b"old",
            "what was written during the sync is not synced"
        );
        assert_eq!(content(7, Survival::Everything).unwrap(), b"new");
        assert_eq!(content(8, Survival::Nothing).unwrap(), b"old");
        assert_eq!(content(8, Survival::Everything), None);
    }

    #[test]
    fn a_failed_sync_loses_bytes_that_a_later_sync_does_not_restore() {
        let sync = |id, end| [entry(SYNC_BEGIN, "a", id, b""), entry(end, "a", id, b"")].concat();
        let entries = [
            entry(CREATE, "a", 0, b""),
            [
                entry(SYNC_BEGIN, FOLDER, 9, b""),
                entry(SYNC_END, FOLDER, 9, b""),
            ]
            .concat(),
            entry(WRITE, "a", 0, b"lost"),
            sync(1, SYNC_FAILED),
            entry(WRITE, "a", 4, b"kept"),
            sync(2, SYNC_END),
        ];
        assert_eq!(after(&entries, Survival::Everything)["a"], b"\0\0\0\0kept");
    }

    #[test]
    fn a_power_failure_tears_a_write_at_sectors() {
        let entries = [
            entry(CREATE, "a", 0, b""),
            [
                entry(SYNC_BEGIN, FOLDER, 9, b""),
                entry(SYNC_END, FOLDER, 9, b""),
            ]
            .concat(),
            entry(WRITE, "a", 100, &[1; 4096]),
        ];
        let torn = &after(&entries, Survival::Sectors(0.5))["a"];
        let there = |byte| torn[100..].contains(&byte);
        assert!(there(0) && there(1), "some of it is there, and some is not");
        assert!(
            torn[512..1024].iter().all(|byte| *byte == torn[512]),
            "a sector is whole or not there"
        );
    }
}
