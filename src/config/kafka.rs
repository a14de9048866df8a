//! `[kafka]`: the cluster, the topic, and how to reach both.

use std::net::Ipv6Addr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use super::duration::MS;
use super::role::RoleDefaults;
use super::secret::Secret;
use super::typed_keys::{TypedKeys, by_name};
use crate::domain::event::RecordKey;
use crate::domain::node_role::NodeRole;
use crate::domain::payment_record::RecordFormat;

/// `[kafka]`
#[derive(Debug, Clone)]
pub struct Kafka {
    /// The servers to connect to first.
    pub bootstrap_servers: Vec<String>,
    /// The topic of the events.
    pub topic: String,
    /// The consumer group.
    pub group: String,
    /// The role of the node: edges share a topic.
    pub role: NodeRole,
    /// How many partitions a topic gets when payrelay creates it.
    pub partitions: i32,
    /// The guarantee if this process dies at any moment.
    pub delivery: DeliveryGuarantee,
    /// What the value of a record has.
    pub format: RecordFormat,
    /// What decides the partition of an event.
    pub key: RecordKey,
    /// How batches are compressed.
    pub compression: Compression,
    /// The longest delay between two attempts to reach the cluster.
    pub reconnect_max: Duration,
    /// The maximum number of open dead letters of records that are not this node's events, or
    /// cannot be read.
    pub dead_records_max: NonZeroUsize,
    /// TLS and SASL settings.
    pub security: KafkaSecurity,
}

/// The delivery guarantee.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryGuarantee {
    /// Each batch is a transaction.
    ExactlyOnce,
    /// An idempotent producer without transactions.
    AtLeastOnce,
}

/// The compression of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// None.
    None,
    /// RFC 1952.
    Gzip,
    /// The frame format of LZ4.
    Lz4,
    /// RFC 8878.
    Zstd,
}

/// The keys of `[kafka]` about TLS and SASL. The default is neither.
#[derive(Debug, Clone, Default)]
pub struct KafkaSecurity {
    /// `None`: connections are in clear.
    pub tls: Option<KafkaTls>,
    /// `None`: no authentication, except by a certificate.
    pub sasl: Option<KafkaSasl>,
}

impl KafkaSecurity {
    /// Whether the password goes over the network in clear.
    pub fn sends_password_in_clear(&self) -> bool {
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
    /// The trusted authorities, instead of the built-in list.
    pub ca_file: Option<PathBuf>,
    /// Our certificate, for brokers that require one.
    pub identity: Option<KafkaIdentity>,
}

/// A certificate of our own.
#[derive(Debug, Clone)]
pub struct KafkaIdentity {
    /// The certificate, then the chain to its authority.
    pub certificate_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// Authentication by a password.
#[derive(Debug, Clone)]
pub struct KafkaSasl {
    /// The mechanism.
    pub mechanism: SaslMechanism,
    /// The name.
    pub username: String,
    /// The password.
    pub password: Secret,
}

/// How the password is proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaslMechanism {
    /// In clear (RFC 4616).
    Plain,
    /// By a challenge and response (RFC 5802, RFC 7677).
    ScramSha256,
    /// The same with the longer hash.
    ScramSha512,
}

pub(super) fn read_kafka_section(keys: &mut TypedKeys<'_>, role: NodeRole) -> Kafka {
    let defaults = RoleDefaults::of(role);
    Kafka {
        role,
        bootstrap_servers: keys.list(
            "kafka.bootstrap_servers",
            &["127.0.0.1:9092"],
            "a list of one or more \"host:port\", such as [\"127.0.0.1:9092\"]",
            is_kafka_server,
        ),
        topic: read_topic_key(keys),
        group: keys.text(
            "kafka.group",
            "payment-group",
            "1 to 255 characters",
            |text| (1..=255).contains(&text.len()),
        ),
        partitions: keys.integer("kafka.partitions", 1, 1..=10_000),
        delivery: keys.choice_or(
            "kafka.delivery",
            &[
                ("exactly-once", DeliveryGuarantee::ExactlyOnce),
                ("at-least-once", DeliveryGuarantee::AtLeastOnce),
            ],
            defaults.delivery,
        ),
        format: keys.choice_or(
            "kafka.format",
            &by_name(RecordFormat::ALL, RecordFormat::as_str),
            defaults.format,
        ),
        key: keys.choice_or(
            "kafka.key",
            &[("user", RecordKey::User), ("node", RecordKey::Node)],
            defaults.key,
        ),
        compression: keys.choice_or(
            "kafka.compression",
            &[
                ("none", Compression::None),
                ("gzip", Compression::Gzip),
                ("lz4", Compression::Lz4),
                ("zstd", Compression::Zstd),
            ],
            defaults.compression,
        ),
        reconnect_max: keys.duration(
            "kafka.reconnect_max",
            defaults.reconnect_max,
            100 * MS..=30_000 * MS,
        ),
        dead_records_max: keys.count("kafka.dead_records_max", 1000, 1..=1_000_000),
        security: read_kafka_security(keys),
    }
}

fn read_kafka_security(keys: &mut TypedKeys<'_>) -> KafkaSecurity {
    KafkaSecurity {
        tls: read_kafka_tls(keys),
        sasl: read_kafka_sasl(keys),
    }
}

fn read_kafka_tls(keys: &mut TypedKeys<'_>) -> Option<KafkaTls> {
    let tls = keys.choice("kafka.security", &[("plaintext", None), ("tls", Some(()))]);
    let files = ["kafka.ca_file", "kafka.certificate_file", "kafka.key_file"];
    let [ca_file, certificate_file, key_file] = files.map(|key| {
        keys.optional_text(key, "empty, or the path of a PEM file", |_| true)
            .map(PathBuf::from)
    });
    for key in files.into_iter().filter(|_| tls.is_none()) {
        if keys.is_set(key) {
            keys.add_problem(format!(
                "{key} is set, and is only used with kafka.security = \"tls\""
            ));
        }
    }
    let [_, certificate, key] = files;
    let missing = match (&certificate_file, &key_file) {
        (Some(_), None) => Some((key, certificate)),
        (None, Some(_)) => Some((certificate, key)),
        _ => None,
    };
    if let Some((missing, other)) = missing {
        keys.add_problem(format!("{missing} is missing: {other} needs it"));
    }
    let identity = certificate_file
        .zip(key_file)
        .map(|(certificate_file, key_file)| KafkaIdentity {
            certificate_file,
            key_file,
        });
    tls.map(|()| KafkaTls { ca_file, identity })
}

fn read_kafka_sasl(keys: &mut TypedKeys<'_>) -> Option<KafkaSasl> {
    let mechanism = keys.choice(
        "kafka.sasl_mechanism",
        &[
            ("", None),
            ("PLAIN", Some(SaslMechanism::Plain)),
            ("SCRAM-SHA-256", Some(SaslMechanism::ScramSha256)),
            ("SCRAM-SHA-512", Some(SaslMechanism::ScramSha512)),
        ],
    );
    // PLAIN separates name and password by NUL (RFC 4616).
    let without_nul = |text: &str| !text.contains('\0');
    let username = keys.optional_text("kafka.sasl_username", "a name without NUL", without_nul);
    let password = keys.secret("kafka.sasl_password", "a password without NUL", without_nul);
    for (key, is_given) in [
        ("kafka.sasl_username", username.is_some()),
        ("kafka.sasl_password", password.is_some()),
    ] {
        if mechanism.is_some() && !is_given && !keys.is_set(key) {
            keys.add_problem(format!("{key} is missing: kafka.sasl_mechanism needs it"));
        }
        if mechanism.is_none() && is_given {
            keys.add_problem(format!(
                "{key} is set, and is only used with a kafka.sasl_mechanism"
            ));
        }
    }
    Some(KafkaSasl {
        mechanism: mechanism?,
        username: username?,
        password: password?,
    })
}

const TOPIC_ALLOWED: &str = "1 to 249 letters, digits, '.', '_' and '-', not \".\" or \"..\"";

pub(super) fn read_topic_key(keys: &mut TypedKeys<'_>) -> String {
    keys.text(
        "kafka.topic",
        "payment-event",
        TOPIC_ALLOWED,
        is_kafka_topic,
    )
}

fn is_kafka_topic(text: &str) -> bool {
    (1..=249).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && text != "."
        && text != ".."
}

fn is_kafka_server(text: &str) -> bool {
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
