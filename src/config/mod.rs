//! The configuration: a TOML file and the environment in, a checked [`Config`] out, or every
//! problem at once.
//!
//! `Config::read` names each key once, with its default and what is allowed; what it does not ask
//! for does not exist. The environment variable of a key follows from its name (`http.listen`:
//! `PAYRELAY_HTTP_LISTEN`) and wins over the file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::{Ipv6Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::Value;

use crate::domain::access::{Access, TokenHash, is_loopback};
use crate::domain::event::NodeId;
use crate::domain::payment::Status;
use crate::domain::template::Template;
use crate::domain::timestamp::Zone;

/// A value that must not be seen: it shows as `***` wherever it is printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Keeps `value` from being shown.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Everything that can be set, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[http]`
    pub http: Http,
    /// `[database]`
    pub database: Database,
    /// `[payment]`
    pub payment: Payment,
    /// `[node]`
    pub node: Node,
    /// `[publisher]`
    pub publisher: Publisher,
    /// `[kafka]`
    pub kafka: Kafka,
    /// `[slack]`
    pub slack: Slack,
    /// `[scheduler]`
    pub scheduler: Scheduler,
    /// `[idempotency]`
    pub idempotency: Idempotency,
}

/// `[http]`: the edge that clients call.
#[derive(Debug, Clone)]
pub struct Http {
    /// Where to listen.
    pub listen: SocketAddr,
    /// A larger body is refused with 413.
    pub body_bytes_max: usize,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long a request's head may take to arrive; also how long a kept connection may be idle.
    pub header_timeout: Duration,
    /// How long an answer may wait for a client that does not read.
    pub write_timeout: Duration,
    /// More connections wait unaccepted.
    pub connections_max: NonZeroUsize,
    /// More connections of one address are closed at once. Never more than `connections_max`.
    pub client_connections_max: NonZeroUsize,
    /// `None`: as many as it likes.
    pub client_requests_per_second: Option<NonZeroU32>,
    /// Bytes of bodies under way that one client may have in memory.
    pub client_body_bytes_max: usize,
    /// The same for all clients together.
    pub bodies_bytes_max: usize,
    /// Where people reach this API, for links in messages.
    pub public_url: Option<String>,
    /// Who may call; none: whoever is on this machine.
    pub tokens: Vec<Token>,
}

impl Http {
    /// There is room for no more connections. One address keeps its share of them, and what it may
    /// have up to half of them.
    pub fn serve_fewer(&mut self, room: NonZeroUsize) {
        let share = room.get() * self.client_connections_max.get() / self.connections_max.get();
        let of_one = self
            .client_connections_max
            .get()
            .min(share.max(room.get() / 2));
        self.connections_max = room;
        self.client_connections_max = NonZeroUsize::new(of_one).unwrap_or(NonZeroUsize::MIN);
    }
}

/// `[[http.token]]`: somebody who may call.
#[derive(Debug, Clone)]
pub struct Token {
    /// Whose it is, for people and for what is kept for a client.
    pub name: String,
    /// What it is good for.
    pub access: Access,
    /// The hash of the token itself, which is not kept.
    pub hash: TokenHash,
}

/// `[database]`: the SQLite file.
#[derive(Debug, Clone)]
pub struct Database {
    /// The file; `-wal`, `-shm` and `.lock` stand beside it.
    pub path: PathBuf,
    /// While as many payments wait for the writer, requests are refused with 503; and reads, while
    /// as many wait for the readers.
    pub queue_max: NonZeroUsize,
    /// How many threads answer reads.
    pub readers: NonZeroUsize,
    /// With less room on the disk no payment is taken; 0: whatever the room.
    pub min_free_bytes: u64,
}

/// `[payment]`
#[derive(Debug, Clone)]
pub struct Payment {
    /// The code of the currency whose smallest unit amounts are in.
    pub currency: String,
}

/// `[node]`
#[derive(Debug, Clone)]
pub struct Node {
    /// `None`: made at the first start and kept in the database.
    pub id: Option<NodeId>,
}

/// Where the outbox is published to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublisherKind {
    /// Straight to the delivery table of this process.
    Application,
    /// To a topic of Apache Kafka.
    Kafka,
}

/// `[publisher]`
#[derive(Debug, Clone)]
pub struct Publisher {
    /// Which one.
    pub kind: PublisherKind,
    /// How many outbox rows are published at a time.
    pub batch_max: NonZeroUsize,
}

/// `[kafka]`
#[derive(Debug, Clone)]
pub struct Kafka {
    /// Where to ask for the cluster.
    pub bootstrap_servers: Vec<String>,
    /// The topic of the events.
    pub topic: String,
    /// The consumer group.
    pub group: String,
    /// How many partitions the topic gets if it is created here.
    pub partitions: i32,
    /// What holds when this process dies at the wrong moment.
    pub delivery: Delivery,
    /// How many records that are not this node's events, or cannot be read, are kept as open dead
    /// letters.
    pub dead_records_max: NonZeroUsize,
    /// Behind which lock, and as whom.
    pub security: KafkaSecurity,
}

/// How events are handed to Kafka.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// In a transaction a batch.
    ExactlyOnce,
    /// By an idempotent producer.
    AtLeastOnce,
}

/// The keys of `[kafka]` about TLS and SASL. The default is neither.
#[derive(Debug, Clone, Default)]
pub struct KafkaSecurity {
    /// `None`: everything goes over the wire in clear.
    pub tls: Option<KafkaTls>,
    /// `None`: the broker is not told who calls, except by a certificate.
    pub sasl: Option<KafkaSasl>,
}

impl KafkaSecurity {
    /// Whether anybody on the way can read the password.
    pub fn shows_password(&self) -> bool {
        self.tls.is_none()
            && self
                .sasl
                .as_ref()
                .is_some_and(|sasl| sasl.mechanism == SaslMechanism::Plain)
    }
}

/// TLS to the brokers.
#[derive(Debug, Clone, Default)]
pub struct KafkaTls {
    /// Whom to trust, instead of the built-in list.
    pub ca_file: Option<PathBuf>,
    /// Who we are, for brokers that ask for a certificate.
    pub identity: Option<KafkaIdentity>,
}

/// A certificate of our own.
#[derive(Debug, Clone)]
pub struct KafkaIdentity {
    /// The certificate, then those that lead to its authority.
    pub certificate_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// Who we are, by a password.
#[derive(Debug, Clone)]
pub struct KafkaSasl {
    /// How it is told.
    pub mechanism: SaslMechanism,
    /// The name.
    pub username: String,
    /// The password.
    pub password: Secret,
}

/// How a password is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaslMechanism {
    /// As it is (RFC 4616).
    Plain,
    /// By a proof that one knows it (RFC 5802, RFC 7677).
    ScramSha256,
    /// The same with the longer hash.
    ScramSha512,
}

/// Where the messages of all channels go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sink {
    /// To a channel's webhook if it has one, else to the log.
    Auto,
    /// To the log.
    Log,
}

/// `[slack]`: the channel "default", and what all channels share.
#[derive(Debug, Clone)]
pub struct Slack {
    /// `None`: messages go to the log.
    pub webhook_url: Option<Secret>,
    /// How long one message may take, from connecting to the answer.
    pub timeout: Duration,
    /// How many messages a second the channel takes for long.
    pub messages_per_second: f64,
    /// How many messages may go out at once after a quiet time.
    pub burst: NonZeroUsize,
    /// When more payments wait, they are told together.
    pub digest_over: usize,
    /// How many payments one message tells at most.
    pub digest_max: NonZeroUsize,
    /// When more payments wait, one message counts them all; 0: never.
    pub summary_over: usize,
    /// Where messages go.
    pub sink: Sink,
    /// How often a paused channel is tried.
    pub probe_interval: Duration,
    /// What is said of a COMPLETED payment.
    pub line_completed: Template,
    /// What is said of a FAILED payment.
    pub line_failed: Template,
    /// In which zone times are shown.
    pub time_zone: Zone,
    /// The proxy on the way to Slack, perhaps with a password.
    pub proxy: Option<Secret>,
    /// Whom to trust on the way to Slack, instead of the built-in list.
    pub ca_file: Option<PathBuf>,
    /// More channels; the first that fits a payment tells it.
    pub routes: Vec<Route>,
}

/// `[[slack.route]]`: a channel for some payments.
#[derive(Debug, Clone)]
pub struct Route {
    /// Its name, for people and in the database.
    pub name: String,
    /// Where its messages go.
    pub webhook_url: Option<Secret>,
    /// `None`: either.
    pub status: Option<Status>,
    /// Which amounts.
    pub amount: RangeInclusive<i64>,
    /// Which users.
    pub user: RangeInclusive<i64>,
    /// As for the channel "default".
    pub messages_per_second: f64,
}

/// The channel that tells what fits no route.
pub const DEFAULT_CHANNEL: &str = "default";

/// `[scheduler]`
#[derive(Debug, Clone)]
pub struct Scheduler {
    /// How often it looks.
    pub interval: Duration,
    /// How long after its last attempt an unpublished event counts as stuck.
    pub retry_after: Duration,
    /// How long what is published and delivered is kept.
    pub retention: Duration,
}

/// `[idempotency]`: the answers that are kept for requests with an Idempotency-Key.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// For how long.
    pub retention: Duration,
    /// How many at most; the oldest go first.
    pub keys_max: NonZeroUsize,
}

/// Everything that is wrong with a configuration.
#[derive(Debug)]
pub struct Problems(Vec<String>);

impl Problems {
    /// A single one, found after reading.
    pub fn one(problem: impl Into<String>) -> Self {
        Self(vec![problem.into()])
    }

    /// Those that were found after reading, if there are any.
    pub fn none_of(problems: Vec<String>) -> Result<(), Self> {
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Self(problems))
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(
            f,
            "the configuration has {count} problem{}:",
            if count == 1 { "" } else { "s" }
        )?;
        for problem in &self.0 {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The configuration and how it came to be, for `check-config`.
#[derive(Debug)]
pub struct Loaded {
    /// The checked values.
    pub config: Config,
    /// The effective configuration as TOML, secrets masked, each key with where its value came
    /// from.
    pub effective: String,
    /// Variables that look like ours and name no key.
    pub ignored_variables: Vec<String>,
    /// Each key's value as it was given.
    values: BTreeMap<String, Secret>,
}

impl Loaded {
    /// The keys in which another configuration differs, but for the tokens: they alone can change
    /// while payrelay runs.
    pub fn differing<'a>(&'a self, other: &'a Self) -> BTreeSet<&'a str> {
        let keys = self.values.keys().chain(other.values.keys());
        let differs = |key: &&String| {
            !key.starts_with("http.token[") && self.values.get(*key) != other.values.get(*key)
        };
        keys.filter(differs).map(String::as_str).collect()
    }
}

const FOREVER: Duration = Duration::from_hours(3650 * 24);
const MS: Duration = Duration::from_millis(1);

/// Variables that are ours without being keys.
const OTHER_VARIABLES: [&str; 2] = ["PAYRELAY_CONFIG", "PAYRELAY_LOG"];

impl Config {
    /// Checks the text of a configuration file together with the environment.
    pub fn load(file: &str, environment: &BTreeMap<String, String>) -> Result<Loaded, Problems> {
        let table = file
            .parse()
            .map_err(|error| Problems::one(not_toml(file, &error)))?;
        let mut source = Source::new(table, environment);
        let config = Self::read(&mut source);
        source.finish(config)
    }

    /// Every key there is.
    fn read(s: &mut Source<'_>) -> Self {
        Self {
            http: Self::read_http(s),
            database: Database {
                path: s.path("database.path", "payrelay.db"),
                queue_max: s.count("database.queue_max", 4096, 1..=1_000_000),
                readers: s.count("database.readers", 2, 1..=64),
                min_free_bytes: s.integer("database.min_free_bytes", 67_108_864, 0..=1 << 50),
            },
            payment: Payment {
                currency: s.text(
                    "payment.currency",
                    "KRW",
                    "three capital letters (ISO 4217)",
                    |text| text.len() == 3 && text.bytes().all(|b| b.is_ascii_uppercase()),
                ),
            },
            node: Node {
                id: NodeId::parse(&s.text(
                    "node.id",
                    "",
                    "empty, or 1 to 64 letters, digits, '.', '_' and '-'",
                    |text| text.is_empty() || NodeId::parse(text).is_some(),
                )),
            },
            publisher: Publisher {
                kind: s.choice(
                    "publisher.kind",
                    &[
                        ("application", PublisherKind::Application),
                        ("kafka", PublisherKind::Kafka),
                    ],
                ),
                batch_max: s.count("publisher.batch_max", 1000, 1..=1000),
            },
            kafka: Kafka {
                bootstrap_servers: s.list(
                    "kafka.bootstrap_servers",
                    &["127.0.0.1:9092"],
                    "one or more \"host:port\"",
                    is_host_and_port,
                ),
                topic: s.text("kafka.topic", "payment-event", TOPIC_ALLOWED, is_topic),
                group: s.text(
                    "kafka.group",
                    "payment-group",
                    "1 to 255 characters",
                    |text| (1..=255).contains(&text.len()),
                ),
                partitions: s.integer("kafka.partitions", 1, 1..=10_000),
                delivery: s.choice(
                    "kafka.delivery",
                    &[
                        ("exactly-once", Delivery::ExactlyOnce),
                        ("at-least-once", Delivery::AtLeastOnce),
                    ],
                ),
                dead_records_max: s.count("kafka.dead_records_max", 1000, 1..=1_000_000),
                security: Self::read_kafka_security(s),
            },
            slack: Self::read_slack(s),
            scheduler: Scheduler {
                interval: s.duration("scheduler.interval", "60s", 10 * MS..=FOREVER),
                retry_after: s.duration("scheduler.retry_after", "60s", MS..=FOREVER),
                retention: s.duration("scheduler.retention", "7d", MS..=FOREVER),
            },
            idempotency: Idempotency {
                retention: s.duration("idempotency.retention", "24h", MS..=FOREVER),
                keys_max: s.count("idempotency.keys_max", 1_000_000, 1..=1_000_000_000),
            },
        }
    }

    fn read_http(s: &mut Source<'_>) -> Http {
        let connections_max = s.count("http.connections_max", 4096, 1..=100_000);
        let half = i64::try_from(connections_max.get() / 2)
            .unwrap_or(i64::MAX)
            .max(1);
        let http = Http {
            listen: s.socket_address("http.listen", "127.0.0.1:8080"),
            body_bytes_max: s.integer("http.body_bytes_max", 262_144, 1024..=67_108_864),
            body_timeout: s.duration("http.body_timeout", "10s", MS..=FOREVER),
            header_timeout: s.duration("http.header_timeout", "30s", MS..=FOREVER),
            write_timeout: s.duration("http.write_timeout", "30s", MS..=FOREVER),
            connections_max,
            client_connections_max: s.count("http.client_connections_max", half, 1..=100_000),
            client_requests_per_second: NonZeroU32::new(s.integer(
                "http.client_requests_per_second",
                0,
                0..=1_000_000,
            )),
            client_body_bytes_max: s.integer("http.client_body_bytes_max", 33_554_432, BODIES),
            bodies_bytes_max: s.integer("http.bodies_bytes_max", 67_108_864, BODIES),
            public_url: some(s.text(
                "http.public_url",
                "",
                "empty, or an http:// or https:// URL without '<', '>' and '|'",
                |text| text.is_empty() || (is_url(text) && !text.contains(['<', '>', '|'])),
            )),
            tokens: (0..s.tables("http.token"))
                .filter_map(|index| Self::read_token(s, index))
                .collect(),
        };
        for (key, room) in [
            ("client_body_bytes_max", http.client_body_bytes_max),
            ("bodies_bytes_max", http.bodies_bytes_max),
        ] {
            if room < http.body_bytes_max {
                s.problem(format!(
                    "http.{key} is smaller than http.body_bytes_max: a body of that size would \
                        never be taken"
                ));
            }
        }
        if http.client_connections_max > http.connections_max {
            s.problem(
                "http.client_connections_max is larger than http.connections_max: set it to as \
                    many where one address, such as a proxy's, may have them all"
                    .to_owned(),
            );
        }
        if s.tables("http.token") == 0 && !is_loopback(http.listen) {
            s.problem(format!(
                "http.listen = \"{}\": whoever reaches this address could pay and give orders: \
                    set an [[http.token]] (`payrelay token` makes one), or listen on 127.0.0.1",
                http.listen
            ));
        }
        http
    }

    fn read_token(s: &mut Source<'_>, index: usize) -> Option<Token> {
        let key = |name: &str| format!("http.token[{index}].{name}");
        let name = s.text(
            &key("name"),
            "",
            "1 to 32 letters, digits, '.', '_' and '-'",
            |text| {
                text.len() <= 32
                    && text
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            },
        );
        let access = s.choice(&key("access"), &Access::NAMED);
        let hash = s.secret(&key("hash"), TokenHash::ALLOWED, |text| {
            TokenHash::parse(text).is_some()
        });
        let needed = [
            ("name", "the log and the limits know a client by it"),
            ("access", "say what the token is good for"),
            (
                "hash",
                "a token is known by it; `payrelay token` prints one",
            ),
        ];
        for (part, why) in needed {
            if !s.is_set(&key(part)) {
                s.problem(format!("{} is missing: {why}", key(part)));
            }
        }
        if !name.is_empty() {
            s.unique(&key("name"), &name);
        }
        let hash = hash.and_then(|hash| TokenHash::parse(hash.expose()))?;
        s.unlike(&key("hash"), &hash.expose());
        Some(Token { name, access, hash })
    }

    fn read_kafka_security(s: &mut Source<'_>) -> KafkaSecurity {
        let tls = s.choice("kafka.security", &[("plaintext", None), ("tls", Some(()))]);
        let files = ["kafka.ca_file", "kafka.certificate_file", "kafka.key_file"];
        let [ca_file, certificate_file, key_file] = files.map(|key| {
            some(s.text(key, "", "empty, or the path of a PEM file", |_| true)).map(PathBuf::from)
        });
        for key in files.into_iter().filter(|_| tls.is_none()) {
            if s.is_set(key) {
                s.problem(format!(
                    "{key} is set, and is only used with kafka.security = \"tls\""
                ));
            }
        }
        let [_, certificate, key] = files;
        let identity = match (certificate_file, key_file) {
            (Some(certificate_file), Some(key_file)) => Some(KafkaIdentity {
                certificate_file,
                key_file,
            }),
            (None, None) => None,
            (Some(_), None) => {
                s.problem(format!(
                    "{key} is missing: {certificate} is of no use without its key"
                ));
                None
            }
            (None, Some(_)) => {
                s.problem(format!(
                    "{certificate} is missing: {key} is of no use without its certificate"
                ));
                None
            }
        };
        let tls = tls.map(|()| KafkaTls { ca_file, identity });

        let mechanism = s.choice(
            "kafka.sasl_mechanism",
            &[
                ("", None),
                ("PLAIN", Some(SaslMechanism::Plain)),
                ("SCRAM-SHA-256", Some(SaslMechanism::ScramSha256)),
                ("SCRAM-SHA-512", Some(SaslMechanism::ScramSha512)),
            ],
        );
        // PLAIN separates the two by NUL (RFC 4616).
        let without_nul = |text: &str| !text.contains('\0');
        let username = some(s.text("kafka.sasl_username", "", "a name without NUL", without_nul));
        let password = s.secret("kafka.sasl_password", "a password without NUL", without_nul);
        for (key, here) in [
            ("kafka.sasl_username", username.is_some()),
            ("kafka.sasl_password", password.is_some()),
        ] {
            if mechanism.is_some() && !here && !s.is_set(key) {
                s.problem(format!("{key} is missing: kafka.sasl_mechanism needs it"));
            }
            if mechanism.is_none() && here {
                s.problem(format!(
                    "{key} is set, and is only used with a kafka.sasl_mechanism"
                ));
            }
        }
        let sasl = match (mechanism, username, password) {
            (Some(mechanism), Some(username), Some(password)) => Some(KafkaSasl {
                mechanism,
                username,
                password,
            }),
            _ => None,
        };
        KafkaSecurity { tls, sasl }
    }

    fn read_slack(s: &mut Source<'_>) -> Slack {
        let webhook = "empty, or an http:// or https:// URL";
        Slack {
            webhook_url: Self::webhook(s, "slack.webhook_url", webhook),
            timeout: s.duration("slack.timeout", "5s", MS..=SLACK_TIMEOUT_MAX),
            messages_per_second: s.number("slack.messages_per_second", 1.0, PACE),
            burst: s.count("slack.burst", 3, 1..=1000),
            digest_over: s.integer("slack.digest_over", 5, 0..=1_000_000_000),
            digest_max: s.count("slack.digest_max", 200, 1..=500),
            summary_over: s.integer("slack.summary_over", 1000, 0..=1_000_000_000),
            sink: s.choice("slack.sink", &[("auto", Sink::Auto), ("log", Sink::Log)]),
            probe_interval: s.duration("slack.probe_interval", "5m", MS..=FOREVER),
            line_completed: s.template(
                "slack.line_completed",
                "Payment {id} COMPLETED: user {user_id} paid {amount} {currency} for reservation \
                    {reservation_id}",
            ),
            line_failed: s.template(
                "slack.line_failed",
                "Payment {id} FAILED: user {user_id}, reservation {reservation_id}: {failure}",
            ),
            time_zone: s.zone("slack.time_zone", "UTC"),
            proxy: s.secret(
                "slack.proxy",
                "empty, or an http:// or https:// URL",
                is_url,
            ),
            ca_file: some(s.text(
                "slack.ca_file",
                "",
                "empty, or the path of a file with PEM \
                certificates",
                |_| true,
            ))
            .map(PathBuf::from),
            routes: (0..s.tables("slack.route"))
                .map(|index| Self::read_route(s, index))
                .collect(),
        }
    }

    /// Two channels with one webhook would post twice as fast as Slack allows.
    fn webhook(s: &mut Source<'_>, key: &str, allowed: &str) -> Option<Secret> {
        let url = s.secret(key, allowed, is_url);
        if let Some(url) = &url
            && let Some(other) = s
                .names
                .insert(format!("webhook {}", url.expose()), key.to_owned())
        {
            s.problem(format!(
                "{key} is the same as {other}: each channel needs a webhook of its own"
            ));
        }
        url
    }

    fn read_route(s: &mut Source<'_>, index: usize) -> Route {
        let key = |name: &str| format!("slack.route[{index}].{name}");
        let name = s.text(
            &key("name"),
            "",
            "1 to 32 lower-case letters, digits and '-', not \"default\"",
            |text| {
                text.len() <= 32
                    && text
                        .bytes()
                        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                    && text != DEFAULT_CHANNEL
            },
        );
        if !s.is_set(&key("name")) {
            s.problem(format!(
                "{} is missing: people and the database know a channel by it",
                key("name")
            ));
        } else if !name.is_empty() {
            s.unique(&key("name"), &name);
        }
        let webhook_url = Self::webhook(s, &key("webhook_url"), "an http:// or https:// URL");
        if !s.is_set(&key("webhook_url")) {
            s.problem(format!(
                "{} is missing: a route needs a webhook of its own",
                key("webhook_url")
            ));
        }
        let either = [
            ("", None),
            ("COMPLETED", Some(Status::Completed)),
            ("FAILED", Some(Status::Failed)),
        ];
        let status = s.choice(&key("status"), &either);
        let all = 0..=i64::MAX;
        let amount = s.integer(&key("amount_min"), 0, all.clone())
            ..=s.integer(&key("amount_max"), i64::MAX, all.clone());
        let user = s.integer(&key("user_min"), 0, all.clone())
            ..=s.integer(&key("user_max"), i64::MAX, all);
        for (range, what) in [(&amount, "amount"), (&user, "user")] {
            if range.is_empty() {
                s.problem(format!(
                    "{} is larger than {what}_max: no payment would fit",
                    key(&format!("{what}_min"))
                ));
            }
        }
        let messages_per_second = s.number(&key("messages_per_second"), 1.0, PACE);
        Route {
            name,
            webhook_url,
            status,
            amount,
            user,
            messages_per_second,
        }
    }
}

/// Bytes of bodies under way.
const BODIES: RangeInclusive<i64> = 1024..=68_719_476_736;

/// Messages a second. Slack takes one; stand-ins and other services may take more.
const PACE: RangeInclusive<f64> = 0.001..=100_000.0;

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// A POST cannot be broken off, and a stop has to end within 10 s (`service::STOP_LIMIT`).
const SLACK_TIMEOUT_MAX: Duration = Duration::from_secs(8);

/// Without the line at fault, which may hold a secret.
fn not_toml(file: &str, error: &toml::de::Error) -> String {
    let before = error
        .span()
        .and_then(|span| file.get(..span.start))
        .unwrap_or("");
    format!(
        "not TOML: line {}: {}",
        before.matches('\n').count() + 1,
        error.message()
    )
}

const TOPIC_ALLOWED: &str = "1 to 249 letters, digits, '.', '_' and '-', not \".\" or \"..\"";

fn is_topic(text: &str) -> bool {
    (1..=249).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && text != "."
        && text != ".."
}

fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let number =
        port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    let address = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let named = !host.is_empty()
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    number && address.map_or(named, |address| address.parse::<Ipv6Addr>().is_ok())
}

fn is_url(text: &str) -> bool {
    let host = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    host.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'))
        && text.bytes().all(|b| b.is_ascii_graphic())
}

/// The raw values, asked for one key at a time.
struct Source<'a> {
    file: BTreeMap<String, Value>,
    environment: &'a BTreeMap<String, String>,
    asked: BTreeSet<String>,
    /// How many tables an array of tables has, by its key.
    tables: BTreeMap<String, usize>,
    /// Names that must not be given twice, with the key that gave them.
    names: BTreeMap<String, String>,
    variables: BTreeSet<String>,
    effective: Vec<(String, String, &'static str)>,
    values: BTreeMap<String, Secret>,
    problems: Vec<String>,
}

impl<'a> Source<'a> {
    fn new(table: toml::Table, environment: &'a BTreeMap<String, String>) -> Self {
        let mut source = Self {
            file: BTreeMap::new(),
            environment,
            asked: BTreeSet::new(),
            tables: BTreeMap::new(),
            names: BTreeMap::new(),
            variables: BTreeSet::new(),
            effective: Vec::new(),
            values: BTreeMap::new(),
            problems: Vec::new(),
        };
        for (section, value) in table {
            match value {
                Value::Table(keys) => {
                    for (key, value) in keys {
                        source.insert(format!("{section}.{key}"), value);
                    }
                }
                value => {
                    source.file.insert(section, value);
                }
            }
        }
        source
    }

    /// An array of tables becomes the keys of each.
    fn insert(&mut self, key: String, value: Value) {
        match value {
            Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_table) => {
                self.tables.insert(key.clone(), items.len());
                for (index, item) in items.into_iter().enumerate() {
                    let keys = item.as_table().cloned().unwrap_or_default();
                    self.file.extend(
                        keys.into_iter()
                            .map(|(name, value)| (format!("{key}[{index}].{name}"), value)),
                    );
                }
            }
            value => {
                self.file.insert(key, value);
            }
        }
    }

    /// How many tables there are in an array of tables.
    fn tables(&self, key: &str) -> usize {
        self.tables.get(key).copied().unwrap_or(0)
    }

    /// Whether somebody has set a key that was asked for already, rightly or wrongly.
    fn is_set(&self, key: &str) -> bool {
        self.effective
            .iter()
            .any(|(asked, value, origin)| asked == key && *origin != "default" && value != "\"\"")
    }

    fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// No other table of the same array has that name.
    fn unique(&mut self, key: &str, name: &str) {
        if let Some(other) = self.known(key, name) {
            self.problem(format!("{key} = {name:?}: {other} is called so already"));
        }
    }

    /// The same for a secret.
    fn unlike(&mut self, key: &str, secret: &str) {
        if let Some(other) = self.known(key, secret) {
            self.problem(format!("{key} is the same as {other}"));
        }
    }

    fn known(&mut self, key: &str, value: &str) -> Option<String> {
        let array = key.split('[').next().unwrap_or(key);
        self.names
            .insert(format!("{array} {value}"), key.to_owned())
    }

    /// The one way to a value: the environment, else the file, else the default.
    fn take<T>(
        &mut self,
        key: &str,
        default: &Value,
        allowed: &str,
        secret: bool,
        parse: impl Fn(&Value) -> Option<T>,
    ) -> T {
        self.asked.insert(key.to_owned());
        let (value, origin) = match self.variable(key, secret) {
            Some(text) => (adopt(text, default), "environment"),
            None => match self.file.get(key) {
                Some(value) => (value.clone(), "file"),
                None => (default.clone(), "default"),
            },
        };
        // Variables know a table by its number: if one before it goes, they would speak of another.
        if key.contains('[')
            && origin == "environment"
            && self.file.get(key).is_some_and(|v| v.as_str() != Some(""))
        {
            self.problems.push(format!(
                "{key} is set in the file and in the environment: set it in one of them"
            ));
        }
        let shown = if secret && value.as_str() != Some("") {
            "\"***\"".to_owned()
        } else {
            value.to_string()
        };
        let parsed = parse(&value).unwrap_or_else(|| {
            self.problems
                .push(format!("{key} = {shown} ({origin}): allowed is {allowed}"));
            match parse(default) {
                Some(value) => value,
                None => unreachable!("the default of {key} is not allowed"),
            }
        });
        self.effective.push((key.to_owned(), shown, origin));
        self.values
            .insert(key.to_owned(), Secret(value.to_string()));
        parsed
    }

    /// A key's environment variable; a secret's may name a file that holds it.
    fn variable(&mut self, key: &str, secret: bool) -> Option<String> {
        let name = format!(
            "PAYRELAY_{}",
            key.replace(['.', '['], "_").replace(']', "").to_uppercase()
        );
        let file_name = format!("{name}_FILE");
        let set = |name: &String| {
            self.environment
                .get(name)
                .filter(|value| !value.is_empty())
                .cloned()
        };
        let value = set(&name);
        self.variables.insert(name.clone());
        if !secret {
            return value;
        }
        self.variables.insert(file_name.clone());
        let Some(path) = set(&file_name) else {
            return value;
        };
        if value.is_some() {
            self.problems.push(format!(
                "{name} and {file_name} are both set: set one of them"
            ));
        }
        // Neither the path nor the content is shown: either may be the secret, given by mistake.
        match std::fs::read_to_string(path) {
            Ok(text) if text.trim().is_empty() => self
                .problems
                .push(format!("{file_name}: the file is empty")),
            // Editors end a line, and a secret may well begin or end with a space.
            Ok(text) => {
                let line = text.strip_suffix('\n').unwrap_or(&text);
                return Some(line.strip_suffix('\r').unwrap_or(line).to_owned());
            }
            Err(error) => self
                .problems
                .push(format!("{file_name}: the file cannot be read: {error}")),
        }
        value
    }

    fn text(
        &mut self,
        key: &str,
        default: &str,
        allowed: &str,
        check: impl Fn(&str) -> bool,
    ) -> String {
        self.take(key, &Value::from(default), allowed, false, |value| {
            value.as_str().filter(|text| check(text)).map(str::to_owned)
        })
    }

    fn secret(&mut self, key: &str, allowed: &str, check: impl Fn(&str) -> bool) -> Option<Secret> {
        let text = self.take(key, &Value::from(""), allowed, true, |value| {
            value
                .as_str()
                .filter(|text| text.is_empty() || check(text))
                .map(str::to_owned)
        });
        (!text.is_empty()).then_some(Secret(text))
    }

    fn socket_address(&mut self, key: &str, default: &str) -> SocketAddr {
        let allowed = "\"address:port\", such as \"127.0.0.1:8080\"";
        self.take(key, &Value::from(default), allowed, false, |value| {
            value.as_str()?.parse().ok()
        })
    }

    fn path(&mut self, key: &str, default: &str) -> PathBuf {
        let allowed = "the path of a file on the disk (:memory: and URIs are none)";
        let is_file =
            |text: &&str| !text.is_empty() && *text != ":memory:" && !text.starts_with("file:");
        self.take(key, &Value::from(default), allowed, false, |value| {
            value.as_str().filter(is_file).map(PathBuf::from)
        })
    }

    fn integer<T>(&mut self, key: &str, default: i64, range: RangeInclusive<i64>) -> T
    where
        T: TryFrom<i64>,
    {
        let allowed = format!("an integer from {} to {}", range.start(), range.end());
        self.take(key, &Value::from(default), &allowed, false, |value| {
            value
                .as_integer()
                .filter(|number| range.contains(number))
                .and_then(|number| T::try_from(number).ok())
        })
    }

    fn number(&mut self, key: &str, default: f64, range: RangeInclusive<f64>) -> f64 {
        let allowed = format!("a number from {} to {}", range.start(), range.end());
        self.take(key, &Value::from(default), &allowed, false, |value| {
            #[expect(
                clippy::cast_precision_loss,
                reason = "the range has no such large numbers"
            )]
            let number = value
                .as_float()
                .or_else(|| value.as_integer().map(|number| number as f64));
            number.filter(|number| range.contains(number))
        })
    }

    fn template(&mut self, key: &str, default: &str) -> Template {
        self.take(
            key,
            &Value::from(default),
            Template::ALLOWED,
            false,
            |value| Template::parse(value.as_str()?),
        )
    }

    fn zone(&mut self, key: &str, default: &str) -> Zone {
        let allowed = "a name of the IANA time zone database, such as \"Asia/Seoul\"";
        self.take(key, &Value::from(default), allowed, false, |value| {
            Zone::parse(value.as_str()?)
        })
    }

    fn count(&mut self, key: &str, default: i64, range: RangeInclusive<i64>) -> NonZeroUsize {
        let number = self.integer::<usize>(key, default, range);
        NonZeroUsize::new(number).unwrap_or(NonZeroUsize::MIN)
    }

    fn duration(&mut self, key: &str, default: &str, range: RangeInclusive<Duration>) -> Duration {
        let allowed = format!(
            "a number and a unit (ms, s, m, h, d), from {} to {}",
            show_duration(*range.start()),
            show_duration(*range.end())
        );
        self.take(key, &Value::from(default), &allowed, false, |value| {
            parse_duration(value.as_str()?).filter(|span| range.contains(span))
        })
    }

    fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> T {
        let names: Vec<_> = choices
            .iter()
            .map(|(name, _)| format!("{name:?}"))
            .collect();
        self.take(
            key,
            &Value::from(choices[0].0),
            &names.join(" or "),
            false,
            |value| {
                let text = value.as_str()?;
                choices
                    .iter()
                    .find(|(name, _)| *name == text)
                    .map(|(_, choice)| *choice)
            },
        )
    }

    fn list(
        &mut self,
        key: &str,
        default: &[&str],
        allowed: &str,
        check: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        self.take(
            key,
            &Value::from(default.to_vec()),
            allowed,
            false,
            |value| {
                let items = value
                    .as_array()?
                    .iter()
                    .map(|item| item.as_str().filter(|text| check(text)).map(str::to_owned));
                items
                    .collect::<Option<Vec<_>>>()
                    .filter(|items| !items.is_empty())
            },
        )
    }

    /// A key that was not asked for does not exist. A variable under one of our sections is a key
    /// that is spelt wrongly, unless it has the shape of those that container runtimes set.
    fn finish(mut self, config: Config) -> Result<Loaded, Problems> {
        for key in self
            .file
            .keys()
            .filter(|key| !self.asked.contains(key.as_str()))
        {
            self.problems.push(format!(
                "{key}: there is no such key; config.toml in the source lists them all"
            ));
        }
        let sections: BTreeSet<_> = self
            .asked
            .iter()
            .filter_map(|key| key.split('.').next())
            .collect();
        let mut ignored_variables = Vec::new();
        for name in self
            .environment
            .keys()
            .filter(|name| !self.variables.contains(*name))
        {
            let Some(rest) = name
                .strip_prefix("PAYRELAY_")
                .filter(|_| !OTHER_VARIABLES.contains(&name.as_str()))
            else {
                continue;
            };
            let value = self.environment.get(name).map_or("", String::as_str);
            if value.is_empty() {
                continue;
            }
            let section = rest.split('_').next().unwrap_or("").to_lowercase();
            if sections.contains(section.as_str()) && !is_of_a_container_runtime(name, value) {
                self.problems.push(format!(
                    "{name}: there is no such key; config.toml in the source lists them all"
                ));
            } else {
                ignored_variables.push(name.clone());
            }
        }
        if !self.problems.is_empty() {
            return Err(Problems(self.problems));
        }
        Ok(Loaded {
            config,
            effective: render(&self.effective),
            ignored_variables,
            values: self.values,
        })
    }
}

/// What Kubernetes sets for a service called payrelay-kafka, and Docker for a link
/// (<https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>).
fn is_of_a_container_runtime(name: &str, value: &str) -> bool {
    let address = ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.starts_with(scheme));
    let numbered = |(_, rest): (&str, &str)| {
        let mut parts = rest.split('_');
        let number = parts.next().is_some_and(|part| part.parse::<u16>().is_ok());
        number
            && parts
                .next()
                .is_some_and(|part| ["TCP", "UDP", "SCTP"].contains(&part))
    };
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || (name.ends_with("_PORT") && address)
        || name.rsplit_once("_PORT_").is_some_and(numbered)
        || name.split_once("_PORT_").is_some_and(numbered)
        || (name.ends_with("_NAME") && value.starts_with('/'))
        || name.contains("_ENV_")
}

/// A variable's text as the type that the key has.
fn adopt(text: String, default: &Value) -> Value {
    match default {
        Value::Integer(_) => text.parse().map_or(Value::String(text), Value::Integer),
        Value::Float(_) => text.parse().map_or(Value::String(text), Value::Float),
        Value::Array(_) => Value::from(text.split(',').map(str::trim).collect::<Vec<_>>()),
        _ => Value::String(text),
    }
}

fn render(effective: &[(String, String, &'static str)]) -> String {
    let mut text = String::new();
    let mut current = "";
    for (key, value, origin) in effective {
        let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
        if section != current {
            let gap = if current.is_empty() { "" } else { "\n" };
            let _ = match section.split_once('[') {
                None => writeln!(text, "{gap}[{section}]"),
                Some((array, _)) => writeln!(text, "{gap}[[{array}]]"),
            };
            current = section;
        }
        let _ = writeln!(text, "{name} = {value} # {origin}");
    }
    text
}

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
    Some(Duration::from_millis(
        number.parse::<u64>().ok()?.checked_mul(*factor)?,
    ))
}

fn show_duration(span: Duration) -> String {
    let ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let (unit, factor) = UNITS
        .iter()
        .rev()
        .find(|(_, factor)| ms >= *factor && ms.is_multiple_of(*factor))
        .unwrap_or(&UNITS[0]);
    format!("{}{unit}", ms / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../config.toml");

    fn load(file: &str, variables: &[(&str, &str)]) -> Result<Loaded, Problems> {
        let environment = variables
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        Config::load(file, &environment)
    }

    fn values(effective: &str) -> String {
        let lines = effective
            .lines()
            .map(|line| line.split(" # ").next().unwrap_or_default());
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_shipped_file_has_every_key_at_its_default() {
        let shipped = load(SHIPPED, &[]).unwrap().effective;
        assert!(
            !shipped.contains("# default"),
            "config.toml lacks a key:\n{shipped}"
        );
        assert_eq!(values(&shipped), values(&load("", &[]).unwrap().effective));
    }

    #[test]
    fn the_shipped_file_comments_every_key() {
        let lines: Vec<_> = SHIPPED.lines().collect();
        for pair in lines
            .windows(2)
            .filter(|pair| pair[1].contains(" = ") && !pair[1].starts_with('#'))
        {
            assert!(pair[0].starts_with('#'), "no comment above {:?}", pair[1]);
        }
    }

    #[test]
    fn the_environment_wins() {
        let variables = [
            ("PAYRELAY_HTTP_LISTEN", "127.0.0.1:9999"),
            ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "a:1, b:2"),
            ("PAYRELAY_KAFKA_PARTITIONS", "7"),
            ("PAYRELAY_PUBLISHER_KIND", "kafka"),
            ("PAYRELAY_LOG", "debug"),
            (
                "PAYRELAY_PORT_80_TCP",
                "a container runtime sets such names",
            ),
        ];
        let loaded = load("[http]\nlisten = '127.0.0.1:1'\n", &variables).unwrap();
        assert_eq!(loaded.config.http.listen.port(), 9999);
        assert_eq!(loaded.config.kafka.bootstrap_servers, ["a:1", "b:2"]);
        assert_eq!(loaded.config.kafka.partitions, 7);
        assert_eq!(loaded.config.publisher.kind, PublisherKind::Kafka);
        assert_eq!(loaded.ignored_variables, ["PAYRELAY_PORT_80_TCP"]);
    }

    #[test]
    fn tells_every_problem_at_once() {
        let file = "listen = 1\n[http]\nlisten = 'here'\nbody_bytes_max = '1'\nmax_body = \
            3\n[nonsense]\nx = 1\n[scheduler]\ninterval = '60'\nretention = \
            '99999999999999999d'\n[kafka]\nbootstrap_servers = []\ntopic = 'a b'\n";
        let problems = load(
            file,
            &[
                ("PAYRELAY_HTTP_CONNECTIONS_MAX", "many"),
                ("PAYRELAY_KAFKA_TOPICS", "x"),
            ],
        )
        .unwrap_err()
        .to_string();
        let expected = [
            "the configuration has 11 problems:",
            "PAYRELAY_KAFKA_TOPICS: there is no such key",
            "http.listen = \"here\" (file): allowed is \"address:port\"",
            "http.body_bytes_max = \"1\" (file): allowed is an integer from 1024 to 67108864",
            "http.connections_max = \"many\" (environment): allowed is an integer from 1 to 100000",
            "scheduler.interval = \"60\" (file): allowed is a number and a unit (ms, s, m, h, d), \
                from 10ms to 3650d",
            "scheduler.retention",
            "kafka.bootstrap_servers = [] (file): allowed is one or more \"host:port\"",
            "kafka.topic = \"a b\"",
            "listen: there is no such key",
            "http.max_body: there is no such key",
            "nonsense.x: there is no such key",
        ];
        for part in expected {
            assert!(
                problems.contains(part),
                "{part:?} is missing from:\n{problems}"
            );
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let url = "https://hooks.example/T0/B0/hush";
        for (file, variables) in [
            (format!("[slack]\nwebhook_url = '{url}'"), vec![]),
            (String::new(), vec![("PAYRELAY_SLACK_WEBHOOK_URL", url)]),
        ] {
            let loaded = load(&file, &variables).unwrap();
            assert_eq!(
                loaded.config.slack.webhook_url.as_ref().unwrap().expose(),
                url
            );
            assert!(!loaded.effective.contains("hush"));
            assert!(!format!("{:?}", loaded.config).contains("hush"));
        }
        let problems = load("[slack]\nwebhook_url = 'ftp://hush'", &[])
            .unwrap_err()
            .to_string();
        assert!(
            problems.contains("slack.webhook_url = \"***\"") && !problems.contains("hush"),
            "{problems}"
        );
        let unclosed = load(&format!("[slack]\nwebhook_url = \"{url}\n"), &[])
            .unwrap_err()
            .to_string();
        assert!(
            unclosed.contains("not TOML: line 2: ") && !unclosed.contains("hush"),
            "{unclosed}"
        );
    }

    const ROUTES: &str = "[[slack.route]]\nname = 'failures'\nwebhook_url = \
        'https://hooks.example/hush'\nstatus = 'FAILED'\n[[slack.route]]\nname = \
        'large'\namount_min = 5\nuser_max = 9\nmessages_per_second = 0.5\n";

    #[test]
    fn routes_are_read_in_their_order_and_their_secrets_are_masked() {
        let variables = [(
            "PAYRELAY_SLACK_ROUTE_1_WEBHOOK_URL",
            "https://hooks.example/hush-2",
        )];
        let loaded = load(ROUTES, &variables).unwrap();
        let [failures, large] = loaded.config.slack.routes.as_slice() else {
            panic!("two routes")
        };
        assert_eq!(
            (failures.name.as_str(), failures.status),
            ("failures", Some(Status::Failed))
        );
        assert_eq!(
            (&failures.amount, failures.messages_per_second),
            (&(0..=i64::MAX), 1.0)
        );
        assert_eq!((large.name.as_str(), large.status), ("large", None));
        assert_eq!(
            (&large.amount, &large.user, large.messages_per_second),
            (&(5..=i64::MAX), &(0..=9), 0.5)
        );
        assert_eq!(
            large.webhook_url.as_ref().unwrap().expose(),
            "https://hooks.example/hush-2"
        );
        assert_eq!(
            loaded.effective.matches("[[slack.route]]").count(),
            2,
            "{}",
            loaded.effective
        );
        assert!(!loaded.effective.contains("hush"), "{}", loaded.effective);
        assert!(!format!("{:?}", loaded.config).contains("hush"));
    }

    #[test]
    fn a_key_of_a_table_is_set_in_one_place() {
        let variables = [
            (
                "PAYRELAY_SLACK_ROUTE_0_WEBHOOK_URL",
                "https://hooks.example/hush",
            ),
            ("PAYRELAY_HTTP_TOKEN_0_ACCESS", "admin"),
        ];
        let file = ROUTES.to_owned() + &token("till", "read-only", HASH);
        let problems = load(&file, &variables).unwrap_err().to_string();
        for key in ["slack.route[0].webhook_url", "http.token[0].access"] {
            assert!(
                problems.contains(&format!("{key} is set in the file and in the environment")),
                "{problems}"
            );
        }
        assert!(!problems.contains("hush"), "{problems}");
    }

    #[test]
    fn a_route_that_cannot_be_is_told() {
        let file = "[[slack.route]]\nname = 'default'\nwebhook = 'x'\namount_min = 9\namount_max \
            = 3\n[[slack.route]]\nname = 'a'\nwebhook_url = 'https://x'\n[[slack.route]]\nname = \
            'a'\nwebhook_url = 'https://x'\n";
        let problems = load(file, &[("PAYRELAY_SLACK_ROUTE_7_NAME", "b")])
            .unwrap_err()
            .to_string();
        let expected = [
            "slack.route[0].name = \"default\" (file): allowed is",
            "slack.route[0].webhook_url is missing: a route needs a webhook of its own",
            "slack.route[0].webhook: there is no such key",
            "slack.route[0].amount_min is larger than amount_max",
            "slack.route[2].name = \"a\": slack.route[1].name is called so already",
            "PAYRELAY_SLACK_ROUTE_7_NAME: there is no such key",
        ];
        for part in expected {
            assert!(
                problems.contains(part),
                "{part:?} is missing from:\n{problems}"
            );
        }
        assert!(
            load("[slack]\nroute = 1\n", &[])
                .unwrap_err()
                .to_string()
                .contains("slack.route: there is no such key")
        );
    }

    #[test]
    fn kafka_over_tls_and_sasl_is_read_and_its_password_masked() {
        let file = "[kafka]\nsecurity = 'tls'\nca_file = 'ca.pem'\ncertificate_file = \
            'me.pem'\nkey_file = 'me.key'\nsasl_mechanism = 'SCRAM-SHA-512'\nsasl_username = \
            'payrelay'\n";
        let loaded = load(file, &[("PAYRELAY_KAFKA_SASL_PASSWORD", "pass-word")]).unwrap();
        let security = &loaded.config.kafka.security;
        let tls = security.tls.as_ref().unwrap();
        assert_eq!(tls.ca_file, Some(PathBuf::from("ca.pem")));
        assert_eq!(
            tls.identity.as_ref().unwrap().key_file,
            PathBuf::from("me.key")
        );
        let sasl = security.sasl.as_ref().unwrap();
        assert_eq!(
            (sasl.mechanism, sasl.username.as_str()),
            (SaslMechanism::ScramSha512, "payrelay")
        );
        assert_eq!(sasl.password.expose(), "pass-word");
        assert!(
            !loaded.effective.contains("pass-word")
                && !format!("{:?}", loaded.config).contains("pass-word")
        );
        assert!(!security.shows_password());
        let plain = "[kafka]\nsasl_mechanism = 'PLAIN'\nsasl_username = 'u'\nsasl_password = 'p'\n";
        assert!(
            load(plain, &[])
                .unwrap()
                .config
                .kafka
                .security
                .shows_password()
        );
        let default = load("", &[]).unwrap().config.kafka.security;
        assert!(default.tls.is_none() && default.sasl.is_none() && !default.shows_password());
    }

    #[test]
    fn half_of_a_kafka_security_is_told() {
        let cases = [
            ("certificate_file = 'a'", "kafka.key_file is missing"),
            ("key_file = 'a'", "kafka.certificate_file is missing"),
            (
                "ca_file = 'a'",
                "kafka.ca_file is set, and is only used with kafka.security = \"tls\"",
            ),
            (
                "security = 'ssl'",
                "kafka.security = \"ssl\" (file): allowed is \"plaintext\" or \"tls\"",
            ),
            (
                "sasl_mechanism = 'GSSAPI'",
                "kafka.sasl_mechanism = \"GSSAPI\" (file): allowed is",
            ),
            ("sasl_mechanism = 'PLAIN'", "kafka.sasl_username is missing"),
            ("sasl_mechanism = 'PLAIN'", "kafka.sasl_password is missing"),
            (
                "sasl_username = 'a'",
                "kafka.sasl_username is set, and is only used with a kafka.sasl_mechanism",
            ),
            (
                "sasl_password = 'pass-word'",
                "kafka.sasl_password is set, and is only used with",
            ),
            (
                "sasl_password = \"pass-word\\u0000\"",
                "kafka.sasl_password = \"***\" (file): allowed is",
            ),
        ];
        for (line, expected) in cases {
            let problems = load(&format!("[kafka]\n{line}\n"), &[])
                .unwrap_err()
                .to_string();
            assert!(
                problems.contains(expected) && !problems.contains("pass-word"),
                "{line}: {problems}"
            );
        }
        let all = "[kafka]\nca_file = 'a'\ncertificate_file = 'b'\nsasl_mechanism = 'PLAIN'\n";
        let problems = load(all, &[]).unwrap_err().to_string();
        assert!(problems.contains("5 problems"), "{problems}");
    }

    #[test]
    fn variables_of_container_runtimes_are_ignored_and_misspelt_ones_refused() {
        let set = [
            ("PAYRELAY_KAFKA_SERVICE_HOST", "10.0.0.1"),
            ("PAYRELAY_KAFKA_SERVICE_PORT", "9092"),
            ("PAYRELAY_KAFKA_SERVICE_PORT_CLIENT", "9092"),
            ("PAYRELAY_HTTP_PORT", "tcp://10.0.0.1:80"),
            ("PAYRELAY_HTTP_PORT_80_TCP", "tcp://10.0.0.1:80"),
            ("PAYRELAY_HTTP_PORT_80_TCP_ADDR", "10.0.0.1"),
            ("PAYRELAY_SLACK_NAME", "/app/payrelay-slack"),
            ("PAYRELAY_DATABASE_ENV_POSTGRES_USER", "x"),
        ];
        let loaded = load("", &set).unwrap();
        assert_eq!(
            loaded.ignored_variables.len(),
            set.len(),
            "{:?}",
            loaded.ignored_variables
        );
        for (name, value) in [
            ("PAYRELAY_HTTP_PORT", "8080"),
            ("PAYRELAY_KAFKA_HOST", "10.0.0.1"),
            ("PAYRELAY_SLACK_NAME", "general"),
            ("PAYRELAY_HTTP_PORT_X_TCP", "1"),
        ] {
            assert!(
                load("", &[(name, value)])
                    .unwrap_err()
                    .to_string()
                    .contains("there is no such key"),
                "{name}"
            );
        }
    }

    #[test]
    fn an_empty_variable_is_unset() {
        let file = "[slack]\nwebhook_url = 'https://a/b'\n[http]\nlisten = '127.0.0.1:1'\n";
        let empty = [
            "PAYRELAY_SLACK_WEBHOOK_URL",
            "PAYRELAY_SLACK_WEBHOOK_URL_FILE",
            "PAYRELAY_HTTP_LISTEN",
            "PAYRELAY_KAFKA_BOOTSTRAP_SERVERS",
            "PAYRELAY_KAFKA_PARTITIONS",
            "PAYRELAY_HTTP_LISTENN",
        ];
        let loaded = load(file, &empty.map(|name| (name, ""))).unwrap();
        assert_eq!(
            loaded.config.slack.webhook_url.unwrap().expose(),
            "https://a/b"
        );
        assert_eq!(loaded.config.http.listen.port(), 1);
        assert_eq!(loaded.config.kafka.partitions, 1);
    }

    #[test]
    fn two_channels_need_two_webhooks() {
        let route = |name: &str, url: &str| {
            format!("[[slack.route]]\nname = '{name}'\nwebhook_url = '{url}'\n")
        };
        let slack = "[slack]\nwebhook_url = 'https://a/1'\n";
        for routes in [
            route("x", "https://a/1"),
            route("x", "https://a/2") + &route("y", "https://a/2"),
        ] {
            let problem = load(&format!("{slack}{routes}"), &[])
                .unwrap_err()
                .to_string();
            assert!(
                problem.contains("each channel needs a webhook of its own")
                    && !problem.contains("https"),
                "{problem}"
            );
        }
        load(&format!("{slack}{}", route("x", "https://a/2")), &[]).unwrap();
    }

    #[test]
    fn a_bootstrap_server_is_a_host_and_a_port() {
        let server = |text: &str| load(&format!("[kafka]\nbootstrap_servers = ['{text}']"), &[]);
        for good in [
            "kafka:9092",
            "10.0.0.1:9092",
            "[::1]:9092",
            "kafka-1.shop.example:1",
            "my_kafka:9092",
        ] {
            assert!(server(good).is_ok(), "{good}");
        }
        let bad = [
            "http://kafka:9092",
            "PLAINTEXT://h:9092",
            "a:1 b:2",
            "kafka",
            "kafka:",
            ":9092",
            "kafka:0",
            "kafka:65536",
            "kafka:+1",
            "::1:9092",
            "[x]:9092",
            "",
        ];
        for text in bad {
            let problem = server(text).unwrap_err().to_string();
            assert!(
                problem.contains("kafka.bootstrap_servers"),
                "{text}: {problem}"
            );
        }
    }

    #[test]
    fn a_database_is_a_file() {
        for path in ["", ":memory:", "file:payrelay.db?mode=memory"] {
            let problem = load(&format!("[database]\npath = '{path}'"), &[])
                .unwrap_err()
                .to_string();
            assert!(
                problem.contains("allowed is the path of a file on the disk"),
                "{problem}"
            );
        }
    }

    #[test]
    fn one_line_end_of_a_secret_file_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        for (content, secret) in [
            ("s", "s"),
            ("s\n", "s"),
            ("s\r\n", "s"),
            (" s \n", " s "),
            ("s\n\n", "s\n"),
        ] {
            std::fs::write(&path, content).unwrap();
            let variables = [
                ("PAYRELAY_KAFKA_SASL_PASSWORD_FILE", path.to_str().unwrap()),
                ("PAYRELAY_KAFKA_SASL_MECHANISM", "SCRAM-SHA-256"),
                ("PAYRELAY_KAFKA_SASL_USERNAME", "u"),
            ];
            let environment: BTreeMap<_, _> = variables
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into();
            let mut source = Source::new(toml::Table::new(), &environment);
            assert_eq!(
                source.variable("kafka.sasl_password", true).as_deref(),
                Some(secret),
                "{content:?}"
            );
        }
    }

    #[test]
    fn a_secret_can_come_from_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("webhook");
        std::fs::write(&path, "https://hooks.example/T0\n").unwrap();
        let name = path.to_str().unwrap();
        let loaded = load("", &[("PAYRELAY_SLACK_WEBHOOK_URL_FILE", name)]).unwrap();
        assert_eq!(
            loaded.config.slack.webhook_url.unwrap().expose(),
            "https://hooks.example/T0"
        );
        let both = [
            ("PAYRELAY_SLACK_WEBHOOK_URL_FILE", name),
            ("PAYRELAY_SLACK_WEBHOOK_URL", "https://x"),
        ];
        assert!(
            load("", &both)
                .unwrap_err()
                .to_string()
                .contains("both set")
        );
        let missing = load("", &[("PAYRELAY_SLACK_WEBHOOK_URL_FILE", "/nowhere")])
            .unwrap_err()
            .to_string();
        assert!(
            missing.contains("PAYRELAY_SLACK_WEBHOOK_URL_FILE: the file cannot be read"),
            "{missing}"
        );
        std::fs::write(&path, " \n").unwrap();
        let empty = load("", &[("PAYRELAY_SLACK_WEBHOOK_URL_FILE", name)])
            .unwrap_err()
            .to_string();
        assert!(
            empty.contains("PAYRELAY_SLACK_WEBHOOK_URL_FILE: the file is empty"),
            "{empty}"
        );
    }

    const HASH: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn token(name: &str, access: &str, hash: &str) -> String {
        format!("[[http.token]]\nname = '{name}'\naccess = '{access}'\nhash = '{hash}'\n")
    }

    #[test]
    fn tokens_are_read_and_their_hashes_are_masked() {
        let other = HASH.replace("ba", "ab");
        let file = token("till-3", "full", HASH)
            + &token("monitoring", "read-only", "").replace("hash = ''\n", "");
        let loaded = load(&file, &[("PAYRELAY_HTTP_TOKEN_1_HASH", &other)]).unwrap();
        let [till, monitoring] = loaded.config.http.tokens.as_slice() else {
            panic!("two tokens")
        };
        assert_eq!(
            (till.name.as_str(), till.access, till.hash),
            ("till-3", Access::Full, TokenHash::of("abc"))
        );
        assert_eq!(
            (monitoring.name.as_str(), monitoring.access),
            ("monitoring", Access::ReadOnly)
        );
        assert_eq!(monitoring.hash.expose(), other);
        assert_eq!(
            loaded.effective.matches("[[http.token]]\n").count(),
            2,
            "{}",
            loaded.effective
        );
        for shown in [loaded.effective.clone(), format!("{loaded:?}")] {
            assert!(
                !shown.contains("ba7816bf") && !shown.contains("ab7816"),
                "{shown}"
            );
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hash");
        std::fs::write(&path, format!("{HASH}\n")).unwrap();
        let file = token("a", "admin", "").replace("hash = ''\n", "");
        let loaded = load(
            &file,
            &[("PAYRELAY_HTTP_TOKEN_0_HASH_FILE", path.to_str().unwrap())],
        )
        .unwrap();
        assert_eq!(loaded.config.http.tokens[0].hash, TokenHash::of("abc"));
    }

    #[test]
    fn a_token_that_cannot_be_is_told() {
        let file = "[[http.token]]\ntoken = 'x'\n".to_owned()
            + &token("a b", "root", "hush")
            + &token("c", "full", HASH)
            + &token("c", "full", &HASH.replace("ba", "BA"))
            + "[[slack.route]]\nname = 'c'\nwebhook_url = 'https://x'\n";
        let problems = load(&file, &[]).unwrap_err().to_string();
        let expected = [
            "the configuration has 9 problems:",
            "http.token[0].name is missing",
            "http.token[0].access is missing",
            "http.token[0].hash is missing",
            "http.token[0].token: there is no such key",
            "http.token[1].name = \"a b\" (file): allowed is 1 to 32 letters",
            "http.token[1].access = \"root\" (file): allowed is \"read-only\" or \"full\" or \
                \"admin\"",
            "http.token[1].hash = \"***\" (file): allowed is \"sha256:\" and 64 hexadecimal digits",
            "http.token[3].name = \"c\": http.token[2].name is called so already",
            "http.token[3].hash is the same as http.token[2].hash",
        ];
        for part in expected {
            assert!(
                problems.contains(part),
                "{part:?} is missing from:\n{problems}"
            );
        }
        assert!(
            !problems.contains("hush") && !problems.contains("7816bf"),
            "{problems}"
        );
    }

    #[test]
    fn only_with_a_token_others_than_this_machine_may_call() {
        for open in ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080"] {
            let file = format!("[http]\nlisten = '{open}'\n");
            let problems = load(&file, &[]).unwrap_err().to_string();
            assert!(
                problems.contains(&format!("http.listen = \"{open}\"")),
                "{problems}"
            );
            assert!(
                problems.contains("`payrelay token` makes one"),
                "{problems}"
            );
            load(&(file + &token("a", "full", HASH)), &[]).unwrap();
        }
        for closed in ["127.0.0.1:0", "127.1.2.3:1", "[::1]:1"] {
            load(&format!("[http]\nlisten = '{closed}'\n"), &[]).unwrap();
        }
    }

    #[test]
    fn a_body_fits_into_the_room_for_bodies() {
        let file = "[http]\nbody_bytes_max = 4096\nclient_body_bytes_max = 4095\nbodies_bytes_max \
            = 2048\n";
        let problems = load(file, &[]).unwrap_err().to_string();
        for key in [
            "http.client_body_bytes_max is smaller",
            "http.bodies_bytes_max is smaller",
        ] {
            assert!(problems.contains(key), "{problems}");
        }
    }

    #[test]
    fn one_address_has_half_of_the_connections_unless_more_are_given_to_it() {
        let of_one =
            |file| load(file, &[]).map(|loaded| loaded.config.http.client_connections_max.get());
        assert_eq!(of_one("").unwrap(), 2048);
        assert_eq!(of_one("[http]\nconnections_max = 1001\n").unwrap(), 500);
        assert_eq!(of_one("[http]\nconnections_max = 1\n").unwrap(), 1);
        assert_eq!(
            of_one("[http]\nconnections_max = 9\nclient_connections_max = 9\n").unwrap(),
            9
        );
        let problems = of_one("[http]\nconnections_max = 9\nclient_connections_max = 10\n")
            .unwrap_err()
            .to_string();
        assert!(
            problems.contains("http.client_connections_max is larger than http.connections_max"),
            "{problems}"
        );
    }

    #[test]
    fn fewer_connections_are_fewer_for_each_address() {
        let after = |connections: i64, of_one: i64, room| {
            let file = format!(
                "[http]\nconnections_max = {connections}\nclient_connections_max = {of_one}\n"
            );
            let mut http = load(&file, &[]).unwrap().config.http;
            http.serve_fewer(NonZeroUsize::new(room).unwrap());
            (
                http.connections_max.get(),
                http.client_connections_max.get(),
            )
        };
        assert_eq!(after(4096, 2048, 924), (924, 462), "half stays half");
        assert_eq!(
            after(4096, 4096, 924),
            (924, 924),
            "a proxy's address keeps them all"
        );
        assert_eq!(
            after(4096, 1000, 924),
            (924, 462),
            "never more than its share, or half"
        );
        assert_eq!(after(4096, 10, 924), (924, 10));
        assert_eq!(after(4096, 2048, 1), (1, 1));
    }

    #[test]
    fn what_differs_is_told_by_its_key_but_for_the_tokens() {
        let old = load(
            &("[slack]\nwebhook_url = 'https://a/1'\n".to_owned() + &token("a", "full", HASH)),
            &[],
        )
        .unwrap();
        let file = "[http]\nbody_timeout = '11s'\n[slack]\nwebhook_url = \
            'https://a/2'\n[[slack.route]]\nname = 'r'\nwebhook_url = 'https://x'\n[kafka]\ntopic \
            = 'payment-event'\n";
        let new = load(file, &[]).unwrap();
        let differing: Vec<_> = old
            .differing(&new)
            .into_iter()
            .filter(|key| !key.contains("route"))
            .collect();
        assert_eq!(
            differing,
            ["http.body_timeout", "slack.webhook_url"],
            "a default that is spelt out is no difference"
        );
        assert!(new.differing(&old).contains("slack.route[0].name"));
    }

    /// Files as they are; `#env NAME=value` in a line of its own is a variable.
    #[test]
    fn the_corpus_of_configurations() {
        let words = [
            "[http]\n",
            "[kafka]\n",
            "[slack]\n",
            "[[slack.route]]\n",
            "listen = ",
            "webhook_url = ",
            "sasl_password = ",
            "name = ",
            "\"https://hooks.example/s3cr3t-99\"",
            "\"\"\"",
            "\n",
            " = ",
            "\n#env PAYRELAY_KAFKA_TOPIC=",
            "\n#env PAYRELAY_KAFKA_SASL_PASSWORD=s3cr3t-98\n",
        ];
        crate::fuzz::corpus("config", 1500, &words, |bytes| {
            let file = String::from_utf8_lossy(bytes);
            let variables = file
                .lines()
                .filter_map(|line| line.strip_prefix("#env ")?.split_once('='));
            // A variable that names a file has it read.
            let environment: BTreeMap<_, _> = variables
                .filter(|(name, _)| name.starts_with("PAYRELAY_") && !name.ends_with("_FILE"))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            let outcome = Config::load(&file, &environment);
            let shown = match &outcome {
                Ok(loaded) => format!("{}{:?}", loaded.effective, loaded.config),
                Err(problems) => problems.to_string(),
            };
            if !tells_a_secret(&file, &environment) {
                assert!(!shown.contains("s3cr3t"), "{shown}");
            }
            match outcome {
                Ok(loaded) => {
                    // What is shown is a configuration, and the same one.
                    let mut text = loaded.effective.clone();
                    for number in 0.. {
                        let masked = format!("\"https://masked.example/{number}\"");
                        let next = text.replacen("\"***\"", &masked, 1);
                        if next == text {
                            break;
                        }
                        text = next;
                    }
                    let again =
                        load(&text, &[]).unwrap_or_else(|problems| panic!("{problems}\n{text}"));
                    assert_eq!(
                        format!("{:?}", again.config),
                        format!("{:?}", loaded.config)
                    );
                    true
                }
                Err(Problems(problems)) => {
                    assert!(
                        !problems.is_empty()
                            && problems.iter().all(|problem| problem.contains([':', ' '])),
                        "{shown}"
                    );
                    false
                }
            }
        });
    }

    /// Whether a secret stands where none belongs: as a key, or as the value of a key that is not
    /// secret.
    fn tells_a_secret(file: &str, environment: &BTreeMap<String, String>) -> bool {
        const SECRET: [&str; 3] = ["webhook_url", "proxy", "sasl_password"];
        fn elsewhere(table: &toml::Table) -> bool {
            table.iter().any(|(key, value)| {
                key.contains("s3cr3t")
                    || match value {
                        Value::Array(items) if SECRET.contains(&key.as_str()) => {
                            let tables = items.iter().filter_map(Value::as_table);
                            tables
                                .flat_map(toml::Table::keys)
                                .any(|key| key.contains("s3cr3t"))
                        }
                        _ if SECRET.contains(&key.as_str()) => false,
                        Value::Table(table) => elsewhere(table),
                        Value::Array(items) => items.iter().any(|item| match item {
                            Value::Table(table) => elsewhere(table),
                            item => item.to_string().contains("s3cr3t"),
                        }),
                        value => value.to_string().contains("s3cr3t"),
                    }
            })
        }
        let secret = |name: &str| SECRET.iter().any(|key| name.ends_with(&key.to_uppercase()));
        let variable = |(name, value): (&String, &String)| {
            name.contains("s3cr3t") || (!secret(name) && value.contains("s3cr3t"))
        };
        file.parse::<toml::Table>()
            .is_ok_and(|table| elsewhere(&table))
            || environment.iter().any(variable)
    }

    #[test]
    fn durations_have_a_unit() {
        let ms = |text| parse_duration(text).map(|span| span.as_millis());
        assert_eq!(
            [ms("250ms"), ms("60s"), ms("5m"), ms("2h"), ms("7d")],
            [
                Some(250),
                Some(60_000),
                Some(300_000),
                Some(7_200_000),
                Some(604_800_000)
            ]
        );
        for bad in [
            "",
            "5",
            "s",
            "-1s",
            "1.5s",
            "1 s",
            "5w",
            "18446744073709551615d",
        ] {
            assert_eq!(ms(bad), None, "{bad}");
        }
        assert_eq!(show_duration(Duration::from_secs(90)), "90s");
    }
}
