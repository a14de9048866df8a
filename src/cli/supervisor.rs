//! What payrelay says to systemd (`sd_notify(3)`): that it is ready, what waits, that it lives.
//! Without `NOTIFY_SOCKET` it says nothing.

use std::time::{Duration, Instant};
use std::{io, thread};

use crossbeam_channel::{Receiver, Sender, bounded, never, tick};
use payrelay::runtime::worker::Never;
use sd_notify::NotifyState;

/// How often the status is sent, and how often a start that takes long asks for more time.
const INTERVAL: Duration = Duration::from_secs(5);

/// How much time each of these requests asks for.
const START_EXTENSION: Duration = Duration::from_secs(30);

/// systemd, if it has started payrelay.
pub(super) struct Supervisor {
    is_present: bool,
    /// The time after which systemd kills payrelay, unless it has said that it lives.
    watchdog: Option<Duration>,
}

impl Supervisor {
    pub(super) fn detect() -> Self {
        Self {
            is_present: std::env::var_os("NOTIFY_SOCKET").is_some(),
            watchdog: sd_notify::watchdog_enabled(),
        }
    }

    /// Asks for more time until the start ends, which drops the returned value. A recovery that is
    /// killed would begin again, for ever.
    pub(super) fn begin_start(&self) -> io::Result<Option<Sender<Never>>> {
        if !self.is_present {
            return Ok(None);
        }
        let (started, starting) = bounded::<Never>(0);
        let extend = move || {
            let micros = u32::try_from(START_EXTENSION.as_micros()).unwrap_or(u32::MAX);
            while starting
                .recv_timeout(INTERVAL)
                .is_err_and(|end| end.is_timeout())
            {
                send(&[NotifyState::ExtendTimeoutUsec(micros)]);
            }
        };
        thread::Builder::new()
            .name("start".to_owned())
            .spawn(extend)?;
        Ok(Some(started))
    }

    pub(super) fn ready(&self) {
        self.notify(&[NotifyState::Ready]);
    }

    pub(super) fn reloading(&self) {
        self.notify(&[NotifyState::Reloading]);
    }

    pub(super) fn stopping(&self) {
        self.notify(&[NotifyState::Stopping]);
    }

    /// When [`Self::report`] is due.
    pub(super) fn ticks(&self) -> Receiver<Instant> {
        if !self.is_present {
            return never();
        }
        let watchdog = self.watchdog.map_or(INTERVAL, |limit| limit / 3);
        tick(watchdog.min(INTERVAL))
    }

    /// Sends the status, and to a watchdog that payrelay lives.
    pub(super) fn report(&self, status: &str, is_alive: bool) {
        self.notify(&[NotifyState::Status(status)]);
        if self.watchdog.is_some() && is_alive {
            self.notify(&[NotifyState::Watchdog]);
        }
    }

    fn notify(&self, states: &[NotifyState<'_>]) {
        if self.is_present {
            send(states);
        }
    }
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::debug!("systemd did not get a notification: {error}");
    }
}
