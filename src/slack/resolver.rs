//! DNS lookups of one webhook, on a thread that exists from the start.
//!
//! ureq would start a thread for each connection, and panic where the operating system starts none.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// ureq accepts up to this many addresses of a name.
const ADDRESSES_MAX: usize = 16;

/// Longer than any configured timeout.
const RESOLVE_MAX: Duration = Duration::from_mins(1);

/// Hands lookups to the thread. The thread ends with its owner, as soon as the system's resolver
/// returns: a lookup cannot be cancelled, and no thread waits for it.
#[derive(Debug)]
pub(super) struct DnsResolver(Sender<Lookup>);

/// The operating system found no address. Nothing was sent.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct LookupFailed(io::Error);

/// A host and port to resolve.
struct Lookup {
    name: String,
    reply: Sender<io::Result<Vec<SocketAddr>>>,
}

impl DnsResolver {
    pub(super) fn start() -> io::Result<Self> {
        let (sender, lookups) = bounded(0);
        thread::Builder::new()
            .name("resolver".to_owned())
            .spawn(move || run_resolver(&lookups))?;
        Ok(Self(sender))
    }
}

fn run_resolver(lookups: &Receiver<Lookup>) {
    for Lookup { name, reply } in lookups {
        let _ = reply.send(name.to_socket_addrs().map(Iterator::collect));
    }
}

impl Resolver for DnsResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let name = uri
            .scheme()
            .zip(uri.authority())
            .and_then(|(scheme, authority)| DefaultResolver::host_and_port(scheme, authority))
            .ok_or(ureq::Error::HostNotFound)?;
        let deadline = Instant::now() + (*timeout.after).min(RESOLVE_MAX);
        let (reply, replied) = bounded(1);
        let lookup = Lookup { name, reply };
        if self.0.send_deadline(lookup, deadline).is_err() {
            return Err(ureq::Error::Timeout(timeout.reason));
        }
        let found = replied
            .recv_deadline(deadline)
            .map_err(|_| ureq::Error::Timeout(timeout.reason))?
            .map_err(|error| ureq::Error::Other(Box::new(LookupFailed(error))))?;
        let mut addresses = self.empty();
        for address in found.into_iter().take(ADDRESSES_MAX) {
            addresses.push(address);
        }
        if addresses.is_empty() {
            Err(ureq::Error::HostNotFound)
        } else {
            Ok(addresses)
        }
    }
}
