//! `payrelay support-bundle`: what a person needs to help, in one file. No payment, no user, no
//! secret.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use payrelay::domain::timestamp::Timestamp;
use payrelay::store::local_socket::database_lock_holder;
use serde::Serialize;

use super::client::{Target, load_local};
use super::doctor::{PostToSlack, run_checks};
use super::output::{output_line, print_config_error};
use super::state::State;
use super::status::read_overview;
use super::{config, configuration};

#[derive(Args)]
pub(super) struct SupportBundleCommand {
    /// The tar file to write: one that does not exist yet
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// For how long the disk is measured.
const DISK_SECONDS: u64 = 1;

impl SupportBundleCommand {
    pub(super) fn run(&self, target: &Target) -> u8 {
        let parts = collect_parts(target);
        match self.write(&parts) {
            Ok(()) => {
                let names: Vec<_> = parts.iter().map(|(name, _)| *name).collect();
                output_line(format_args!(
                    "{}: {}",
                    self.file.display(),
                    names.join(", ")
                ))
            }
            Err(error) => print_config_error(format_args!("{}: {error}", self.file.display())),
        }
    }

    fn write(&self, parts: &[(&'static str, String)]) -> io::Result<()> {
        let mut options = File::options();
        let mut tar = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.file)?;
        for (name, text) in parts {
            write_tar_entry(&mut tar, name, text.as_bytes())?;
        }
        // Two empty blocks end the file.
        tar.write_all(&[0; 1024])?;
        tar.sync_all()
    }
}

/// The name and the text of each file. What cannot be read is named as such.
fn collect_parts(target: &Target) -> Vec<(&'static str, String)> {
    let file = target.file();
    let mut parts = vec![
        ("payrelay/version.txt", version_text()),
        ("payrelay/config.toml", configuration_text(file)),
        ("payrelay/status.json", json_text(read_overview(target))),
        (
            "payrelay/topic.json",
            json_text(read_running(target, "/admin/topic")),
        ),
        (
            "payrelay/doctor.json",
            json_text(run_checks(file, DISK_SECONDS, PostToSlack::No)),
        ),
    ];
    let holder = load_local(file).ok().and_then(|local| {
        let holder = database_lock_holder(&local.database);
        holder.ok().flatten()
    });
    if let Some(holder) = holder {
        let read = |name: &str| {
            let path = format!("/proc/{holder}/{name}");
            fs::read_to_string(&path).unwrap_or_else(|error| format!("{path}: {error}\n"))
        };
        parts.push(("payrelay/limits.txt", read("limits")));
        parts.push(("payrelay/process.txt", read("status")));
    }
    parts
}

fn version_text() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    format!(
        "payrelay {}\nwritten at {}\n{}{}{}",
        env!("CARGO_PKG_VERSION"),
        Timestamp::now(),
        read("/proc/version"),
        read("/etc/os-release"),
        read("/proc/meminfo")
    )
}

/// As `config check` prints it: without secrets.
fn configuration_text(file: Option<&Path>) -> String {
    match configuration::load_configuration(file) {
        Ok(loaded) => config::describe_configuration(&loaded).join("\n"),
        Err(problems) => problems.to_string(),
    }
}

/// An answer that only a running payrelay gives.
fn read_running(target: &Target, path: &str) -> Result<serde_json::Value, u8> {
    let found = State::open(target)?.get(path, |_| Ok(None))?;
    Ok(found.unwrap_or_default())
}

fn json_text(value: Result<impl Serialize, u8>) -> String {
    match value {
        // Serializing our own types cannot fail.
        Ok(value) => serde_json::to_string_pretty(&value).unwrap_or_default(),
        Err(code) => format!("it could not be read: exit code {code}"),
    }
}

/// A file of a tar archive (POSIX ustar).
fn write_tar_entry(tar: &mut impl Write, name: &str, bytes: &[u8]) -> io::Result<()> {
    const BLOCK: usize = 512;
    let mut header = [0_u8; BLOCK];
    let mut put =
        |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000600\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", bytes.len()));
    let seconds = Timestamp::now().as_millis() / 1000;
    put(136, &format!("{seconds:011o}\0"));
    // The checksum counts its own field as spaces.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\0");
    put(263, "00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.write_all(&header)?;
    tar.write_all(bytes)?;
    let rest = bytes.len().next_multiple_of(BLOCK) - bytes.len();
    tar.write_all(&[0; BLOCK][..rest])
}
