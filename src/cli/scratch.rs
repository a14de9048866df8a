//! A payrelay of this command's own: a scratch folder, a free port, and no configuration from
//! elsewhere.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder};
use std::io::{self, BufRead as _, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{env, thread};

use crossbeam_channel::{Sender, bounded};
use serde_json::json;

use super::api::ApiResponse;
use super::local_client::exchange_json;

/// How long a start may take: after a kill it reads the WAL.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How many lines of its log are shown if it does not start.
const LINES_MAX: usize = 20;

/// A folder that is removed with everything in it.
pub(super) struct ScratchFolder {
    path: PathBuf,
    keep: bool,
}

impl ScratchFolder {
    /// Creates a folder for this process, with a configuration.
    pub(super) fn create(parent: &Path, socket: &str) -> io::Result<Self> {
        let path =
            fs::canonicalize(parent)?.join(format!("payrelay-scratch-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&path)?;
        let folder = Self { path, keep: false };
        // A text of JSON is one of TOML.
        let database = json!(folder.database().to_string_lossy());
        let config = format!(
            "[http]\nlisten = \"127.0.0.1:0\"\nsocket = {socket:?}\n[database]\npath = {database}\n"
        );
        fs::write(folder.config(), config)?;
        Ok(folder)
    }

    pub(super) fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    pub(super) fn database(&self) -> PathBuf {
        self.path.join("payrelay.db")
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the folder, for an operator to look at.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// A running payrelay. Dropping it kills it.
pub(super) struct ScratchPayrelay {
    process: Child,
    address: SocketAddr,
}

impl ScratchPayrelay {
    /// Starts this program on the folder, and waits until it serves.
    pub(super) fn start(folder: &ScratchFolder) -> io::Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PAYRELAY_") {
                command.env_remove(name);
            }
        }
        let mut process = command
            .arg("--config")
            .arg(folder.config())
            .arg("serve")
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let (found, address) = bounded(1);
        let lines: Arc<Mutex<VecDeque<String>>> = Arc::default();
        if let Some(stderr) = process.stderr.take() {
            let lines = Arc::clone(&lines);
            thread::Builder::new().spawn(move || read_log(stderr, &found, &lines))?;
        }
        if let Ok(address) = address.recv_timeout(START_TIMEOUT) {
            return Ok(Self { process, address });
        }
        let _ = process.kill();
        let _ = process.wait();
        let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<_> = lines.iter().map(String::as_str).collect();
        Err(io::Error::other(format!(
            "the scratch payrelay did not start: {}",
            lines.join("; ")
        )))
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it without any warning, as a power failure would.
    pub(super) fn kill(mut self) -> io::Result<()> {
        self.process.kill()?;
        self.process.wait().map(drop)
    }
}

impl Drop for ScratchPayrelay {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Reads its log to the end, so that it never waits for this process. Sends the address.
fn read_log(stderr: ChildStderr, found: &Sender<SocketAddr>, last: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        if let Some((_, address)) = line.split_once("listening on http://")
            && let Ok(address) = address.trim().parse()
        {
            let _ = found.try_send(address);
        }
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == LINES_MAX {
            last.pop_front();
        }
        last.push_back(line);
    }
}

/// Pays a reservation.
pub(super) fn pay_reservation(
    address: SocketAddr,
    user: i64,
    reservation: i64,
    price: i64,
) -> io::Result<ApiResponse> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let body = json!({
        "user_id": user,
        "reservations": [{"reservation_id": reservation, "seat_price": price}],
    });
    exchange_json(&mut stream, "POST", "/payments", &body.to_string())
}
