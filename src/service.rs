//! The composition root: every channel and every thread, in the order in which they start, and the
//! order in which they stop.

mod recovery;
mod reports;
mod start_error;
mod status_line;

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use self::recovery::recover_service;
pub use self::start_error::{Cause, ServiceStartError};

use crate::config::{Config, Problems, PublisherKind};
use crate::domain::node_role::NodeRole;
use crate::domain::timestamp::Timestamp;
use crate::http::{
    self, App, AppContext, Authenticator, BoundSocket, LastTokenRemoved, LocalListener,
    LocalSocket, TokenDiff,
};
use crate::kafka;
use crate::kafka::consumer::Consumer;
use crate::kafka::publisher::{self, KafkaPublisher};
use crate::kafka::status::StatusReports;
use crate::relay::in_process::InProcess;
use crate::relay::publisher::Publisher;
use crate::relay::{self, Relay};
use crate::runtime::health::HealthHandle;
use crate::runtime::metrics::Metrics;
use crate::runtime::resume::ResumeHandle;
use crate::runtime::warnings::Warnings;
use crate::runtime::worker::{StopTimeout, Waker, Worker, WorkerGroup, ensure_worker_capacity};
use crate::sampler::{Sampler, Samples};
use crate::scheduler::{self, Scheduler};
use crate::slack::channel::{self, SlackChannel};
use crate::slack::notifier::{self, Notifier};
use crate::slack::webhook::SlackConfigError;
use crate::store::{Store, local_socket};

/// The longest duration of a stop.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Threads in addition to the readers and two for each channel. They are http, writer,
/// checkpointer, disk, relay, consumer, scheduler, sampler, one of r2d2, and two that resolve names
/// for Kafka.
const OTHER_THREADS: usize = 11;

/// The HTTP thread turns its loop every ten seconds.
const HTTP_PAUSE_MAX: Duration = Duration::from_secs(20);

/// All threads of a running payrelay.
pub struct Service {
    /// Threads that work with the database; they get the request to stop all at once.
    users: Vec<Worker>,
    /// The readers, then the writer: stopped one after the other, after all users.
    store_workers: Vec<Worker>,
    group: WorkerGroup,
    store: Store,
    samples: Samples,
    authenticator: Arc<Authenticator>,
}

impl Service {
    /// Starts everything: the threads that others need first, the HTTP server last.
    pub fn start(config: &Config) -> Result<Self, ServiceStartError> {
        let channels = preflight_service(config)?;
        // Before the database is created: a wrong address leaves nothing behind.
        let listen_error = |source| ServiceStartError::Listen {
            address: config.http.listen,
            source,
        };
        let socket = BoundSocket::bind(config.http.listen).map_err(listen_error)?;
        let stopped = Store::open(&config.database, config.node.id.as_ref())?;
        // Under the lock of the database: no other process of it serves this socket.
        let local = bind_local_socket(config)?;
        let group = WorkerGroup::default();
        let (store, store_workers) = stopped.start(&group)?;
        let topic = match config.publisher.kind {
            PublisherKind::Application => "no Kafka".to_owned(),
            PublisherKind::Kafka => format!("Kafka topic {}", config.kafka.topic),
        };
        log::info!(
            event = "node", node = store.node().as_str();
            "node {}, database {}, {topic}",
            store.node(),
            store.path().display()
        );
        recover_service(&store, config)?;
        let mut spawner = ServiceSpawner {
            config,
            store,
            group: group.clone(),
            warnings: Warnings::default(),
            components: Vec::new(),
        };
        // From here on connections are accepted: everything that they need is recovered.
        let address = socket.address();
        let listener = socket.listen().map_err(listen_error)?;
        let local_path = local.as_ref().map(|local| local.path().to_owned());
        let listeners = ServiceListeners {
            network: listener,
            local: local.map(LocalSocket::listen).transpose()?,
        };
        let (users, authenticator, samples) = spawner.spawn(channels, listeners)?;
        if let Some(path) = local_path {
            log::info!(event = "local_socket"; "local socket {}", path.display());
        }
        log::info!(event = "listening"; "listening on http://{address}");
        Ok(Self {
            users,
            store_workers,
            group,
            store: spawner.store,
            samples,
            authenticator,
        })
    }

    /// Replaces the tokens by those of another configuration, and changes nothing else.
    pub fn replace_tokens(&self, config: &Config) -> Result<TokenDiff, LastTokenRemoved> {
        self.authenticator.replace(&config.http.tokens)
    }

    /// The metrics of the process.
    pub fn metrics(&self) -> &Metrics {
        self.store.metrics()
    }

    /// What fails and what waits, in a line.
    pub fn status_line(&self) -> String {
        status_line::describe_status(&self.store, &self.samples)
    }

    /// Whether the HTTP thread still turns its loop. A disk that hangs does not count: to end
    /// payrelay would not mend it.
    pub fn answers_requests(&self) -> bool {
        let now = Timestamp::now();
        let heartbeats = self.group.heartbeats();
        let mut http = heartbeats.iter().filter(|(name, _)| name == http::THREAD);
        http.all(|(_, at)| now.since(*at) < HTTP_PAUSE_MAX)
    }

    /// Receives the name of a thread that ended without a request.
    pub fn exits(&self) -> &Receiver<&'static str> {
        self.group.exits()
    }

    /// Stops everything within [`STOP_LIMIT`]. Returns the threads that did not stop in time.
    pub fn stop(mut self) -> Result<(), Vec<StopTimeout>> {
        let deadline = Instant::now() + STOP_LIMIT;
        // The writer is the last to close the database: no other thread may hold a connection.
        drop(self.store);
        self.users.iter_mut().for_each(Worker::request_stop);
        let workers = self.users.into_iter().chain(self.store_workers);
        let late: Vec<_> = workers
            .filter_map(|worker| worker.stop(deadline).err())
            .collect();
        if late.is_empty() { Ok(()) } else { Err(late) }
    }
}

/// Finds problems before anything is opened, and warns of risks.
fn preflight_service(config: &Config) -> Result<Vec<SlackChannel>, ServiceStartError> {
    let channel_threads = 2 * (1 + config.slack.routes.len());
    ensure_worker_capacity(OTHER_THREADS + config.database.readers.get() + channel_threads)?;
    let channels = service_channels(config)?;
    check_service_socket(config)?;
    check_service_kafka(config)?;
    if config.node.role == NodeRole::Single {
        channel::warn_of_channel_risks(&config.slack);
    }
    let security = &config.kafka.security;
    if config.publisher.kind == PublisherKind::Kafka && security.sends_password_in_clear() {
        log::warn!(
            event = "password_in_clear";
            "kafka.sasl_mechanism is PLAIN without TLS: any host on the way can read the password; \
                set kafka.security = \"tls\""
        );
    }
    Ok(channels)
}

/// The channels that this node delivers to. An edge has none.
fn service_channels(config: &Config) -> Result<Vec<SlackChannel>, SlackConfigError> {
    match config.node.role {
        NodeRole::Single => SlackChannel::all(config),
        NodeRole::Edge => Ok(Vec::new()),
    }
}

/// Finds the problems of a configuration, without starting anything.
pub fn check_service_config(config: &Config) -> Result<(), ServiceStartError> {
    service_channels(config)?;
    check_service_socket(config)?;
    check_service_kafka(config)?;
    Ok(())
}

/// Refuses a path that no socket can have.
fn check_service_socket(config: &Config) -> Result<(), ServiceStartError> {
    // Where the folder of the database is missing, opening it says so.
    if let Ok(Some(path)) =
        local_socket::local_socket_path(&config.http.socket, &config.database.path)
    {
        http::check_local_socket_path(&path)
            .map_err(|source| ServiceStartError::Socket { path, source })?;
    }
    Ok(())
}

/// Binds the local socket, unless it is off.
fn bind_local_socket(config: &Config) -> Result<Option<LocalSocket>, ServiceStartError> {
    let path = local_socket::local_socket_path(&config.http.socket, &config.database.path)?;
    let Some(path) = path else {
        return Ok(None);
    };
    let bound = LocalSocket::bind(&path);
    bound
        .map(Some)
        .map_err(|source| ServiceStartError::Socket { path, source })
}

/// Checks the files that connections to Kafka need.
fn check_service_kafka(config: &Config) -> Result<(), Problems> {
    match config.publisher.kind {
        PublisherKind::Application => Ok(()),
        PublisherKind::Kafka => kafka::check(&config.kafka.security),
    }
}

/// Starts the threads that work with the database.
struct ServiceSpawner<'a> {
    config: &'a Config,
    store: Store,
    group: WorkerGroup,
    warnings: Warnings,
    /// The components of the health page, by name.
    components: Vec<(String, HealthHandle)>,
}

/// The sockets of the HTTP server.
struct ServiceListeners {
    network: TcpListener,
    local: Option<LocalListener>,
}

/// The threads of the channels.
struct Notifiers {
    workers: Vec<Worker>,
    channels: Vec<http::Channel>,
    waker: Waker,
}

impl ServiceSpawner<'_> {
    fn spawn(
        &mut self,
        channels: Vec<SlackChannel>,
        listeners: ServiceListeners,
    ) -> Result<(Vec<Worker>, Arc<Authenticator>, Samples), ServiceStartError> {
        let (relay_waker, relay_woken) = Waker::new();
        let publisher_health = self.component("publisher".to_owned());
        let Notifiers {
            workers: notifiers,
            channels,
            waker: notifier_waker,
        } = self.spawn_notifiers(channels)?;
        let (sampler, snapshots) = self.spawn_sampler(&channels)?;
        let reports = reports::edge_reports(self.config, &self.store, &snapshots);
        let options = relay::Options {
            batch_max: self.config.publisher.batch_max.get(),
            format: self.config.record_format(),
            wake: relay_woken,
            notifiers: notifier_waker.clone(),
            health: publisher_health,
            reconnect_max: self.config.kafka.reconnect_max,
        };
        let relay = self.spawn_relay(options, reports)?;
        let consumer = self.spawn_consumer(&notifier_waker)?;
        let scheduler = self.spawn_scheduler(&relay_waker, &notifier_waker, &snapshots)?;
        let authenticator = Arc::new(Authenticator::new(&self.config.http));
        let app = App::new(AppContext {
            store: self.store.clone(),
            relay: relay_waker,
            notifiers: notifier_waker,
            currency: self.config.payment.currency.clone(),
            keys_max: self.config.idempotency.keys_max.get(),
            settings: self.config.http.clone(),
            authenticator: Arc::clone(&authenticator),
            components: std::mem::take(&mut self.components),
            publisher: self.config.publisher.kind,
            role: self.config.node.role,
            topic: self.config.kafka.topic.clone(),
            database: self.config.database.clone(),
            workers: self.group.clone(),
            channels,
            snapshots: snapshots.clone(),
            warnings: self.warnings.clone(),
        });
        let http = http::spawn_server(listeners.network, listeners.local, app, &self.group)?;
        let mut workers = vec![http, sampler, scheduler, relay];
        workers.extend(notifiers);
        workers.extend(consumer);
        Ok((workers, authenticator, snapshots))
    }

    fn component(&mut self, name: String) -> HealthHandle {
        let health = HealthHandle::up();
        self.components.push((name, health.clone()));
        health
    }

    fn spawn_notifiers(&mut self, channels: Vec<SlackChannel>) -> io::Result<Notifiers> {
        let mut workers = Vec::new();
        let mut shown = Vec::new();
        let mut wakers = Vec::new();
        for channel in channels {
            let (waker, woken) = Waker::new();
            let name = channel.name.clone();
            let health = self.component(channel.component());
            let resume = ResumeHandle::new(waker.clone());
            shown.push(http::Channel {
                name,
                health: health.clone(),
                resume: resume.clone(),
            });
            wakers.push(waker);
            let options = notifier::Options {
                wake: woken,
                resume,
                health,
            };
            let notifier = Notifier::new(self.store.clone(), channel, options);
            workers.push(Worker::spawn("notifier", &self.group, |stop| {
                notifier.run(&stop);
            })?);
        }
        Ok(Notifiers {
            workers,
            channels: shown,
            waker: Waker::all(&wakers),
        })
    }

    fn spawn_relay(
        &self,
        options: relay::Options,
        reports: Option<StatusReports>,
    ) -> io::Result<Worker> {
        let publisher: Box<dyn Publisher> = match self.config.publisher.kind {
            PublisherKind::Application => Box::new(InProcess),
            PublisherKind::Kafka => {
                let options = publisher::Options {
                    warnings: self.warnings.clone(),
                    reports,
                    ..publisher::Options::default()
                };
                Box::new(KafkaPublisher::with_options(
                    self.config.kafka.clone(),
                    self.store.clone(),
                    options,
                )?)
            }
        };
        let relay = Relay::new(self.store.clone(), publisher, options);
        Worker::spawn("relay", &self.group, |stop| relay.run(&stop))
    }

    fn spawn_consumer(&mut self, notifiers: &Waker) -> io::Result<Option<Worker>> {
        let is_edge = self.config.node.role == NodeRole::Edge;
        if is_edge || !self.config.publishes_to_kafka() {
            return Ok(None);
        }
        let health = self.component("consumer".to_owned());
        let settings = self.config.kafka.clone();
        let consumer = Consumer::new(settings, self.store.clone(), notifiers.clone(), health)?;
        Worker::spawn("consumer", &self.group, |stop| consumer.run(&stop)).map(Some)
    }

    fn spawn_sampler(&self, channels: &[http::Channel]) -> io::Result<(Worker, Samples)> {
        let names: Vec<_> = channels
            .iter()
            .map(|channel| channel.name.clone())
            .collect();
        let topic = match self.config.publisher.kind {
            PublisherKind::Application => None,
            PublisherKind::Kafka => Some(self.config.kafka.topic.clone()),
        };
        let (sampler, snapshots) = Sampler::new(self.store.clone(), &names, topic);
        let worker = Worker::spawn("sampler", &self.group, |stop| sampler.run(&stop))?;
        Ok((worker, snapshots))
    }

    fn spawn_scheduler(
        &self,
        relay: &Waker,
        notifiers: &Waker,
        snapshots: &Samples,
    ) -> io::Result<Worker> {
        let options = scheduler::Options {
            settings: self.config.scheduler.clone(),
            keys: self.config.idempotency.clone(),
            relay: relay.clone(),
            notifiers: notifiers.clone(),
            snapshots: snapshots.clone(),
        };
        let scheduler = Scheduler::new(self.store.clone(), options);
        Worker::spawn("scheduler", &self.group, |stop| scheduler.run(&stop))
    }
}
