//! A machine that fails on demand: the disk is full, a sync fails, the clock jumps, the power goes.
//!
//! A C library (`shim.c`, which lists the switches) is loaded into the real binary and stands
//! between it and the files of one folder. Nothing here needs root.

pub mod disk;
pub mod load;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use super::process::Options;

/// A folder for a payrelay to work in, and the switches of its machine.
pub struct Machine {
    files: TempDir,
    control: TempDir,
}

impl Machine {
    pub fn new() -> Machine {
        let folder = || tempfile::tempdir().expect("the machine has space for a folder");
        Machine {
            files: folder(),
            control: folder(),
        }
    }

    /// One that takes down every change of a file from now on.
    pub fn recorded() -> Machine {
        let machine = Machine::new();
        machine.set("journal", "");
        machine
    }

    /// What a payrelay on this machine is started with.
    pub fn options(&self, env: &[(&str, &str)]) -> Options {
        let text = |path: &Path| path.to_str().expect("a temporary path is UTF-8").to_owned();
        let mut options = Options::new(self.files.path(), env);
        options.env.extend([
            ("LD_PRELOAD".to_owned(), text(shim())),
            ("HOSTILE_FILES".to_owned(), text(self.files.path())),
            ("HOSTILE_CONTROL".to_owned(), text(self.control.path())),
        ]);
        options
    }

    pub fn folder(&self) -> &Path {
        self.files.path()
    }

    pub fn database(&self) -> PathBuf {
        self.files.path().join("payrelay.db")
    }

    /// Turns a switch on, or changes its text. No reader sees half of the text.
    pub fn set(&self, switch: &str, text: &str) {
        let new = self.control.path().join("new");
        fs::write(&new, text).expect("a switch can be written");
        fs::rename(&new, self.control.path().join(switch)).expect("a switch can be turned on");
    }

    pub fn clear(&self, switch: &str) {
        fs::remove_file(self.control.path().join(switch)).expect("the switch is on");
    }

    /// How much has been recorded: everything that is acknowledged now is before this.
    pub fn journal_length(&self) -> u64 {
        fs::metadata(self.control.path().join("journal"))
            .expect("this machine is recorded")
            .len()
    }

    /// The same on a machine that may not be recorded.
    pub fn recorded_length(&self) -> u64 {
        fs::metadata(self.control.path().join("journal")).map_or(0, |journal| journal.len())
    }

    pub fn journal(&self) -> Vec<u8> {
        fs::read(self.control.path().join("journal")).expect("this machine is recorded")
    }
}

/// The library, compiled once a run.
fn shim() -> &'static Path {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    SHIM.get_or_init(|| {
        let source = crate::paths::repository().join("crates/testkit/src/hostile/shim.c");
        let library = crate::paths::temporary().join("hostile.so");
        // Under a name of its own first: another run may be loading the one that is there.
        let new = library.with_extension(format!("{}.so", std::process::id()));
        let arguments = [
            "-std=gnu11",
            "-O1",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
        ]
        .map(OsStr::new);
        let built = Command::new("cc")
            .args(arguments)
            .args([&new, &source])
            .arg("-ldl")
            .output();
        let built =
            built.expect("a C compiler called cc is installed (apt-get install gcc libc6-dev)");
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        fs::rename(&new, &library).expect("the library can be put in its place");
        library
    })
}
