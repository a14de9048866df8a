//! The listening half of the stand-ins: a port that stays theirs, a thread a connection, a bounded
//! end.

use super::lock;
use socket2::SockRef;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// Below the ports that systems give to outgoing connections. While a server of ours is down, no
/// process gets its port by accident. Nor can a client that retries there end up connected to
/// itself.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 12_000;

/// A listener on a port that no other part of this process was given. Another process can only take
/// it between the closing of this listener and the next bind of the port.
pub fn free_port() -> TcpListener {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test processes that run at once begin at different places.
    let start = process::id().wrapping_mul(101);
    for _ in 0..PORTS {
        let turn = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let offset = start.wrapping_add(turn) % u32::from(PORTS);
        let port = FIRST_PORT + u16::try_from(offset).expect("PORTS is a u16");
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            return listener;
        }
    }
    panic!("none of {PORTS} ports from {FIRST_PORT} on is free on 127.0.0.1");
}

/// Accepts connections and serves each on a thread of its own, until it is dropped.
pub struct Server {
    listener: Arc<TcpListener>,
    connections: Arc<Mutex<Connections>>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Connections {
    stopping: bool,
    open: Vec<(TcpStream, JoinHandle<()>)>,
}

impl Server {
    pub fn start(
        listener: TcpListener,
        serve: impl Fn(&TcpStream) + Send + Sync + 'static,
    ) -> Server {
        let listener = Arc::new(listener);
        let connections = Arc::new(Mutex::new(Connections::default()));
        let accepting = thread::spawn({
            let listener = Arc::clone(&listener);
            let connections = Arc::clone(&connections);
            move || accept(&listener, &connections, &Arc::new(serve))
        });
        Server {
            listener,
            connections,
            accepting: Some(accepting),
        }
    }
}

fn accept<F>(listener: &TcpListener, connections: &Mutex<Connections>, serve: &Arc<F>)
where
    F: Fn(&TcpStream) + Send + Sync + 'static,
{
    for stream in listener.incoming() {
        let mut connections = lock(connections);
        if connections.stopping {
            return;
        }
        let Ok(stream) = stream else { continue };
        let Ok(handle) = stream.try_clone() else {
            continue;
        };
        let serve = Arc::clone(serve);
        let thread = thread::spawn(move || {
            serve(&stream);
            // The handle kept for the stop holds the socket open: the peer must see the end now.
            let _ = stream.shutdown(Shutdown::Both);
        });
        connections.open.retain(|(_, thread)| !thread.is_finished());
        connections.open.push((handle, thread));
    }
}

impl Drop for Server {
    /// Refuses new connections, closes the open ones, and waits for their threads.
    fn drop(&mut self) {
        lock(&self.connections).stopping = true;
        // Ends the accept, and the listening of every copy. Another test may be starting a process
        // at this moment, which has a copy of each descriptor until its exec. Closing ours alone
        // would leave the port in use, and a peer in a queue without a reader.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let open = std::mem::take(&mut lock(&self.connections).open);
        for (stream, _) in &open {
            let _ = stream.shutdown(Shutdown::Both);
        }
        for (_, thread) in open {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_dropped_server_stops_listening_even_if_a_process_has_a_copy() {
    let listener = free_port();
    let address = listener.local_addr().unwrap();
    let _copy = listener.try_clone().unwrap();
    drop(Server::start(listener, |_| {}));
    assert!(TcpStream::connect(address).is_err());
    drop(TcpListener::bind(address).unwrap());
}
