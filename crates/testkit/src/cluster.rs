//! A Kafka that can be stopped and restarted: a real broker, or the client's fake one. One
//! contract, both.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::thread;

use krafka::error::ErrorCode;
use krafka::testing::{ApiKey, Control, FakeBroker};
use tokio::sync::oneshot;

use super::kafka::Broker;

/// What the contract asks of a Kafka.
pub trait Cluster {
    fn bootstrap(&self) -> String;
    /// Nothing answers any more.
    fn become_unavailable(&mut self);
    /// Everything answers again, and has what it had.
    fn become_available(&mut self);
}

impl Cluster for Broker {
    fn bootstrap(&self) -> String {
        Broker::bootstrap(self)
    }

    fn become_unavailable(&mut self) {
        self.kill();
    }

    fn become_available(&mut self) {
        self.restart();
    }
}

/// krafka's fake broker. It has a thread of its own, which ends when this is dropped.
pub struct Fake {
    broker: Arc<FakeBroker>,
    silent: Arc<AtomicBool>,
    _stop: oneshot::Sender<()>,
}

impl Fake {
    pub fn start() -> Self {
        let (sender, started) = mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let broker = FakeBroker::start().await.expect("the fake broker starts");
                sender
                    .send(Arc::new(broker))
                    .expect("a process has started it");
                let _ = stopped.await;
            });
        });
        Self {
            broker: started.recv().expect("the fake broker starts"),
            silent: Arc::default(),
            _stop: stop,
        }
    }

    /// Answers requests for the ends of partitions this often, and then rejects them this often.
    pub fn refuse_ends(&self, after: u32, times: u32) {
        self.broker
            .on_times(ApiKey::ListOffsets, after, |_| Control::Pass);
        self.broker.on_times(ApiKey::ListOffsets, times, |_| {
            Control::Error(ErrorCode::OffsetNotAvailable)
        });
    }

    /// How often a request for an end was rejected, or answered.
    pub fn ends_asked(&self) -> usize {
        self.broker.request_count(ApiKey::ListOffsets)
    }

    /// Once records were fetched, requests for the offsets of partitions get no response, until it
    /// is healed.
    pub fn go_silent_after_a_fetch(&self) {
        let fetched = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&fetched);
        let silent = Arc::clone(&self.silent);
        self.broker.on(ApiKey::Fetch, move |_| {
            seen.store(true, Relaxed);
            Control::Pass
        });
        self.broker.on(ApiKey::ListOffsets, move |_| {
            if fetched.load(Relaxed) {
                silent.store(true, Relaxed);
                Control::Silence
            } else {
                Control::Pass
            }
        });
    }

    /// Whether a request got no response.
    pub fn is_silent(&self) -> bool {
        self.silent.load(Relaxed)
    }

    /// Accepts no member into a group, until it is healed.
    pub fn refuse_members(&self) {
        self.broker.on(ApiKey::JoinGroup, |_| {
            Control::Error(ErrorCode::CoordinatorNotAvailable)
        });
    }

    pub fn heal(&self) {
        self.broker.clear_hooks();
    }

    /// A partition loses its end, as by an unclean election: everything but this number of batches.
    pub fn cut_off(&self, topic: &str, partition: i32, batches: usize, end: i64) {
        self.broker.with_state(|state| {
            let partition = state
                .partition_mut(topic, partition)
                .expect("the partition is there");
            partition.log.truncate(batches);
            partition.next_offset = end;
        });
    }
}

impl Cluster for Fake {
    fn bootstrap(&self) -> String {
        self.broker.bootstrap_servers()
    }

    fn become_unavailable(&mut self) {
        self.broker.crash(0);
    }

    fn become_available(&mut self) {
        self.broker.restart(0);
    }
}
