//! The composition root: every channel and every thread, in the order in which they start, and the order in which
//! they stop.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::config::{self, Config, PublisherKind};
use crate::consumer::Consumer;
use crate::counters::Counters;
use crate::http::{self, App};
use crate::notifier::{Channel, Notifier};
use crate::outage::Part;
use crate::publisher::Publisher;
use crate::publisher::application::Application;
use crate::publisher::kafka::KafkaPublisher;
use crate::relay::Relay;
use crate::scheduler::Scheduler;
use crate::slack::Slack;
use crate::store::{OpenError, Store};
use crate::worker::{Overdue, Waker, Worker};

/// How long the whole stop may take.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Why the service did not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The database cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Nobody can call.
    #[error("http.listen {address}: {source}; is something else listening there? Set another address")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// No thread, no runtime.
    #[error("the machine has no room for another thread: {0}")]
    Spawn(#[from] io::Error),
}

/// Everything that runs.
pub struct Service {
    /// Those who work with the database; asked to stop all at once.
    users: Vec<Worker>,
    /// The readers, then the writer: stopped one after the other, when nobody uses them any more.
    store: Vec<Worker>,
    exits: Receiver<&'static str>,
}

impl Service {
    /// Starts everything: first what others need, last the door.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let (exited, exits) = unbounded();
        let (wake_relay, relay_woken) = Waker::new();
        let (wake_notifier, notifier_woken) = Waker::new();
        let counters = Counters::default();
        let mut parts = vec![("publisher", Part::up()), ("slack", Part::up())];

        let opened = Store::open(&config.database, config.node.id.as_ref())?;
        let address = config.http.listen;
        let listen_failed = |source| StartError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(listen_failed)?;
        let address = listener.local_addr().map_err(listen_failed)?;

        let (store, store_workers) = opened.start(&exited)?;
        log::info!("node {}, database {}", store.node(), config.database.path.display());

        let notifier =
            Notifier::new(store.clone(), channel(&config.slack), notifier_woken, parts[1].1.clone(), counters.clone());
        let notifier = Worker::spawn("notifier", &exited, |stop| notifier.run(&stop))?;

        let publisher: Box<dyn Publisher> = match config.publisher.kind {
            PublisherKind::Application => Box::new(Application),
            PublisherKind::Kafka => Box::new(KafkaPublisher::new(config.kafka.clone(), store.node().clone())?),
        };
        let relay = Relay::new(
            store.clone(),
            publisher,
            config.publisher.batch_max.get(),
            relay_woken,
            wake_notifier.clone(),
            parts[0].1.clone(),
            counters.clone(),
        );
        let relay = Worker::spawn("relay", &exited, |stop| relay.run(&stop))?;

        let consumer = match config.publisher.kind {
            PublisherKind::Application => None,
            PublisherKind::Kafka => {
                let part = Part::up();
                parts.push(("consumer", part.clone()));
                Some(spawn_consumer(config, &store, wake_notifier, part, &exited)?)
            }
        };

        let scheduler = Scheduler::new(store.clone(), config.scheduler.clone(), wake_relay.clone(), counters);
        let scheduler = Worker::spawn("scheduler", &exited, |stop| scheduler.run(&stop))?;

        let app = App::new(store, wake_relay, config.payment.currency.clone(), config.http.clone(), parts);
        let http = http::spawn(listener, app, &exited)?;
        log::info!("listening on http://{address}");

        let users = [http, scheduler, relay, notifier].into_iter().chain(consumer).collect();
        Ok(Self { users, store: store_workers, exits })
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
        let late: Vec<_> = workers.filter_map(|worker| worker.stop(deadline).err()).collect();
        if late.is_empty() { Ok(()) } else { Err(late) }
    }
}

fn channel(settings: &config::Slack) -> Channel {
    if let Some(url) = &settings.webhook_url {
        return Channel::Slack(Slack::new(url.clone(), settings));
    }
    log::warn!("slack.webhook_url is not set: messages go to this log only");
    Channel::Log
}

fn spawn_consumer(
    config: &Config,
    store: &Store,
    notifier: Waker,
    part: Part,
    exits: &Sender<&'static str>,
) -> io::Result<Worker> {
    let consumer = Consumer::new(config.kafka.clone(), store.clone(), notifier, part)?;
    Worker::spawn("consumer", exits, |stop| consumer.run(&stop))
}
