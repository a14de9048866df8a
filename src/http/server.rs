//! The thread "http": accepts connections, limits them, and closes them. `router.rs` responds to
//! requests.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::gauge::Gauge;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio_io_timeout::TimeoutWriter;

use super::app::App;
use super::connections::{ConnectionSlot, ConnectionStream, Connections};
use super::limits::ClientUsage;
use super::local_socket::{LocalListener, LocalSocketFile};
use super::peer::{LocalPeer, LocalUser, Peer};
use super::refusals::LOG_INTERVAL;
use super::router::Router;
use crate::runtime::metrics::ConnectionRefusal;
use crate::runtime::worker::{HEARTBEAT_INTERVAL, Heartbeat, Worker, WorkerGroup};

/// The name of the HTTP thread.
pub const THREAD: &str = "http";

/// The maximum number of bytes of a request's head, and of a connection's buffer.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// The bytes of responses that the kernel keeps for a client that does not read; it uses up to
/// twice as much memory (socket(7), `SO_SNDBUF`). The default is some megabytes for each
/// connection.
const SEND_BUFFER_BYTES: usize = 128 * 1024;

/// How long a request in progress may last after the stop.
const STOP_TIME: Duration = Duration::from_secs(4);

/// The pause after a failed `accept`: mostly for lack of descriptors, which become free by
/// themselves.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a new connection waits for a free slot, before another connection is closed for it.
const SLOT_RETRY: Duration = Duration::from_millis(50);

/// The connections of the local socket. They have slots of their own: an operator gets in while the
/// network uses up its slots.
const LOCAL_CONNECTIONS_MAX: usize = 8;

/// Starts the server on sockets that already listen.
pub fn spawn_server(
    network: TcpListener,
    local: Option<LocalListener>,
    app: App,
    group: &WorkerGroup,
) -> io::Result<Worker> {
    network.set_nonblocking(true)?;
    // Accepted sockets inherit this.
    SockRef::from(&network).set_send_buffer_size(SEND_BUFFER_BYTES)?;
    let stop = Arc::new(Notify::new());
    let interrupt = Arc::clone(&stop);
    let worker = Worker::spawn(THREAD, group, move |signal| {
        let heartbeat = signal.heartbeat().clone();
        if let Err(error) = run_server(network, local, &Arc::new(app), &stop, heartbeat) {
            log::error!(event = "http_start_failed"; "the HTTP server could not start: {error}");
        }
    })?;
    Ok(worker.on_stop(move || interrupt.notify_one()))
}

fn run_server(
    network: TcpListener,
    local: Option<LocalListener>,
    app: &Arc<App>,
    stop: &Notify,
    heartbeat: Heartbeat,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let network = tokio::net::TcpListener::from_std(network)?;
        let local = local.map(AcceptedLocal::new).transpose()?;
        let replies = Arc::clone(app.reply_queue());
        tokio::spawn(async move { replies.run().await });
        tokio::spawn(async move {
            loop {
                heartbeat.beat();
                tokio::time::sleep(HEARTBEAT_INTERVAL / 3).await;
            }
        });
        let refusing = Arc::clone(app);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOG_INTERVAL).await;
                refusing.refusals().log_rest();
            }
        });
        let slots = ServerSlots::new(app.context.settings.connections_max.get());
        let local_slots = ServerSlots::new(LOCAL_CONNECTIONS_MAX);
        let (stopping, stopped) = watch::channel(());
        let serve_local = async {
            match &local {
                Some(local) => serve_connections(local, app, &local_slots, &stopped).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.notified() => {}
            () = serve_connections(&network, app, &slots, &stopped) => {}
            () = serve_local => {}
        }
        // No new connections; requests in progress are finished, idle connections are closed.
        drop((network, local, stopping));
        let all = async { tokio::join!(slots.all_free(), local_slots.all_free()) };
        if tokio::time::timeout(STOP_TIME, all).await.is_err() {
            log::warn!(
                event = "requests_cut_at_stop", seconds = STOP_TIME.as_secs();
                "some requests were still in progress after {} s: closing their connections",
                STOP_TIME.as_secs()
            );
        }
        Ok(())
    })
}

/// The connections of one listener: how many there may be, and which of them are open.
struct ServerSlots {
    permits: Arc<Semaphore>,
    max: usize,
    connections: Arc<Connections>,
}

impl ServerSlots {
    fn new(max: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(max)),
            max,
            connections: Connections::new(),
        }
    }

    /// A slot for one more connection. While all are in use, the least used connection is closed.
    async fn acquire(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            let permit = Arc::clone(&self.permits).acquire_owned();
            match tokio::time::timeout(SLOT_RETRY, permit).await {
                Ok(permit) => return permit.ok(),
                Err(_) => {
                    self.connections.close_one();
                }
            }
        }
    }

    /// Waits until no connection is open.
    async fn all_free(&self) {
        let all = u32::try_from(self.max).unwrap_or(u32::MAX);
        drop(self.permits.acquire_many(all).await);
    }
}

/// A socket that accepts connections.
trait ServerListener {
    type Stream: AsyncRead + AsyncWrite + Send + 'static;

    /// The next connection; without a peer it is refused, and closed at once.
    async fn accept_peer(&self, app: &App) -> io::Result<(Self::Stream, Option<Peer>)>;
}

impl ServerListener for tokio::net::TcpListener {
    type Stream = TcpStream;

    async fn accept_peer(&self, app: &App) -> io::Result<(TcpStream, Option<Peer>)> {
        let (stream, address) = self.accept().await?;
        // A response is one small write: it must not wait for the acknowledgement before it.
        let _ = stream.set_nodelay(true);
        let peer = app.limits().connect(address.ip()).map(Peer::Network);
        if peer.is_none() {
            app.refusals().connection(address.ip());
            let http = app.context.store.metrics().http();
            http.refused(ConnectionRefusal::ClientLimit);
        }
        Ok((stream, peer))
    }
}

/// The local socket. All of its clients share one usage.
struct AcceptedLocal {
    listener: UnixListener,
    usage: Arc<ClientUsage>,
    _file: LocalSocketFile,
}

impl AcceptedLocal {
    fn new(local: LocalListener) -> io::Result<Self> {
        let (listener, file) = local.into_parts();
        Ok(Self {
            listener: UnixListener::from_std(listener)?,
            usage: Arc::default(),
            _file: file,
        })
    }
}

impl ServerListener for AcceptedLocal {
    type Stream = UnixStream;

    async fn accept_peer(&self, _: &App) -> io::Result<(UnixStream, Option<Peer>)> {
        let (stream, _) = self.listener.accept().await?;
        let uid = stream.peer_cred().ok().map(|peer| peer.uid());
        let peer = LocalPeer {
            usage: Arc::clone(&self.usage),
            user: LocalUser(uid),
        };
        Ok((stream, Some(Peer::Local(peer))))
    }
}

async fn serve_connections<L: ServerListener>(
    listener: &L,
    app: &Arc<App>,
    slots: &ServerSlots,
    stopped: &watch::Receiver<()>,
) {
    let mut failing = false;
    loop {
        match listener.accept_peer(app).await {
            Ok((stream, peer)) => {
                failing = false;
                let Some(peer) = peer else {
                    continue;
                };
                let Some(permit) = slots.acquire().await else {
                    return;
                };
                let open = app.context.store.metrics().http().connections.clone();
                open.inc();
                let connection = ServedConnection {
                    peer,
                    slot: slots.connections.open(),
                    open,
                    _permit: permit,
                };
                serve_connection(stream, app, stopped.clone(), connection);
            }
            Err(error) => {
                if !failing {
                    log::warn!(
                        event = "accept_failed";
                        "a connection could not be accepted, will retry: {error}"
                    );
                }
                failing = true;
                let http = app.context.store.metrics().http();
                http.refused(ConnectionRefusal::AcceptFailed);
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The resources of a connection until it closes.
struct ServedConnection {
    peer: Peer,
    slot: ConnectionSlot,
    /// The gauge of open connections.
    open: Gauge,
    _permit: OwnedSemaphorePermit,
}

impl Drop for ServedConnection {
    fn drop(&mut self) {
        self.open.dec();
    }
}

fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    app: &Arc<App>,
    mut stopped: watch::Receiver<()>,
    connection: ServedConnection,
) {
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(app.context.settings.write_timeout));
    let app = Arc::clone(app);
    let header_timeout = app.context.settings.header_timeout;
    let state = Arc::clone(&connection.slot.state);
    let stream = ConnectionStream::new(Box::pin(stream), Arc::clone(&state));
    let served = Arc::new(connection);
    let service = service_fn(move |request| {
        let app = Arc::clone(&app);
        let served = Arc::clone(&served);
        async move {
            served.slot.request_begins();
            let response = Router::new(&app).respond(&served.peer, request).await;
            served.slot.request_ends();
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // A client may shut its sending side down after its request, as `nc -N` does: it still gets
        // its response.
        .half_close(true)
        // Also the limit for an idle connection: hyper starts this timer when it begins to wait for
        // a head.
        .header_read_timeout(header_timeout)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    tokio::spawn(async move {
        let mut connection = pin!(connection);
        // The connection first: a request in progress gets its response, also on a connection that
        // is asked to close.
        let ended = tokio::select! {
            biased;
            result = connection.as_mut() => Some(result),
            _ = stopped.changed() => None,
            () = state.closed() => {
                log::debug!("closing a connection for a new one");
                None
            }
        };
        let ended = match ended {
            Some(result) => result,
            // hyper would wait for the first head.
            None if state.is_silent() => return,
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            log::debug!("a connection closed early: {error}");
        }
    });
}
