//! The configuration: a TOML file and the environment in, a checked [`Config`] out, or every
//! problem at once.
//!
//! The module of a section names each of its keys once, with the default and the allowed values. A
//! key that no module reads does not exist. The environment variable of a key follows from its name
//! (`http.listen`: `PAYRELAY_HTTP_LISTEN`) and wins over the file.

mod database;
mod duration;
mod edge;
mod fleet;
mod http;
mod kafka;
mod local;
mod nearest_name;
mod problems;
mod role;
mod schema;
mod secret;
mod slack;
mod source;
#[cfg(test)]
mod tests;
mod typed_keys;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

pub use self::database::Database;
use self::duration::{FOREVER, MS};
use self::edge::{check_edge, check_key, warn_of_edge};
pub use self::fleet::Fleet;
pub use self::http::{Http, LOCAL_CLIENT, LocalSocket, Token};
pub use self::kafka::{
    Compression, DeliveryGuarantee, Kafka, KafkaIdentity, KafkaSasl, KafkaSecurity, KafkaTls,
    SaslMechanism,
};
pub use self::local::LocalConfig;
pub use self::problems::Problems;
use self::role::RoleDefaults;
pub use self::secret::Secret;
pub use self::slack::{DEFAULT_CHANNEL, Route, Sink, Slack};
use self::source::{KeyDescription, Source};
use self::typed_keys::{TypedKeys, by_name};
use crate::domain::node_id::NodeId;
use crate::domain::node_role::NodeRole;
use crate::domain::payment_record::RecordFormat;

/// All settings, checked.
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
    /// `[fleet]`
    pub fleet: Fleet,
    /// `[scheduler]`
    pub scheduler: Scheduler,
    /// `[idempotency]`
    pub idempotency: Idempotency,
    /// `[log]`
    pub log: Log,
}

/// How the lines of the log are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `[log]`
#[derive(Debug, Clone)]
pub struct Log {
    /// The format.
    pub format: LogFormat,
}

/// `[payment]`
#[derive(Debug, Clone)]
pub struct Payment {
    /// The code of the currency (ISO 4217). Amounts are in its smallest unit.
    pub currency: String,
}

/// `[node]`
#[derive(Debug, Clone)]
pub struct Node {
    /// `None`: the first start creates one, and stores it in the database.
    pub id: Option<NodeId>,
    /// What it does with published events.
    pub role: NodeRole,
}

/// The publisher of the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublisherKind {
    /// To the delivery table of this process, without Kafka.
    Application,
    /// To a topic of Apache Kafka.
    Kafka,
}

impl PublisherKind {
    /// By name, as configured.
    const BY_NAME: [(&str, Self); 2] = [("application", Self::Application), ("kafka", Self::Kafka)];

    /// Its name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Application => "application",
            Self::Kafka => "kafka",
        }
    }
}

/// `[publisher]`
#[derive(Debug, Clone)]
pub struct Publisher {
    /// The publisher.
    pub kind: PublisherKind,
    /// The maximum number of outbox rows of one batch.
    pub batch_max: NonZeroUsize,
}

/// `[scheduler]`
#[derive(Debug, Clone)]
pub struct Scheduler {
    /// How often it runs.
    pub interval: Duration,
    /// How long an unpublished event may wait without an attempt before the relay is woken.
    pub retry_after: Duration,
    /// How long published and delivered events are kept.
    pub retention: Duration,
}

/// `[idempotency]`: the stored responses of requests with an Idempotency-Key.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// How long a key is stored.
    pub retention: Duration,
    /// The maximum number of keys; the oldest are deleted first.
    pub keys_max: NonZeroUsize,
}

/// The configuration and its sources, for `check-config`.
#[derive(Debug)]
pub struct LoadedConfig {
    /// The checked values.
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    values: source::Values,
}

impl LoadedConfig {
    /// The effective configuration as TOML, secrets masked, each key with the source of its value.
    pub fn effective(&self) -> &str {
        &self.values.effective
    }

    /// Variables that begin with `PAYRELAY_` and name no key.
    pub fn ignored_variables(&self) -> &[String] {
        &self.values.ignored_variables
    }

    /// Settings that are valid and have no effect.
    pub fn warnings(&self) -> Vec<String> {
        let changed = &self.values.changed;
        let keys: Vec<_> = changed
            .iter()
            .map(String::as_str)
            .filter(|key| key.starts_with("kafka."))
            .collect();
        if self.config.publishes_to_kafka() || keys.is_empty() {
            let is_edge = self.config.node.role == NodeRole::Edge;
            let kafka = Some(&self.config.kafka).filter(|_| is_edge);
            return kafka.and_then(warn_of_edge).into_iter().collect();
        }
        vec![format!(
            "publisher.kind is \"application\", so these keys have no effect: {}; set \
                publisher.kind = \"kafka\" to publish to Kafka",
            keys.join(", ")
        )]
    }

    /// The keys in which another configuration differs, except the tokens: only they can change
    /// while payrelay is running.
    pub fn changed_keys<'a>(&'a self, other: &'a Self) -> BTreeSet<&'a str> {
        let ours = &self.values.given;
        let theirs = &other.values.given;
        let keys = ours.keys().chain(theirs.keys());
        let differs =
            |key: &&String| !key.starts_with("http.token[") && ours.get(*key) != theirs.get(*key);
        keys.filter(differs).map(String::as_str).collect()
    }
}

/// The JSON Schema of the configuration file.
pub fn config_schema() -> serde_json::Value {
    schema::schema_of_keys(&Config::describe_keys(), include_str!("../../config.toml"))
}

impl Config {
    /// Checks the text of a configuration file and the environment.
    pub fn load(
        file: &str,
        environment: &BTreeMap<String, String>,
    ) -> Result<LoadedConfig, Problems> {
        let mut keys = TypedKeys::new(Source::parse(file, environment)?);
        let config = Self::read(&mut keys);
        let mut source = keys.into_source();
        if config.node.role == NodeRole::Edge {
            check_edge(config.publishes_to_kafka(), &config.kafka, &mut source);
        } else {
            check_key(&config.kafka, &mut source);
        }
        let values = source.finish()?;
        Ok(LoadedConfig {
            config,
            file: None,
            values,
        })
    }

    /// Whether events go to a topic.
    pub fn publishes_to_kafka(&self) -> bool {
        self.publisher.kind == PublisherKind::Kafka
    }

    /// What the value of a record has, if there are records.
    pub fn record_format(&self) -> RecordFormat {
        match self.publisher.kind {
            PublisherKind::Application => RecordFormat::Id,
            PublisherKind::Kafka => self.kafka.format,
        }
    }

    /// Every key, as its section asks for it, with one token and one route.
    fn describe_keys() -> Vec<KeyDescription> {
        let tables = "[[http.token]]\nname = \"a\"\n[[slack.route]]\nname = \"a\"";
        let environment = BTreeMap::new();
        let Ok(source) = Source::parse(tables, &environment) else {
            return Vec::new();
        };
        let mut keys = TypedKeys::new(source);
        Self::read(&mut keys);
        keys.into_source().into_descriptions()
    }

    /// Reads every key.
    fn read(keys: &mut TypedKeys<'_>) -> Self {
        let node = Node {
            role: keys.choice("node.role", &by_name(NodeRole::ALL, NodeRole::as_str)),
            id: NodeId::parse(&keys.text(
                "node.id",
                "",
                "empty, or 1 to 64 letters, digits, '.', '_' and '-'",
                |text| text.is_empty() || NodeId::parse(text).is_some(),
            )),
        };
        let role = node.role;
        Self {
            http: http::read_http_section(keys),
            database: database::read_database_section(keys),
            payment: Payment {
                currency: keys.text(
                    "payment.currency",
                    "KRW",
                    "three capital letters (ISO 4217)",
                    |text| text.len() == 3 && text.bytes().all(|b| b.is_ascii_uppercase()),
                ),
            },
            node,
            publisher: Publisher {
                kind: keys.choice_or(
                    "publisher.kind",
                    &PublisherKind::BY_NAME,
                    RoleDefaults::of(role).publisher,
                ),
                batch_max: keys.count("publisher.batch_max", 1000, 1..=1000),
            },
            kafka: kafka::read_kafka_section(keys, role),
            slack: slack::read_slack_section(keys),
            fleet: fleet::read_fleet_section(keys),
            scheduler: Scheduler {
                interval: keys.duration("scheduler.interval", "60s", 10 * MS..=FOREVER),
                retry_after: keys.duration("scheduler.retry_after", "60s", MS..=FOREVER),
                retention: keys.duration("scheduler.retention", "7d", MS..=FOREVER),
            },
            idempotency: Idempotency {
                retention: keys.duration("idempotency.retention", "24h", MS..=FOREVER),
                keys_max: keys.count("idempotency.keys_max", 1_000_000, 1..=1_000_000_000),
            },
            log: Log {
                format: keys.choice(
                    "log.format",
                    &[("text", LogFormat::Text), ("json", LogFormat::Json)],
                ),
            },
        }
    }
}
