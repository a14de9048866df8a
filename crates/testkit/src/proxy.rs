//! A network that fails on command: a TCP proxy that passes bytes on, holds them back, or hangs up.

use super::http::read_on;
use super::listen::{Server, free_port};
use super::lock;
use std::io::Write as _;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Passes connections on to one upstream address; dropping it hangs up.
pub struct Proxy {
    address: SocketAddr,
    upstream: String,
    gate: Arc<Gate>,
    server: Option<Server>,
}

/// What every byte passes through.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    connections: AtomicU64,
}

#[derive(Default, Clone, Copy, PartialEq)]
enum State {
    #[default]
    Flowing,
    /// Each piece is held back for this long.
    Slow(Duration),
    Stalled,
    /// Connections before this one are stalled, later ones are not.
    Held(u64),
    Cut,
}

impl State {
    fn holds(self, connection: u64) -> bool {
        match self {
            State::Stalled => true,
            State::Held(first) => connection < first,
            State::Flowing | State::Slow(_) | State::Cut => false,
        }
    }
}

impl Proxy {
    /// Listens on a port of its own. It connects to the upstream when a client connects.
    pub fn start(upstream: String) -> Proxy {
        let listener = free_port();
        let address = listener
            .local_addr()
            .expect("a bound listener has an address");
        let mut proxy = Proxy {
            address,
            upstream,
            gate: Arc::default(),
            server: None,
        };
        proxy.serve(listener);
        proxy
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Closes all connections and refuses new ones, until [`Proxy::heal`].
    pub fn cut(&mut self) {
        self.gate.set(State::Cut);
        self.server = None;
    }

    /// Holds back all bytes in both directions; connections, also new ones, stay open.
    pub fn stall(&mut self) {
        assert!(self.server.is_some(), "a cut proxy has nothing to stall");
        self.gate.set(State::Stalled);
    }

    /// Holds back all bytes of the connections that there are, as when their packets were lost and
    /// are sent again later. New connections are not concerned.
    pub fn hold(&mut self) {
        assert!(self.server.is_some(), "a cut proxy has nothing to hold");
        self.gate
            .set(State::Held(self.gate.connections.load(Ordering::SeqCst)));
    }

    /// Holds back each piece for this long, in both directions.
    pub fn slow(&mut self, delay: Duration) {
        assert!(self.server.is_some(), "a cut proxy passes nothing on");
        self.gate.set(State::Slow(delay));
    }

    /// Lets bytes flow again, those held back first, and accepts connections.
    pub fn heal(&mut self) {
        self.gate.set(State::Flowing);
        if self.server.is_none() {
            let listener = TcpListener::bind(self.address);
            self.serve(listener.expect("the port of a cut proxy stays free"));
        }
    }

    fn serve(&mut self, listener: TcpListener) {
        let upstream = self.upstream.clone();
        let gate = Arc::clone(&self.gate);
        self.server = Some(Server::start(listener, move |client| {
            gate.join(client, &upstream);
        }));
    }
}

impl Drop for Proxy {
    /// Bytes held back would keep their threads, and the server waits for these.
    fn drop(&mut self) {
        self.cut();
    }
}

impl Gate {
    fn set(&self, state: State) {
        *lock(&self.state) = state;
        self.changed.notify_all();
    }

    /// Connects a client to the upstream until either side ends; without an upstream the client is
    /// dropped.
    fn join(&self, client: &TcpStream, upstream: &str) {
        let Ok(upstream) = TcpStream::connect(upstream) else {
            return;
        };
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        thread::scope(|scope| {
            scope.spawn(|| self.pump(number, client, &upstream));
            self.pump(number, &upstream, client);
        });
    }

    /// Moves bytes one way. Its end is the end of both directions: a connection never hangs on by
    /// half.
    fn pump(&self, connection: u64, mut from: &TcpStream, mut to: &TcpStream) {
        // Small messages must not wait for each other (Nagle) because a proxy is in between.
        let _ = to.set_nodelay(true);
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = read_on(&mut from, &mut buffer) {
            if !self.pass(connection) || to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    /// Waits while the proxy stalls; false when it has been cut.
    fn pass(&self, connection: u64) -> bool {
        let state = lock(&self.state);
        let state = self
            .changed
            .wait_while(state, |state| state.holds(connection));
        let state = *state.unwrap_or_else(PoisonError::into_inner);
        if let State::Slow(delay) = state {
            thread::park_timeout(delay);
        }
        state != State::Cut
    }
}
