//! The limits of one client's share: requests a second, memory for bodies, connections.
//!
//! A client is its token, or else its address. The entry of an address is removed with its last
//! connection, or when its pace has recovered. So the table of clients has an entry for each
//! connection and each address of the last second, and at most as many again before they are swept.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::problem::Problem;
use crate::config;

const SECOND: Duration = Duration::from_secs(1);

/// A smaller table is not swept.
const SWEEP_MIN: usize = 1024;

/// The usage of a client.
#[derive(Debug, Default)]
pub(super) struct ClientUsage {
    /// The time until which its requests are spent, in nanoseconds; at most a second ahead.
    next_allowed: AtomicU64,
    body_bytes: AtomicUsize,
}

/// An address with connections.
#[derive(Debug, Default)]
struct Peer {
    account: Arc<ClientUsage>,
    connections: usize,
}

#[derive(Debug)]
struct Peers {
    known: HashMap<IpAddr, Peer>,
    sweep_at: usize,
}

/// The limits, and the table of clients.
#[derive(Debug)]
pub(super) struct Limits {
    /// The interval between two requests of a client; `None`: no limit.
    interval: Option<Duration>,
    client_body_bytes_max: usize,
    bodies_bytes_max: usize,
    client_connections_max: usize,
    bodies_bytes: AtomicUsize,
    peers: Mutex<Peers>,
    started: Instant,
}

impl Limits {
    pub(super) fn new(settings: &config::Http) -> Self {
        Self {
            interval: settings
                .client_requests_per_second
                .map(|rate| SECOND / rate.get()),
            client_body_bytes_max: settings.client_body_bytes_max,
            bodies_bytes_max: settings.bodies_bytes_max,
            client_connections_max: match settings.client_connections_max {
                // All may be of one address: then a new connection replaces an unused one.
                all if all >= settings.connections_max => usize::MAX,
                some => some.get(),
            },
            bodies_bytes: AtomicUsize::new(0),
            peers: Mutex::new(Peers {
                known: HashMap::new(),
                sweep_at: SWEEP_MIN,
            }),
            started: Instant::now(),
        }
    }

    /// Counts a request, or refuses it.
    pub(super) fn request(&self, account: &ClientUsage) -> Result<(), Problem> {
        // Without a limit the clock is not read.
        let Some(interval) = self.interval else {
            return Ok(());
        };
        if account.try_request(self.started.elapsed(), interval) {
            return Ok(());
        }
        Err(Problem::too_many_requests(
            "more requests than http.client_requests_per_second",
        ))
    }

    /// A budget for a body, empty yet.
    pub(super) fn body_budget<'a>(&'a self, account: &'a ClientUsage) -> BodyBudget<'a> {
        BodyBudget {
            limits: self,
            account,
            bytes: 0,
        }
    }

    /// Counts a connection; `None` if it is one too many.
    pub(super) fn connect(self: &Arc<Self>, address: IpAddr) -> Option<ConnectionPermit> {
        let address = client_network(address);
        let mut peers = self.peers();
        peers.sweep(self.started.elapsed());
        let peer = peers.known.entry(address).or_default();
        if peer.connections >= self.client_connections_max {
            return None;
        }
        peer.connections += 1;
        Some(ConnectionPermit {
            limits: Arc::clone(self),
            address,
            account: Arc::clone(&peer.account),
        })
    }

    fn disconnect(&self, address: IpAddr) {
        let mut peers = self.peers();
        let Some(peer) = peers.known.get_mut(&address) else {
            return;
        };
        peer.connections -= 1;
        if peer.is_forgettable(self.started.elapsed()) {
            peers.known.remove(&address);
        }
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        // Each entry is consistent whenever the lock is free, so lock poisoning is ignored.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientUsage {
    /// A token bucket of one second's tokens. It is stored as the time until which its tokens are
    /// spent.
    fn try_request(&self, now: Duration, interval: Duration) -> bool {
        let (now, interval) = (nanoseconds(now), nanoseconds(interval));
        let spend = |until: u64| {
            let until = until.max(now) + interval;
            (until <= now + nanoseconds(SECOND)).then_some(until)
        };
        self.next_allowed
            .fetch_update(Relaxed, Relaxed, spend)
            .is_ok()
    }
}

/// Enough for 584 years.
fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

impl Peer {
    fn is_forgettable(&self, now: Duration) -> bool {
        self.connections == 0 && self.account.next_allowed.load(Relaxed) <= nanoseconds(now)
    }
}

impl Peers {
    /// Sweeps rarely, so that each new connection pays for a few entries.
    fn sweep(&mut self, now: Duration) {
        if self.known.len() >= self.sweep_at {
            self.known.retain(|_, peer| !peer.is_forgettable(now));
            self.sweep_at = (2 * self.known.len()).max(SWEEP_MIN);
        }
    }
}

/// The owner of one IPv6 address has all 2^64 of its network (RFC 6177): they are one client.
fn client_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        address => address,
    }
}

/// A connection of a client; dropping it removes it from the table.
#[derive(Debug)]
pub(super) struct ConnectionPermit {
    limits: Arc<Limits>,
    pub(super) address: IpAddr,
    pub(super) account: Arc<ClientUsage>,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.limits.disconnect(self.address);
    }
}

/// Bytes of a body in memory; dropping it returns the memory to the budget.
#[derive(Debug)]
pub(super) struct BodyBudget<'a> {
    limits: &'a Limits,
    account: &'a ClientUsage,
    bytes: usize,
}

impl BodyBudget<'_> {
    /// Reserves more, if there is capacity.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), Problem> {
        if !add(
            &self.account.body_bytes,
            bytes,
            self.limits.client_body_bytes_max,
        ) {
            return Err(Problem::too_many_requests(
                "more body bytes in progress than http.client_body_bytes_max",
            ));
        }
        if !add(
            &self.limits.bodies_bytes,
            bytes,
            self.limits.bodies_bytes_max,
        ) {
            self.account.body_bytes.fetch_sub(bytes, Relaxed);
            return Err(Problem::unavailable(
                "more body bytes in progress than http.bodies_bytes_max; nothing was stored",
            ));
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for BodyBudget<'_> {
    fn drop(&mut self) {
        self.account.body_bytes.fetch_sub(self.bytes, Relaxed);
        self.limits.bodies_bytes.fetch_sub(self.bytes, Relaxed);
    }
}

fn add(held: &AtomicUsize, bytes: usize, limit: usize) -> bool {
    let reserve = |held: usize| held.checked_add(bytes).filter(|sum| *sum <= limit);
    held.fetch_update(Relaxed, Relaxed, reserve).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::{NonZeroU32, NonZeroUsize};

    fn limits(change: impl FnOnce(&mut config::Http)) -> Arc<Limits> {
        let mut http = config::Config::load("", &std::collections::BTreeMap::new())
            .unwrap()
            .config
            .http;
        change(&mut http);
        Arc::new(Limits::new(&http))
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_second_of_requests_at_once_and_then_the_pace() {
        let (account, interval) = (ClientUsage::default(), SECOND / 10);
        let at = |ms| account.try_request(Duration::from_millis(ms), interval);
        assert!((0..10).all(|_| at(5000)), "the burst");
        assert!(!at(5000) && !at(5099));
        assert!(at(5100) && !at(5100));
        assert!(at(5300) && at(5300) && !at(5300));
        assert!(
            (0..10).all(|_| at(60_000)) && !at(60_000),
            "at most the requests of a second are saved"
        );
    }

    #[test]
    fn without_a_limit_every_request_is_accepted() {
        let limits = limits(|_| ());
        let account = ClientUsage::default();
        assert!((0..100_000).all(|_| limits.request(&account).is_ok()));
        assert_eq!(account.next_allowed.load(Relaxed), 0);
    }

    #[test]
    fn the_pace_is_each_client_s_own() {
        let limits = limits(|http| http.client_requests_per_second = NonZeroU32::new(1));
        let (one, other) = (ClientUsage::default(), ClientUsage::default());
        assert!(limits.request(&one).is_ok() && limits.request(&one).is_err());
        assert!(limits.request(&other).is_ok());
    }

    #[test]
    fn bodies_have_a_limit_each_and_one_together() {
        let limits =
            limits(|http| (http.client_body_bytes_max, http.bodies_bytes_max) = (100, 150));
        let (one, other) = (ClientUsage::default(), ClientUsage::default());
        let (mut first, mut second) = (limits.body_budget(&one), limits.body_budget(&one));
        first.reserve(60).unwrap();
        second.reserve(40).unwrap();
        assert_eq!(
            second.reserve(1),
            Err(Problem::too_many_requests(
                "more body bytes in progress than http.client_body_bytes_max"
            ))
        );
        let mut third = limits.body_budget(&other);
        third.reserve(50).unwrap();
        assert!(third.reserve(1).unwrap_err().into_response().status() == 503);
        assert_eq!(
            other.body_bytes.load(Relaxed),
            50,
            "refused bytes are not reserved"
        );
        drop(first);
        third.reserve(50).unwrap();
        drop((second, third));
        assert_eq!(
            [&one, &other].map(|account| account.body_bytes.load(Relaxed)),
            [0, 0]
        );
        assert_eq!(limits.bodies_bytes.load(Relaxed), 0);
    }

    #[test]
    fn connections_of_an_address_are_bounded() {
        let limits = limits(|http| http.client_connections_max = NonZeroUsize::new(2).unwrap());
        let (first, second) = (
            limits.connect(address("192.0.2.1")),
            limits.connect(address("::ffff:192.0.2.1")),
        );
        assert!(first.is_some() && second.is_some());
        assert!(limits.connect(address("192.0.2.1")).is_none());
        assert!(limits.connect(address("192.0.2.2")).is_some());
        drop(first);
        assert!(limits.connect(address("192.0.2.1")).is_some());
        drop(second);
        assert!(limits.peers().known.is_empty());
    }

    #[test]
    fn an_ipv6_network_is_one_client() {
        assert_eq!(
            client_network(address("2001:db8:1:2:3:4:5:6")),
            address("2001:db8:1:2::")
        );
        assert_eq!(client_network(address("::1")), address("::1"));
        assert_eq!(
            client_network(address("::ffff:192.0.2.1")),
            address("192.0.2.1")
        );
    }

    #[test]
    fn an_entry_is_removed_when_the_pace_has_recovered() {
        let limits = limits(|http| http.client_requests_per_second = NonZeroU32::new(1));
        for low in 0..10_000_u32 {
            let visit = limits
                .connect(std::net::Ipv4Addr::from_bits(low).into())
                .unwrap();
            visit
                .account
                .next_allowed
                .store(if low < 10 { u64::MAX } else { 1 }, Relaxed);
        }
        assert_eq!(
            limits.peers().known.len(),
            10,
            "those whose pace has not recovered"
        );
        // Entries that were slowed down when their connections closed are swept.
        let mut peers = limits.peers();
        for peer in peers.known.values() {
            peer.account.next_allowed.store(0, Relaxed);
        }
        peers.sweep_at = 10;
        peers.sweep(SECOND);
        assert!(peers.known.is_empty() && peers.sweep_at == SWEEP_MIN);
    }
}
