//! litestream as a process, with the configuration and the commands of
//! docs/how-to/replicate-with-litestream.md.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use testkit::child::{KillOnDrop, without_configuration};
use testkit::listen::free_port;
use testkit::process::{Options, Payrelay};
use testkit::{paths, wait_until};

use crate::pages::{check_commands_known, command_of};
use crate::tools::{find_tool, tools_folder};

/// The version that the page names as tried.
pub const VERSION: &str = "v0.5.18";

const LIMIT: Duration = Duration::from_mins(1);

const PAGE: &str = "docs/how-to/replicate-with-litestream.md";

/// The configuration, as the page shows it.
const FOLDER_OF_PAGE: &str = "/var/lib/payrelay/";
const REPLICA_OF_PAGE: &str = "/mnt/replica/payrelay";
const SOCKET_OF_PAGE: &str = "/run/litestream/litestream.sock";
const METRICS_OF_PAGE: &str = "127.0.0.1:9091";
const CONFIG_OF_PAGE: &str = "/etc/litestream.yml";

/// What each command block of the page has, which these tests run.
const COMMANDS_OF_PAGE: [&str; 3] = ["litestream sync", "litestream restore", "payrelay audit"];

/// A machine with a database, and the place of its replica.
pub struct Machine {
    folder: PathBuf,
    replica: PathBuf,
    metrics: SocketAddr,
    tool: PathBuf,
}

impl Machine {
    /// An empty machine in its folder.
    pub fn new(folder: &Path, replica: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        let machine = Self {
            folder: folder.to_owned(),
            replica: replica.to_owned(),
            metrics: free_port().local_addr().unwrap(),
            tool: find_tool("litestream", "version", VERSION),
        };
        let config = &page_config();
        for value in [
            FOLDER_OF_PAGE,
            REPLICA_OF_PAGE,
            SOCKET_OF_PAGE,
            METRICS_OF_PAGE,
        ] {
            assert_eq!(config.matches(value).count(), 1, "{value}: {config}");
        }
        fs::write(machine.config(), machine.localize(config)).unwrap();
        machine
    }

    /// An empty machine next to this one, with the same replica.
    pub fn replacement(&self, name: &str) -> Self {
        Self::new(&self.folder.with_file_name(name), &self.replica)
    }

    /// A text of the page, with the paths of this machine.
    fn localize(&self, text: &str) -> String {
        text.replace(FOLDER_OF_PAGE, &format!("{}/", self.folder.display()))
            .replace(REPLICA_OF_PAGE, &self.replica.display().to_string())
            .replace(SOCKET_OF_PAGE, &self.socket().display().to_string())
            .replace(METRICS_OF_PAGE, &self.metrics.to_string())
            .replace(CONFIG_OF_PAGE, &self.config().display().to_string())
    }

    pub fn database(&self) -> PathBuf {
        self.folder.join("payrelay.db")
    }

    fn config(&self) -> PathBuf {
        self.folder.join("litestream.yml")
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("litestream.sock")
    }

    /// Whether litestream has its folder next to the database.
    pub fn has_folder_of_litestream(&self) -> bool {
        self.folder.join(".payrelay.db-litestream").exists()
    }

    /// The length of the WAL.
    pub fn wal_bytes(&self) -> u64 {
        let wal = self.folder.join("payrelay.db-wal");
        wal.metadata().map_or(0, |file| file.len())
    }

    /// payrelay with its own log of deliveries and without Kafka, unless `env` says otherwise.
    pub fn start_payrelay(&self, env: &[(&str, &str)]) -> Payrelay {
        Payrelay::start(Options::new(&self.folder, env))
    }

    /// Starts litestream, and waits until it replicates.
    pub fn start_litestream(&self) -> KillOnDrop {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("litestream.log"))
            .unwrap();
        let mut command = KillOnDrop::command(&self.tool);
        command
            .args(["replicate", "-config"])
            .arg(self.config())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let mut litestream = KillOnDrop::spawn(command);
        wait_until("litestream to listen", LIMIT, || {
            let exit = litestream.try_exit();
            assert!(exit.is_none(), "{exit:?}: {}", self.litestream_log());
            std::net::TcpStream::connect(self.metrics).is_ok()
        });
        litestream
    }

    pub fn litestream_log(&self) -> String {
        fs::read_to_string(self.folder.join("litestream.log")).unwrap_or_default()
    }

    /// How long the newest file of the replica has been there; `None` if there is none.
    pub fn replica_age(&self) -> Option<Duration> {
        let files = fs::read_dir(self.replica.join("ltx/0")).ok()?;
        let newest = files
            .filter_map(|file| file.ok()?.metadata().ok()?.modified().ok())
            .max()?;
        SystemTime::now().duration_since(newest).ok()
    }

    /// Runs the command block of the page that has `needle`, and returns its output.
    #[track_caller]
    pub fn run_page_commands(&self, needle: &str) -> String {
        assert!(COMMANDS_OF_PAGE.contains(&needle), "{needle}");
        check_commands_known(PAGE, &COMMANDS_OF_PAGE);
        let block = &command_of(PAGE, needle);
        let mut command = Command::new("bash");
        let usual = std::env::var("PATH").unwrap_or_default();
        let binaries = paths::binary().parent().unwrap().display().to_string();
        let output = without_configuration(&mut command)
            .args(["-euo", "pipefail", "-c", &self.localize(block)])
            .current_dir(&self.folder)
            .env(
                "PATH",
                format!("{}:{binaries}:{usual}", tools_folder().display()),
            )
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let shown = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{block}: {shown}");
        shown
    }
}

/// The page's configuration of litestream.
fn page_config() -> String {
    let text = fs::read_to_string(paths::repository().join(PAGE)).unwrap();
    let (_, rest) = text.split_once("\n   ```yaml\n").unwrap();
    let lines = rest.split("```").next().unwrap_or_default().lines();
    let unindented = lines.map(|line| line.strip_prefix("   ").unwrap_or(line));
    unindented.collect::<Vec<_>>().join("\n")
}
