//! The composition root: every channel and every thread, in the order in which they start, and the
//! order in which they stop.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::config::{self, Config, Problems, PublisherKind};
use crate::domain::timestamp::Timestamp;
use crate::http::{self, App, Change, Gate, NoToken};
use crate::kafka;
use crate::kafka::consumer::Consumer;
use crate::kafka::publisher::KafkaPublisher;
use crate::relay::Relay;
use crate::relay::in_process::InProcess;
use crate::relay::publisher::Publisher;
use crate::runtime::health::Part;
use crate::runtime::metrics::Metrics;
use crate::runtime::resume::ResumeHandle;
use crate::runtime::warnings::Warnings;
use crate::runtime::worker::{Overdue, Waker, Worker, room_for};
use crate::sampler::Sampler;
use crate::scheduler::Scheduler;
use crate::slack::message::Style;
use crate::slack::notifier::{self, Channel, Notifier};
use crate::slack::webhook::{Slack, SlackConfigError};
use crate::store::channel::{self, Sink};
use crate::store::unconsumed::{self, Page};
use crate::store::{OpenError, Store, StoreError, delivery, route, topic};

/// How long the whole stop may take.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Besides the readers, and two for each channel: http, writer, checkpointer, disk, relay,
/// consumer, scheduler, sampler, three of r2d2, and those that resolve names for Kafka.
const OTHER_THREADS: usize = 13;

/// Why the service did not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The database cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Nobody can call.
    #[error(
        "http.listen {address}: {source}; is something else listening there? Set another address"
    )]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// A channel cannot be what it is configured to be.
    #[error(transparent)]
    Slack(#[from] SlackConfigError),
    /// Kafka cannot be reached as it is configured.
    #[error(transparent)]
    Kafka(#[from] Problems),
    /// A channel had a webhook, and has none now.
    #[error(
        "slack: {count} payments wait for the channel {channel}, which had a webhook and has none \
            now: set its webhook_url again, or set slack.sink = \"log\" to have them written to \
            the log"
    )]
    WebhookGone {
        /// The channel.
        channel: String,
        /// How many.
        count: i64,
    },
    /// The database opened, and then refused.
    #[error("database.path: {0}")]
    Store(#[from] StoreError),
    /// No thread, no runtime.
    #[error("the machine has no room for another thread: {0}")]
    Spawn(#[from] io::Error),
}

/// What kind of reason there is for a start that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It may pass by itself: a port or a database that is in use, too many threads.
    Temporary,
    /// The operating system does not allow it.
    NotAllowed,
    /// A person has to change something.
    Configuration,
}

impl StartError {
    /// Whether it may pass.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Open(error) if error.is_temporary() => Cause::Temporary,
            Self::Listen { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable => Cause::Temporary,
                io::ErrorKind::PermissionDenied => Cause::NotAllowed,
                _ => Cause::Configuration,
            },
            Self::Store(StoreError::Busy | StoreError::Closed | StoreError::Failed(_))
            | Self::Spawn(_) => Cause::Temporary,
            _ => Cause::Configuration,
        }
    }
}

/// Everything that runs.
pub struct Service {
    /// Those who work with the database; asked to stop all at once.
    users: Vec<Worker>,
    /// The readers, then the writer: stopped one after the other, when nobody uses them any more.
    store: Vec<Worker>,
    exits: Receiver<&'static str>,
    gate: Arc<Gate>,
}

impl Service {
    /// Starts everything: first what others need, last the door.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let (exited, exits) = unbounded();
        let (wake_relay, relay_woken) = Waker::new();
        let metrics = Metrics::default();
        let warnings = Warnings::default();
        room_for(
            OTHER_THREADS + config.database.readers.get() + 2 * (1 + config.slack.routes.len()),
        )?;
        let channels = channels(config)?;
        check_kafka(config)?;
        warn_of_slack(&config.slack);
        if config.publisher.kind == PublisherKind::Kafka && config.kafka.security.shows_password() {
            log::warn!(
                "kafka.sasl_mechanism is PLAIN without TLS: anybody on the way can read the \
                    password; set kafka.security = \"tls\""
            );
        }
        let mut parts = vec![("publisher".to_owned(), Part::up())];

        let opened = Store::open(&config.database, config.node.id.as_ref())?;
        let address = config.http.listen;
        let listen_failed = |source| StartError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(listen_failed)?;
        let address = listener.local_addr().map_err(listen_failed)?;

        let (store, store_workers) = opened.start(&exited)?;
        log::info!("node {}, database {}", store.node(), store.path().display());

        recover(&store, config)?;
        let (mut notifiers, mut wakers, mut resumes) = (Vec::new(), Vec::new(), Vec::new());
        for channel in channels {
            let (waker, woken) = Waker::new();
            let (part, resume) = (Part::up(), ResumeHandle::new(waker.clone()));
            let name = channel.name.clone();
            parts.push((part_name(&name), part.clone()));
            resumes.push(http::Channel {
                name,
                part: part.clone(),
                resume: resume.clone(),
            });
            wakers.push(waker);
            let notifier = Notifier::new(store.clone(), channel, woken, resume, part, &metrics);
            notifiers.push(Worker::spawn("notifier", &exited, |stop| {
                notifier.run(&stop);
            })?);
        }
        let wake_notifiers = Waker::all(&wakers);

        let publisher: Box<dyn Publisher> = match config.publisher.kind {
            PublisherKind::Application => Box::new(InProcess),
            PublisherKind::Kafka => {
                let (settings, store) = (config.kafka.clone(), store.clone());
                let publisher = KafkaPublisher::with_warnings(settings, store, warnings.clone())?;
                Box::new(publisher.with_metrics(metrics.clone()))
            }
        };
        let relay = Relay::new(
            store.clone(),
            publisher,
            config.publisher.batch_max.get(),
            relay_woken,
            wake_notifiers.clone(),
            parts[0].1.clone(),
            metrics.clone(),
        );
        let relay = Worker::spawn("relay", &exited, |stop| relay.run(&stop))?;

        let consumer = match config.publisher.kind {
            PublisherKind::Application => None,
            PublisherKind::Kafka => {
                let part = Part::up();
                parts.push(("consumer".to_owned(), part.clone()));
                Some(spawn_consumer(
                    config,
                    &store,
                    wake_notifiers.clone(),
                    part,
                    metrics.clone(),
                    &exited,
                )?)
            }
        };

        let names: Vec<_> = resumes
            .iter()
            .map(|channel: &http::Channel| channel.name.clone())
            .collect();
        let (sampler, snapshots) = Sampler::new(store.clone(), metrics.clone(), &names);
        let sampler = Worker::spawn("sampler", &exited, |stop| sampler.run(&stop))?;

        let scheduler = Scheduler::new(
            store.clone(),
            config.scheduler.clone(),
            config.idempotency.clone(),
            wake_relay.clone(),
            wake_notifiers.clone(),
            metrics.clone(),
            snapshots.clone(),
        );
        let scheduler = Worker::spawn("scheduler", &exited, |stop| scheduler.run(&stop))?;

        let gate = Arc::new(Gate::new(&config.http));
        let app = App::new(http::Context {
            store,
            relay: wake_relay,
            notifiers: wake_notifiers,
            currency: config.payment.currency.clone(),
            keys_max: config.idempotency.keys_max.get(),
            settings: config.http.clone(),
            gate: Arc::clone(&gate),
            parts,
            topic: config.kafka.topic.clone(),
            channels: resumes,
            snapshots,
            metrics,
            warnings,
        });
        let http = http::spawn(listener, app, &exited)?;
        log::info!("listening on http://{address}");

        let users = [http, sampler, scheduler, relay]
            .into_iter()
            .chain(notifiers)
            .chain(consumer)
            .collect();
        Ok(Self {
            users,
            store: store_workers,
            exits,
            gate,
        })
    }

    /// Puts the tokens of another configuration in force, and nothing else of it.
    pub fn replace_tokens(&self, config: &Config) -> Result<Change, NoToken> {
        self.gate.replace(&config.http.tokens)
    }

    /// Tells the name of a thread that ended without having been asked.
    pub fn exits(&self) -> &Receiver<&'static str> {
        &self.exits
    }

    /// Stops everything within [`STOP_LIMIT`]. Tells which threads were late.
    pub fn stop(mut self) -> Result<(), Vec<Overdue>> {
        let deadline = Instant::now() + STOP_LIMIT;
        self.users.iter_mut().for_each(Worker::request_stop);
        let workers = self.users.into_iter().chain(self.store);
        let late: Vec<_> = workers
            .filter_map(|worker| worker.stop(deadline).err())
            .collect();
        if late.is_empty() { Ok(()) } else { Err(late) }
    }
}

/// What a process that ended, or another configuration, has left.
fn recover(store: &Store, config: &Config) -> Result<(), StartError> {
    remember_sinks(store, config)?;
    let routes = config.slack.routes.clone();
    let unknown =
        store.write(move |tx| route::replace(tx, &routes).and_then(|()| delivery::recover(tx)))?;
    if unknown > 0 {
        log::warn!(
            "payrelay ended while {unknown} payments were being told: they are told again and may \
                show twice"
        );
    }
    if config.publisher.kind == PublisherKind::Application
        && store.write(|tx| topic::abandon_others(tx, None))?
    {
        let count = backfill(store)?;
        log::warn!(
            "events do not pass through Kafka any more: backfilled {count} published ones from \
                the outbox"
        );
    }
    Ok(())
}

/// Gives every published event a delivery. With Kafka the consumer does that.
fn backfill(store: &Store) -> Result<usize, StoreError> {
    let (mut after, mut count) = (0, 0);
    loop {
        let Page { events, next } = store.read(|connection| unconsumed::page(connection, after))?;
        let ids: Vec<i64> = events.iter().map(|event| event.outbox_id).collect();
        count += store.write(move |tx| unconsumed::backfill(tx, None, &ids, Timestamp::now()))?;
        match next {
            Some(next) => after = next,
            None => return Ok(count),
        }
    }
}

fn warn_of_slack(slack: &config::Slack) {
    if slack.sink == config::Sink::Log {
        log::warn!("slack.sink is \"log\": messages go to this log only");
    } else if slack.webhook_url.is_none() {
        log::warn!("slack.webhook_url is not set: messages go to this log only");
    }
    let routes = slack
        .routes
        .iter()
        .map(|route| (route.name.as_str(), &route.webhook_url));
    for (name, url) in [(config::DEFAULT_CHANNEL, &slack.webhook_url)]
        .into_iter()
        .chain(routes)
    {
        if url.as_ref().is_some_and(is_readable_on_the_way) {
            log::warn!(
                "channel {name}: its webhook_url is http://, so that others on the way can read \
                    it: use https://"
            );
        }
    }
}

/// Refuses to let payments that wait for a webhook go to the log because the webhook was forgotten.
fn remember_sinks(store: &Store, config: &Config) -> Result<(), StartError> {
    let slack = &config.slack;
    let default = (config::DEFAULT_CHANNEL, &slack.webhook_url);
    let routes = slack
        .routes
        .iter()
        .map(|route| (route.name.as_str(), &route.webhook_url));
    let sink = |url: &Option<config::Secret>| match (slack.sink, url) {
        (config::Sink::Auto, Some(_)) => Sink::Webhook,
        _ => Sink::Log,
    };
    let sinks: Vec<_> = [default]
        .into_iter()
        .chain(routes)
        .map(|(name, url)| (name.to_owned(), sink(url)))
        .collect();
    if slack.sink == config::Sink::Auto {
        for (channel, count) in store.read(channel::waiting_for_webhooks)? {
            // A channel that is gone is routed to the others, at last to the default one.
            let now = sinks
                .iter()
                .find(|(name, _)| *name == channel)
                .unwrap_or(&sinks[0])
                .1;
            if now == Sink::Log && count > 0 {
                return Err(StartError::WebhookGone { channel, count });
            }
        }
    }
    store.write(move |tx| channel::replace_sinks(tx, &sinks))?;
    Ok(())
}

/// Whether a webhook's URL is in clear and leads beyond this machine.
fn is_readable_on_the_way(url: &config::Secret) -> bool {
    let Some(rest) = url.expose().strip_prefix("http://") else {
        return false;
    };
    let host = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = host.rsplit('@').next().unwrap_or(host);
    let local = ["localhost", "127.", "[::1]"]
        .iter()
        .any(|name| host.starts_with(name));
    !local
}

/// What can be found out about a configuration without starting anything.
pub fn check(config: &Config) -> Result<(), StartError> {
    channels(config)?;
    check_kafka(config)?;
    Ok(())
}

/// Where events go by way of Kafka: the files that its connections need.
fn check_kafka(config: &Config) -> Result<(), Problems> {
    match config.publisher.kind {
        PublisherKind::Application => Ok(()),
        PublisherKind::Kafka => kafka::check(&config.kafka.security),
    }
}

/// The channel "default", then those of the routes.
fn channels(config: &Config) -> Result<Vec<Channel>, SlackConfigError> {
    let slack = &config.slack;
    let channel = |name: &str,
                   url: &Option<config::Secret>,
                   messages_per_second|
     -> Result<Channel, SlackConfigError> {
        let url = url.as_ref().filter(|_| slack.sink == config::Sink::Auto);
        let sink = match url {
            Some(url) => notifier::Sink::Slack(Box::new(Slack::new(url.clone(), slack)?)),
            None => notifier::Sink::Log,
        };
        let style = Style {
            completed: slack.line_completed.clone(),
            failed: slack.line_failed.clone(),
            zone: slack.time_zone.clone(),
            public_url: config.http.public_url.clone(),
        };
        Ok(Channel {
            name: name.to_owned(),
            sink,
            style,
            messages_per_second,
            burst: slack.burst.get(),
            digest_over: slack.digest_over,
            digest_max: slack.digest_max.get(),
            summary_over: slack.summary_over,
            probe_interval: slack.probe_interval,
        })
    };
    let default = channel(
        config::DEFAULT_CHANNEL,
        &slack.webhook_url,
        slack.messages_per_second,
    );
    let routes = slack
        .routes
        .iter()
        .map(|route| channel(&route.name, &route.webhook_url, route.messages_per_second));
    [default].into_iter().chain(routes).collect()
}

/// What the health page calls a channel.
fn part_name(channel: &str) -> String {
    if channel == config::DEFAULT_CHANNEL {
        "slack".to_owned()
    } else {
        format!("slack:{channel}")
    }
}

fn spawn_consumer(
    config: &Config,
    store: &Store,
    notifier: Waker,
    part: Part,
    metrics: Metrics,
    exits: &Sender<&'static str>,
) -> io::Result<Worker> {
    let consumer =
        Consumer::new(config.kafka.clone(), store.clone(), notifier, part)?.with_metrics(metrics);
    Worker::spawn("consumer", exits, |stop| consumer.run(&stop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_in_clear_beyond_this_machine_is_readable_on_the_way() {
        let readable = |url: &str| is_readable_on_the_way(&config::Secret::new(url));
        for url in [
            "http://hooks.example/x",
            "http://10.0.0.1:80/x",
            "http://u:p@hooks.example",
        ] {
            assert!(readable(url), "{url}");
        }
        for url in [
            "https://hooks.example/x",
            "http://127.0.0.1:1/x",
            "http://localhost/x",
            "http://[::1]:1/x",
        ] {
            assert!(!readable(url), "{url}");
        }
    }
}
