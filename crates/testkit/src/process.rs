//! The real binary as a child process: started, watched through its log, ended with care or
//! without.

use super::child::KillOnDrop;
use super::{POLL, let_time_pass, lock, wait_for, wait_until};
use payrelay::runtime::local_user::local_user_name;
use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The program itself.
const START_LIMIT: Duration = Duration::from_mins(1);
const EXIT_LIMIT: Duration = Duration::from_secs(15);

/// The line on stderr that says that the binary serves ends with this and its address.
const LISTENING: &str = "listening on http://";

/// What the binary is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// The working directory, which holds payrelay.db.
    pub dir: PathBuf,
    pub env: Vec<(String, String)>,
    pub args: Vec<String>,
}

impl Options {
    pub fn new(dir: impl Into<PathBuf>, env: &[(&str, &str)]) -> Self {
        let env = env
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        Self {
            dir: dir.into(),
            env,
            args: Vec::new(),
        }
    }
}

/// A running payrelay; dropping it kills it, and shows its log if the test has failed.
pub struct Payrelay {
    process: KillOnDrop,
    address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    blocked: Arc<AtomicBool>,
    drain: Option<JoinHandle<()>>,
}

impl Payrelay {
    /// Starts the binary on a free port, unless `env` sets one, and waits until it serves.
    #[track_caller]
    pub fn start(options: Options) -> Payrelay {
        let mut process = spawn(options, Stdio::null());
        let stderr = BufReader::new(process.take_stderr());
        let log = Arc::new(Mutex::new(Vec::new()));
        let blocked = Arc::new(AtomicBool::new(false));
        let drain = thread::spawn({
            let log = Arc::clone(&log);
            let blocked = Arc::clone(&blocked);
            move || {
                for line in stderr.lines().map_while(Result::ok) {
                    lock(&log).push(line);
                    while blocked.load(Relaxed) {
                        thread::park_timeout(POLL);
                    }
                }
            }
        });
        let mut drain = Some(drain);
        let deadline = Instant::now() + START_LIMIT;
        // The closure ends by itself at the deadline, to show the log.
        let address = wait_for("a payrelay that serves", START_LIMIT * 2, || {
            let exit = process.try_exit();
            if exit.is_some() {
                drain.take().map(JoinHandle::join);
            }
            let lines = lock(&log).join("\n");
            let address = listening_address(&lines);
            let hope = address.is_some() || (exit.is_none() && Instant::now() < deadline);
            assert!(hope, "payrelay does not serve (exit: {exit:?}):\n{lines}");
            address
        });
        Payrelay {
            process,
            address,
            log,
            blocked,
            drain,
        }
    }

    /// Starts the binary and kills it so much later, wherever it is by then.
    pub fn kill_while_it_starts(options: Options, after: Duration) {
        let mut process = spawn(options, Stdio::null());
        let log = read_all(process.take_stderr());
        let_time_pass(after);
        process.kill();
        let _ = log.join();
    }

    /// Reads no more of its log, until it has ended: the pipe fills.
    pub fn block_log(&self) {
        self.blocked.store(true, Relaxed);
    }

    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// All that it has written to stderr so far; complete once it has ended.
    pub fn log(&self) -> String {
        lock(&self.log).join("\n")
    }

    #[track_caller]
    pub fn wait_for_log(&self, needle: &str, limit: Duration) {
        wait_until(&format!("{needle:?} in the log"), limit, || {
            self.log().contains(needle)
        });
    }

    /// How often it stands there.
    /// The file descriptors that are open now.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("the process runs")
            .count()
    }

    /// The peak of resident memory so far: `VmHWM` of `proc_pid_status(5)`.
    pub fn resident_peak_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("the process runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let number = line.map(|line| line.trim().trim_end_matches(" kB"));
        let number = number.and_then(|number| number.parse().ok());
        number.expect("the kernel says how much memory it has")
    }

    pub fn count_in_log(&self, needle: &str) -> usize {
        self.log().matches(needle).count()
    }

    /// Waits until it stands there once more than `before` the fault that it is to report.
    #[track_caller]
    pub fn wait_for_another(&self, needle: &str, before: usize, limit: Duration) {
        wait_until(&format!("another {needle:?} in the log"), limit, || {
            self.count_in_log(needle) > before
        });
    }

    /// SIGTERM, as systemd does it, and the status of the exit.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        let status = self.process.terminate(EXIT_LIMIT);
        self.finish_log();
        status
    }

    /// Sends a signal by its name, such as INT.
    #[track_caller]
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// SIGKILL: it is gone on return.
    pub fn kill9(&mut self) {
        self.process.kill();
        self.finish_log();
    }

    /// The status of an unexpected exit; `None` while it runs.
    pub fn try_exit(&mut self) -> Option<ExitStatus> {
        let status = self.process.try_exit()?;
        self.finish_log();
        Some(status)
    }

    /// The pipe ends with the process, and then the log is complete.
    fn finish_log(&mut self) {
        self.blocked.store(false, Relaxed);
        if let Some(drain) = self.drain.take() {
            let _ = drain.join();
        }
    }
}

impl Drop for Payrelay {
    fn drop(&mut self) {
        self.kill9();
        if thread::panicking() {
            eprintln!("--- log of payrelay {}:\n{}", self.pid(), self.log());
        }
    }
}

/// Runs a command line that ends by itself.
#[track_caller]
pub fn run_to_exit(options: Options) -> Output {
    let what = format!("the end of {options:?}");
    let mut process = spawn(options, Stdio::piped());
    let stdout = read_all(process.take_stdout());
    let stderr = read_all(process.take_stderr());
    let status = wait_for(&what, START_LIMIT, || process.try_exit());
    let [stdout, stderr] =
        [stdout, stderr].map(|thread| thread.join().expect("reading does not panic"));
    Output {
        status,
        stdout,
        stderr,
    }
}

/// Runs a command of payrelay: exit code, standard output, standard error.
#[track_caller]
pub fn run_command(
    dir: &Path,
    env: &[(&str, &str)],
    args: &[&str],
) -> (Option<i32>, String, String) {
    let args = args.iter().map(|arg| (*arg).to_owned()).collect();
    let output = run_to_exit(Options {
        args,
        ..Options::new(dir, env)
    });
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn spawn(options: Options, stdout: Stdio) -> KillOnDrop {
    let mut command = KillOnDrop::command(crate::paths::binary());
    command
        .env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0")
        .envs(options.env);
    command
        .args(options.args)
        .current_dir(options.dir)
        .stdout(stdout)
        .stderr(Stdio::piped());
    KillOnDrop::spawn(command)
}

fn listening_address(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once(LISTENING)?;
    let end = rest
        .find(|c: char| c.is_whitespace() || "/\"".contains(c))
        .unwrap_or(rest.len());
    Some(
        rest[..end]
            .parse()
            .unwrap_or_else(|error| panic!("{:?} is no address: {error}", &rest[..end])),
    )
}

fn read_all(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What could be read before an error is worth showing.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// The origin that a command records with `SUDO_USER=operator`: only root may have called sudo.
pub fn origin_with_sudo() -> String {
    let process = fs::metadata("/proc/self").expect("this is Linux");
    match process.uid() {
        0 => "local user operator".to_owned(),
        uid => format!("local user {}", local_user_name(uid)),
    }
}
