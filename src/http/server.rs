//! The thread "http": accepts connections, limits them, and closes them. `router.rs` responds to
//! requests.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio_io_timeout::TimeoutWriter;

use super::app::App;
use super::connections::{ConnectionSlot, ConnectionStream, Connections};
use super::limits::LimitedConnection;
use super::refusals::LOG_INTERVAL;
use super::router::Router;
use crate::runtime::worker::Worker;

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

/// Starts the server on a socket that already listens.
pub fn spawn_server(
    listener: TcpListener,
    app: App,
    exits: &Sender<&'static str>,
) -> io::Result<Worker> {
    listener.set_nonblocking(true)?;
    // Accepted sockets inherit this.
    SockRef::from(&listener).set_send_buffer_size(SEND_BUFFER_BYTES)?;
    let stop = Arc::new(Notify::new());
    let interrupt = Arc::clone(&stop);
    let worker = Worker::spawn("http", exits, move |_| {
        if let Err(error) = run_server(listener, &Arc::new(app), &stop) {
            log::error!("the HTTP server could not start: {error}");
        }
    })?;
    Ok(worker.on_stop(move || interrupt.notify_one()))
}

fn run_server(listener: TcpListener, app: &Arc<App>, stop: &Notify) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let replies = Arc::clone(app.reply_queue());
        tokio::spawn(async move { replies.run().await });
        let refusing = Arc::clone(app);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOG_INTERVAL).await;
                refusing.refusals().log_rest();
            }
        });
        let connections_max = app.context.settings.connections_max.get();
        let slots = Arc::new(Semaphore::new(connections_max));
        let (stopping, stopped) = watch::channel(());
        tokio::select! {
            biased;
            () = stop.notified() => {}
            () = serve_connections(&listener, app, &slots, &stopped) => {}
        }
        // No new connections; requests in progress are finished, idle connections are closed.
        drop((listener, stopping));
        let all = u32::try_from(connections_max).unwrap_or(u32::MAX);
        if tokio::time::timeout(STOP_TIME, slots.acquire_many(all))
            .await
            .is_err()
        {
            log::warn!(
                "some requests were still in progress after {} s: closing their connections",
                STOP_TIME.as_secs()
            );
        }
        Ok(())
    })
}

async fn serve_connections(
    listener: &tokio::net::TcpListener,
    app: &Arc<App>,
    slots: &Arc<Semaphore>,
    stopped: &watch::Receiver<()>,
) {
    let connections = Connections::new();
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                failing = false;
                let Some(client) = app.limits().connect(address.ip()) else {
                    app.refusals().connection(address.ip());
                    continue;
                };
                let Some(permit) = acquire_server_slot(slots, &connections).await else {
                    return;
                };
                let connection = ServedConnection {
                    client,
                    slot: connections.open(),
                    _permit: permit,
                };
                serve_connection(stream, app, stopped.clone(), connection);
            }
            Err(error) => {
                if !failing {
                    log::warn!("a connection could not be accepted, will retry: {error}");
                }
                failing = true;
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A slot for one more connection. While all are in use, the least used connection is closed.
async fn acquire_server_slot(
    slots: &Arc<Semaphore>,
    connections: &Connections,
) -> Option<OwnedSemaphorePermit> {
    loop {
        let permit = Arc::clone(slots).acquire_owned();
        match tokio::time::timeout(SLOT_RETRY, permit).await {
            Ok(permit) => return permit.ok(),
            Err(_) => {
                connections.close_one();
            }
        }
    }
}

/// The resources of a connection until it closes.
struct ServedConnection {
    client: LimitedConnection,
    slot: ConnectionSlot,
    _permit: OwnedSemaphorePermit,
}

fn serve_connection(
    stream: TcpStream,
    app: &Arc<App>,
    mut stopped: watch::Receiver<()>,
    connection: ServedConnection,
) {
    // A response is one small write: it must not wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
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
            let response = Router::new(&app).respond(&served.client, request).await;
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
