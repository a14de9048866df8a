//! The limits of one client's share: requests a second, memory for bodies, connections.
//!
//! A client is its token, or else its address. The entry of an address is removed with its last
//! connection, or when its pace has recovered. So the table of clients has an entry for each
//! connection and each address of the last second. It may grow to twice that before it is swept.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::problem::Problem;
use crate::config;

const SECOND: Duration = Duration::from_secs(1);

/// With fewer clients than this, idle ones are not removed.
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
struct ClientLimitEntry {
    usage: Arc<ClientUsage>,
    connections: usize,
}

#[derive(Debug)]
struct ClientLimitTable {
    known: HashMap<IpAddr, ClientLimitEntry>,
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
    clients: Mutex<ClientLimitTable>,
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
            clients: Mutex::new(ClientLimitTable {
                known: HashMap::new(),
                sweep_at: SWEEP_MIN,
            }),
            started: Instant::now(),
        }
    }

    /// Counts a request, or refuses it.
    pub(super) fn request(&self, usage: &ClientUsage) -> Result<(), Problem> {
        // Without a limit the clock is not read.
        let Some(interval) = self.interval else {
            return Ok(());
        };
        if usage.try_request(self.started.elapsed(), interval) {
            return Ok(());
        }
        Err(Problem::too_many_requests(
            "more requests than http.client_requests_per_second",
        ))
    }

    /// The bytes of all bodies in memory.
    pub(super) fn body_bytes(&self) -> usize {
        self.bodies_bytes.load(Relaxed)
    }

    /// A budget for a body, empty yet.
    pub(super) fn body_limit<'a>(&'a self, usage: &'a ClientUsage) -> BodyLimit<'a> {
        BodyLimit {
            limits: self,
            usage,
            bytes: 0,
        }
    }

    /// Counts a connection; `None` if it is one too many.
    pub(super) fn connect(self: &Arc<Self>, address: IpAddr) -> Option<LimitedConnection> {
        let address = limited_client_network(address);
        let mut clients = self.clients();
        clients.sweep(self.started.elapsed());
        let client = clients.known.entry(address).or_default();
        if client.connections >= self.client_connections_max {
            return None;
        }
        client.connections += 1;
        Some(LimitedConnection {
            limits: Arc::clone(self),
            address,
            usage: Arc::clone(&client.usage),
        })
    }

    fn disconnect(&self, address: IpAddr) {
        let mut clients = self.clients();
        let Some(client) = clients.known.get_mut(&address) else {
            return;
        };
        client.connections -= 1;
        if client.is_forgettable(self.started.elapsed()) {
            clients.known.remove(&address);
        }
    }

    fn clients(&self) -> MutexGuard<'_, ClientLimitTable> {
        // Each entry is consistent whenever the lock is free, so lock poisoning is ignored.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientUsage {
    /// A token bucket of one second's tokens. It is stored as the time until which its tokens are
    /// spent.
    fn try_request(&self, now: Duration, interval: Duration) -> bool {
        let now = limit_nanoseconds(now);
        let interval = limit_nanoseconds(interval);
        let spend = |until: u64| {
            let until = until.max(now) + interval;
            (until <= now + limit_nanoseconds(SECOND)).then_some(until)
        };
        self.next_allowed
            .fetch_update(Relaxed, Relaxed, spend)
            .is_ok()
    }
}

/// Enough for 584 years.
fn limit_nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

impl ClientLimitEntry {
    fn is_forgettable(&self, now: Duration) -> bool {
        self.connections == 0 && self.usage.next_allowed.load(Relaxed) <= limit_nanoseconds(now)
    }
}

impl ClientLimitTable {
    /// Sweeps rarely, so that each new connection pays for a few entries.
    fn sweep(&mut self, now: Duration) {
        if self.known.len() >= self.sweep_at {
            self.known.retain(|_, client| !client.is_forgettable(now));
            self.sweep_at = (2 * self.known.len()).max(SWEEP_MIN);
        }
    }
}

/// The owner of one IPv6 address has all 2^64 of its network (RFC 6177): they are one client.
fn limited_client_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        address => address,
    }
}

/// A connection of a client; dropping it removes it from the table.
#[derive(Debug)]
pub(super) struct LimitedConnection {
    limits: Arc<Limits>,
    pub(super) address: IpAddr,
    pub(super) usage: Arc<ClientUsage>,
}

impl Drop for LimitedConnection {
    fn drop(&mut self) {
        self.limits.disconnect(self.address);
    }
}

/// Bytes of a body in memory; dropping it returns the memory to the budget.
#[derive(Debug)]
pub(super) struct BodyLimit<'a> {
    limits: &'a Limits,
    usage: &'a ClientUsage,
    bytes: usize,
}

impl BodyLimit<'_> {
    /// Reserves more, if there is capacity.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), Problem> {
        if !add_within_limit(
            &self.usage.body_bytes,
            bytes,
            self.limits.client_body_bytes_max,
        ) {
            return Err(Problem::too_many_requests(
                "more body bytes in progress than http.client_body_bytes_max",
            ));
        }
        if !add_within_limit(
            &self.limits.bodies_bytes,
            bytes,
            self.limits.bodies_bytes_max,
        ) {
            self.usage.body_bytes.fetch_sub(bytes, Relaxed);
            return Err(Problem::unavailable(
                "more body bytes in progress than http.bodies_bytes_max; nothing was stored",
            ));
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for BodyLimit<'_> {
    fn drop(&mut self) {
        self.usage.body_bytes.fetch_sub(self.bytes, Relaxed);
        self.limits.bodies_bytes.fetch_sub(self.bytes, Relaxed);
    }
}

fn add_within_limit(reserved: &AtomicUsize, bytes: usize, limit: usize) -> bool {
    let try_add = |reserved: usize| reserved.checked_add(bytes).filter(|sum| *sum <= limit);
    reserved.fetch_update(Relaxed, Relaxed, try_add).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::{NonZeroU32, NonZeroUsize};

    fn changed_limits(change: impl FnOnce(&mut config::Http)) -> Arc<Limits> {
        let mut http = config::Config::load("", &std::collections::BTreeMap::new())
            .unwrap()
            .config
            .http;
        change(&mut http);
        Arc::new(Limits::new(&http))
    }

    fn client_address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_limits_allow_a_second_of_requests_at_once_and_then_the_pace() {
        let usage = ClientUsage::default();
        let interval = SECOND / 10;
        let at = |ms| usage.try_request(Duration::from_millis(ms), interval);
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
    fn without_limits_every_request_is_accepted() {
        let limits = changed_limits(|_| ());
        let usage = ClientUsage::default();
        assert!((0..100_000).all(|_| limits.request(&usage).is_ok()));
        assert_eq!(usage.next_allowed.load(Relaxed), 0);
    }

    #[test]
    fn the_limits_give_each_client_a_pace_of_its_own() {
        let limits = changed_limits(|http| http.client_requests_per_second = NonZeroU32::new(1));
        let one = ClientUsage::default();
        let other = ClientUsage::default();
        assert!(limits.request(&one).is_ok() && limits.request(&one).is_err());
        assert!(limits.request(&other).is_ok());
    }

    #[test]
    fn body_bytes_have_limits_for_each_client_and_for_all_together() {
        let limits = changed_limits(|http| {
            http.client_body_bytes_max = 100;
            http.bodies_bytes_max = 150;
        });
        let one = ClientUsage::default();
        let other = ClientUsage::default();
        let mut first = limits.body_limit(&one);
        let mut second = limits.body_limit(&one);
        first.reserve(60).unwrap();
        second.reserve(40).unwrap();
        assert_eq!(
            second.reserve(1),
            Err(Problem::too_many_requests(
                "more body bytes in progress than http.client_body_bytes_max"
            ))
        );
        let mut third = limits.body_limit(&other);
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
            [&one, &other].map(|usage| usage.body_bytes.load(Relaxed)),
            [0, 0]
        );
        assert_eq!(limits.bodies_bytes.load(Relaxed), 0);
    }

    #[test]
    fn the_limits_bound_the_connections_of_an_address() {
        let limits =
            changed_limits(|http| http.client_connections_max = NonZeroUsize::new(2).unwrap());
        let first = limits.connect(client_address("192.0.2.1"));
        let second = limits.connect(client_address("::ffff:192.0.2.1"));
        assert!(first.is_some() && second.is_some());
        assert!(limits.connect(client_address("192.0.2.1")).is_none());
        assert!(limits.connect(client_address("192.0.2.2")).is_some());
        drop(first);
        assert!(limits.connect(client_address("192.0.2.1")).is_some());
        drop(second);
        assert!(limits.clients().known.is_empty());
    }

    #[test]
    fn an_ipv6_network_is_one_client_to_the_limits() {
        assert_eq!(
            limited_client_network(client_address("2001:db8:1:2:3:4:5:6")),
            client_address("2001:db8:1:2::")
        );
        assert_eq!(
            limited_client_network(client_address("::1")),
            client_address("::1")
        );
        assert_eq!(
            limited_client_network(client_address("::ffff:192.0.2.1")),
            client_address("192.0.2.1")
        );
    }

    #[test]
    fn a_client_is_removed_from_the_limits_when_its_pace_has_recovered() {
        let limits = changed_limits(|http| http.client_requests_per_second = NonZeroU32::new(1));
        for low in 0..10_000_u32 {
            let visit = limits
                .connect(std::net::Ipv4Addr::from_bits(low).into())
                .unwrap();
            visit
                .usage
                .next_allowed
                .store(if low < 10 { u64::MAX } else { 1 }, Relaxed);
        }
        assert_eq!(
            limits.clients().known.len(),
            10,
            "those whose pace has not recovered"
        );
        // Entries that were slowed down when their connections closed are swept.
        let mut clients = limits.clients();
        for client in clients.known.values() {
            client.usage.next_allowed.store(0, Relaxed);
        }
        clients.sweep_at = 10;
        clients.sweep(SECOND);
        assert!(clients.known.is_empty() && clients.sweep_at == SWEEP_MIN);
    }
}
