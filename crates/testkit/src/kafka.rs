//! A real Apache Kafka broker, without Docker: the jars come once from Maven Central, the rest is
//! Java.
//!
//! One KRaft node on 127.0.0.1 with three listeners. CLIENT is for the product, and a test may
//! advertise it through a proxy. INSIDE is for the broker itself and for a test that looks past
//! that proxy. The third is CONTROLLER. One that is started with [`Broker::start_secure`] has four
//! more, behind TLS and SASL.

use super::child::KillOnDrop;
use super::listen::free_port;
use super::proxy::Proxy;
use super::tls::{Listeners, PASSWORD, Secure, USER};
use super::{lock, wait_for};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const START_LIMIT: Duration = Duration::from_mins(1);

/// What the broker logs once it is unfenced and answers requests; the ports are open long before.
const SERVES: &str = "Kafka Server started";

/// The fast compiler and the plainest collector start soonest, and leave most of two cores to the
/// clients. The archive of loaded classes halves the start; a JVM that it does not suit continues
/// without it. Benchmarks use the same settings, so that their figures stay comparable.
const JVM: &[&str] = &[
    "-Xms256m",
    "-Xmx768m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xshare:auto",
    "-Xlog:disable",
];
const USE_ARCHIVE: &str = "-XX:SharedArchiveFile=classes.jsa";
const WRITE_ARCHIVE: &str = "-XX:ArchiveClassesAtExit=classes.jsa";

/// A running broker; dropping it kills it and removes its data.
pub struct Broker {
    home: PathBuf,
    ports: Ports,
    advertised: String,
    scratch: TempDir,
    jvm: KillOnDrop,
}

impl Broker {
    /// Starts a broker of a version on Maven Central, such as "4.4.0" or "3.9.2", and waits until
    /// it serves.
    pub fn start(version: &str) -> Broker {
        let home = installed(version);
        retry_used_ports(|| {
            let ports = Ports::choose();
            let advertised = ports.client();
            Broker::boot(&home, ports, advertised, USE_ARCHIVE)
        })
    }

    /// Starts a broker with more settings, in the form of its file: lines of `name=value`.
    pub fn start_with(version: &str, settings: &str) -> Broker {
        let home = installed(version);
        retry_used_ports(|| {
            let ports = Ports::choose();
            let more = Listeners {
                settings: settings.to_owned(),
                ..Listeners::default()
            };
            let properties = |data: &Path| ports.properties(&ports.client(), data, &more);
            let scratch = formatted_scratch(&home, properties);
            let advertised = ports.client();
            Broker::run(&home, ports, advertised, scratch, USE_ARCHIVE)
        })
    }

    /// Starts a broker that sends its clients to a proxy: who bootstraps through the proxy stays on
    /// it.
    pub fn start_behind_proxy(version: &str) -> (Broker, Proxy) {
        let home = installed(version);
        retry_used_ports(|| {
            let ports = Ports::choose();
            let proxy = Proxy::start(ports.client());
            let broker = Broker::boot(&home, ports, proxy.address(), USE_ARCHIVE)?;
            Ok((broker, proxy))
        })
    }

    /// Starts a broker that sends its clients to this address, whatever is there.
    pub fn start_advertising(version: &str, advertised: &str) -> Broker {
        let home = installed(version);
        retry_used_ports(|| {
            Broker::boot(&home, Ports::choose(), advertised.to_owned(), USE_ARCHIVE)
        })
    }

    /// Starts a broker that also has listeners behind TLS and SASL.
    pub fn start_secure(version: &str) -> (Broker, Secure) {
        let home = installed(version);
        retry_used_ports(|| {
            let ports = Ports::choose();
            let (secure, held) = Secure::choose();
            let scratch = scratch();
            secure.authority.write(scratch.path());
            let data = scratch.path().join("data");
            let properties =
                ports.properties(&ports.client(), &data, &secure.listeners(scratch.path()));
            let file = scratch.path().join("server.properties");
            fs::write(&file, properties).expect("a fresh directory is writable");
            format(&home, &file, &["SCRAM-SHA-256", "SCRAM-SHA-512"]);
            drop(held);
            let advertised = ports.client();
            Ok((
                Broker::run(&home, ports, advertised, scratch, USE_ARCHIVE)?,
                secure,
            ))
        })
    }

    /// The address for clients; the proxy's, where there is one.
    pub fn bootstrap(&self) -> String {
        self.advertised.clone()
    }

    /// Where it listens for clients, whatever it advertises.
    pub fn listens(&self) -> String {
        self.ports.client()
    }

    /// An address that never leads through a proxy, for a test that checks what arrived.
    pub fn bootstrap_inside(&self) -> String {
        format!("127.0.0.1:{}", self.ports.inside)
    }

    /// SIGKILL: the broker is gone on return, and its data stays for [`Broker::restart`].
    pub fn kill(&mut self) {
        self.jvm.kill();
    }

    /// Starts the broker again on the same ports and data, killing it first if it runs.
    pub fn restart(&mut self) {
        self.kill();
        self.jvm = spawn(&self.home, self.scratch.path(), USE_ARCHIVE);
        self.wait_until_it_serves()
            .unwrap_or_else(|failure| failure.panic());
    }

    /// SIGTERM: the broker closes its files, and does not look for damage in them at the next
    /// start.
    pub fn stop(&mut self) {
        self.jvm.terminate(START_LIMIT);
    }

    /// Changes one byte of a data batch, on the disk of a broker that was stopped: its checksum
    /// does not fit any more. `choose` gets the number of batches, and returns the index of one.
    /// Returns the batch's offsets, if there is a batch.
    pub fn corrupt(
        &self,
        topic: &str,
        partition: i32,
        choose: impl FnOnce(usize) -> usize,
    ) -> Option<RangeInclusive<i64>> {
        let folder = self
            .scratch
            .path()
            .join(format!("data/{topic}-{partition}"));
        let mut segments: Vec<PathBuf> = fs::read_dir(folder)
            .ok()?
            .flatten()
            .map(|entry| entry.path())
            .collect();
        segments.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        let path = segments.into_iter().max()?;
        let mut bytes = fs::read(&path).expect("a stopped broker's log can be read");
        let batches = data_batches(&bytes);
        let (start, offsets) = batches.get(choose(batches.len()))?.clone();
        // Behind the header of 61 bytes (https://kafka.apache.org/documentation/#recordbatch).
        bytes[start + 62] ^= 0xff;
        fs::write(&path, bytes).expect("a stopped broker's log can be written");
        Some(offsets)
    }

    fn boot(home: &Path, ports: Ports, advertised: String, flag: &str) -> Result<Broker, Failure> {
        let properties = |data: &Path| ports.properties(&advertised, data, &Listeners::default());
        let scratch = formatted_scratch(home, properties);
        Broker::run(home, ports, advertised, scratch, flag)
    }

    fn run(
        home: &Path,
        ports: Ports,
        advertised: String,
        scratch: TempDir,
        flag: &str,
    ) -> Result<Broker, Failure> {
        let jvm = spawn(home, scratch.path(), flag);
        let mut broker = Broker {
            home: home.to_owned(),
            ports,
            advertised,
            scratch,
            jvm,
        };
        broker.wait_until_it_serves()?;
        Ok(broker)
    }

    fn wait_until_it_serves(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + START_LIMIT;
        // The closure ends by itself at the deadline, to hand out the log.
        wait_for("a broker that starts or fails", START_LIMIT * 2, || {
            let exit = self.jvm.try_exit();
            let log =
                fs::read_to_string(self.scratch.path().join("broker.log")).unwrap_or_default();
            if let Some(status) = exit {
                Some(Err(Failure {
                    what: format!("the broker ended ({status})"),
                    log,
                }))
            } else if log.contains(SERVES) && TcpStream::connect(self.ports.client()).is_ok() {
                Some(Ok(()))
            } else if Instant::now() > deadline {
                Some(Err(Failure {
                    what: format!("no broker within {START_LIMIT:?}"),
                    log,
                }))
            } else {
                None
            }
        })
    }
}

/// Where each batch of records begins, and its offsets. Markers of transactions are left out.
fn data_batches(bytes: &[u8]) -> Vec<(usize, RangeInclusive<i64>)> {
    let number = |at: usize, length: usize| {
        bytes.get(at..at + length).map(|part| {
            part.iter()
                .fold(0_i64, |sum, byte| sum << 8 | i64::from(*byte))
        })
    };
    let mut found = Vec::new();
    let mut at = 0;
    while let (Some(base), Some(length), Some(attributes), Some(last)) = (
        number(at, 8),
        number(at + 8, 4),
        number(at + 21, 2),
        number(at + 23, 4),
    ) {
        const CONTROL: i64 = 0x20;
        if length == 0 {
            break;
        }
        if attributes & CONTROL == 0 {
            found.push((at, base..=base + last));
        }
        at += 12 + usize::try_from(length).expect("a batch is small");
    }
    found
}

impl Drop for Broker {
    /// The JVM first: it must not find its files gone.
    fn drop(&mut self) {
        self.jvm.kill();
    }
}

/// A directory with the broker's properties, and an empty data directory.
fn formatted_scratch(home: &Path, properties: impl FnOnce(&Path) -> String) -> TempDir {
    let scratch = scratch();
    let data = scratch.path().join("data");
    fs::write(scratch.path().join("server.properties"), properties(&data))
        .expect("a fresh directory is writable");
    let mut copy = Command::new("cp");
    copy.arg("-r").arg(home.join("formatted")).arg(data);
    run(&mut copy);
    scratch
}

/// Not in /tmp: should anything stay behind, `cargo clean` takes it.
fn scratch() -> TempDir {
    TempDir::with_prefix_in("kafka-", crate::paths::temporary())
        .expect("the target directory is writable")
}

/// The JVM of a broker whose files are in `scratch`. The class path is relative, because the
/// archive of classes names it and must outlive the renaming of `home`.
fn spawn(home: &Path, scratch: &Path, flag: &str) -> KillOnDrop {
    let log = File::create(scratch.join("broker.log")).expect("a fresh directory is writable");
    let mut java = KillOnDrop::command_with_scratch("java", scratch);
    java.args(JVM).args([flag, "-cp", "libs/*", "kafka.Kafka"]);
    java.arg(scratch.join("server.properties"))
        .current_dir(home);
    java.stdout(log.try_clone().expect("a descriptor is left"))
        .stderr(log);
    KillOnDrop::spawn(java)
}

/// Why a broker did not start.
struct Failure {
    what: String,
    log: String,
}

impl Failure {
    fn panic(&self) -> ! {
        let lines: Vec<&str> = self.log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(60)..];
        panic!("{}; the end of its log:\n{}", self.what, tail.join("\n"));
    }
}

/// Between the choice of ports and the start of the broker another process may take one: once is
/// bad luck.
fn retry_used_ports<T>(attempt: impl Fn() -> Result<T, Failure>) -> T {
    let result = match attempt() {
        Err(failure) if failure.log.contains("Address already in use") => attempt(),
        result => result,
    };
    result.unwrap_or_else(|failure| failure.panic())
}

struct Ports {
    client: u16,
    inside: u16,
    controller: u16,
}

impl Ports {
    fn choose() -> Ports {
        // All three are held until the last is chosen.
        let listeners = [free_port(), free_port(), free_port()];
        let [client, inside, controller] = listeners.each_ref().map(|listener| {
            listener
                .local_addr()
                .expect("a bound listener has an address")
                .port()
        });
        Ports {
            client,
            inside,
            controller,
        }
    }

    fn client(&self) -> String {
        format!("127.0.0.1:{}", self.client)
    }

    fn properties(&self, advertised: &str, data: &Path, more: &Listeners) -> String {
        let Ports {
            client,
            inside,
            controller,
        } = self;
        let Listeners {
            bound,
            advertised: more_advertised,
            protocols,
            settings,
        } = more;
        let data = data.display();
        // The session is short because a broker killed with -9 stays fenced until its old session
        // ends. It is not shorter because a test machine may stop for a second.
        format!(
            "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=CLIENT://127.0.0.1:{client},INSIDE://127.0.0.1:{inside},\
             CONTROLLER://127.0.0.1:{controller}{bound}
advertised.listeners=CLIENT://{advertised},INSIDE://127.0.0.1:{inside}{more_advertised}
listener.security.protocol.map=CLIENT:PLAINTEXT,INSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT{protocols}
inter.broker.listener.name=INSIDE
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
broker.heartbeat.interval.ms=250
broker.session.timeout.ms=2000
controller.quorum.election.timeout.ms=200
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=4194304
{settings}"
        )
    }
}

/// The home of a version: `libs` with its jars, `formatted` with an empty data directory as
/// `kafka.tools.StorageTool` makes it, `classes.jsa`. Made once for a target directory.
fn installed(version: &str) -> PathBuf {
    // Threads that need the same version wait for the one that fetches it.
    static FETCH: Mutex<()> = Mutex::new(());
    static JAVA: OnceLock<()> = OnceLock::new();
    let _turn = lock(&FETCH);
    JAVA.get_or_init(require_java);
    let target = crate::paths::target();
    let kafka = target.join("kafka");
    let home = kafka.join(version);
    if home.is_dir() {
        return home;
    }
    fs::create_dir_all(&kafka).expect("the target directory is writable");
    let staging =
        TempDir::with_prefix_in(format!("{version}-"), &kafka).expect("kafka/ is writable");
    fetch(version, staging.path());
    let properties =
        Ports::choose().properties("127.0.0.1:1", Path::new("formatted"), &Listeners::default());
    let file = staging.path().join("format.properties");
    fs::write(&file, properties).expect("a fresh directory is writable");
    format(staging.path(), &file, &[]);
    archive_classes(staging.path());
    // Whole or not at all; when another test process was faster, its home is as good.
    if let Err(error) = fs::rename(staging.path(), &home) {
        assert!(
            home.is_dir(),
            "rename {} to {}: {error}",
            staging.path().display(),
            home.display()
        );
    }
    home
}

/// The jars of a whole broker, and the plainest logger, for without one it starts in silence.
fn fetch(version: &str, home: &Path) {
    let pom = format!(
        "<project xmlns=\"http://maven.apache.org/POM/4.0.0\">
  <modelVersion>4.0.0</modelVersion>
  <groupId>payrelay.test</groupId><artifactId>kafka</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
      <version>{version}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"
    );
    crate::maven::copy_dependencies(&pom, home);
}

/// Records a second that Kafka's own producer benchmark sends to a topic, with `acks=all` and
/// without transactions (<https://kafka.apache.org/documentation/#basic_ops>).
pub fn producer_performance(
    broker: &Broker,
    topic: &str,
    records: u64,
    record_bytes: usize,
) -> f64 {
    let jars = crate::maven::dependencies(&[("org.apache.kafka", "kafka-tools", "4.4.0")]);
    let mut java = Command::new("java");
    java.arg("-cp")
        .arg(jars.join("*"))
        .arg("org.apache.kafka.tools.ProducerPerformance")
        .args(["--topic", topic, "--throughput", "-1"])
        .args(["--num-records", &records.to_string()])
        .args(["--record-size", &record_bytes.to_string()])
        .args(["--producer-props", "acks=all"])
        .arg(format!("bootstrap.servers={}", broker.bootstrap()));
    let output = String::from_utf8_lossy(&run(&mut java).stdout).into_owned();
    // `300000 records sent, 123456.7 records/sec (29.4 MB/sec), ...`: the last line is the total.
    let total = output.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once(" records sent, ")?;
        rest.split(' ').next()?.parse().ok()
    });
    total.unwrap_or_else(|| panic!("ProducerPerformance reported no rate:\n{output}"))
}

/// Makes the data directory that a file of properties names. It holds no port and no path, so one
/// formatted copy serves every broker of its version; one with users is made for each broker.
fn format(home: &Path, properties: &Path, scram: &[&str]) {
    let mut java = Command::new("java");
    java.args(JVM)
        .args(["-cp", "libs/*", "kafka.tools.StorageTool", "format"]);
    java.args(["-t", "cGF5cmVsYXktdGVzdHMtMQ", "-c"])
        .arg(properties)
        .current_dir(home);
    for mechanism in scram {
        java.arg("--add-scram")
            .arg(format!("{mechanism}=[name={USER},password={PASSWORD}]"));
    }
    run(&mut java);
}

/// Runs a broker once, to its orderly end, for the JVM to write down the classes that it loads.
fn archive_classes(home: &Path) {
    let mut broker = retry_used_ports(|| {
        let ports = Ports::choose();
        let advertised = ports.client();
        Broker::boot(home, ports, advertised, WRITE_ARCHIVE)
    });
    broker.jvm.terminate(START_LIMIT);
}

fn require_java() {
    let version =
        String::from_utf8_lossy(&run(Command::new("java").arg("-version")).stderr).into_owned();
    // `openjdk version "17.0.15" 2025-04-15`, and "1.8.0_402" in the old days.
    let number = version
        .split('"')
        .nth(1)
        .and_then(|quoted| quoted.split(['.', '-', '_']).next());
    let major = number.and_then(|number| number.parse::<u32>().ok());
    assert!(
        major >= Some(17),
        "Kafka needs Java 17 or later, and `java -version` says:\n{version}\n{INSTALL}"
    );
}

const INSTALL: &str = "The tests run a real Kafka. Install what it needs: \
    apt-get install openjdk-17-jre-headless maven";

pub(crate) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => panic!(
            "{} is not installed. {INSTALL}",
            command.get_program().display()
        ),
        _ => panic!("{command:?}: {error}"),
    });
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}\n{stderr}",
        output.status
    );
    output
}
