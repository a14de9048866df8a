//! The HTTP server: hyper around a pure router. The one place that names hyper.
//!
//! One thread, one current-thread runtime. It never waits for the database: writes go to the
//! writer's queue, reads to the readers' queue, and their results return by a oneshot.

mod admin;
mod app;
mod auth;
mod body;
mod bound_socket;
mod connections;
mod health;
mod host;
mod idempotency_key;
mod limits;
mod local_socket;
mod metrics;
mod openapi;
mod overview;
mod page;
mod params;
mod payments;
mod peer;
mod problem;
mod refusals;
mod reply_queue;
mod response;
mod route_pattern;
mod router;
mod server;
mod takings;
mod trace;

pub use app::{App, AppContext, Channel};
pub use auth::{Authenticator, LastTokenRemoved, TokenDiff};
pub use bound_socket::BoundSocket;
pub use local_socket::{LocalListener, LocalSocket, LocalSocketError, check_local_socket_path};
pub use server::{THREAD, spawn_server};
