//! `[http]`: the API's address, limits and tokens.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::duration::{FOREVER, MS};
use super::typed_keys::TypedKeys;
use crate::domain::access::Access;
use crate::domain::loopback::is_loopback;
use crate::domain::token::TokenHash;

/// `[http]`: the address, limits and tokens of the API.
#[derive(Debug, Clone)]
pub struct Http {
    /// The address to listen on.
    pub listen: SocketAddr,
    /// The socket for clients on this machine.
    pub socket: LocalSocket,
    /// A larger body is refused with 413.
    pub body_bytes_max: usize,
    /// The longest time for a body to arrive.
    pub body_timeout: Duration,
    /// The longest time for a request's head to arrive; also for an idle connection.
    pub header_timeout: Duration,
    /// The longest time for a client to read a response.
    pub write_timeout: Duration,
    /// More connections wait unaccepted.
    pub connections_max: NonZeroUsize,
    /// More connections of one address are closed at once. Never more than `connections_max`.
    pub client_connections_max: NonZeroUsize,
    /// `None`: no limit.
    pub client_requests_per_second: Option<NonZeroU32>,
    /// The maximum number of bytes of all bodies that one client is sending.
    pub client_body_bytes_max: usize,
    /// The maximum number of bytes of bodies in progress of all clients.
    pub bodies_bytes_max: usize,
    /// The URL of this API for people, for links in messages.
    pub public_url: Option<String>,
    /// The clients; none: every client on this machine.
    pub tokens: Vec<Token>,
}

impl Http {
    /// Lowers the limit of connections to `capacity`. One address keeps its share of them, or its
    /// own limit if that is at most half of them.
    pub fn lower_connections_max(&mut self, capacity: NonZeroUsize) {
        let share = capacity.get() * self.client_connections_max.get() / self.connections_max.get();
        let of_one = self
            .client_connections_max
            .get()
            .min(share.max(capacity.get() / 2));
        self.connections_max = capacity;
        self.client_connections_max = NonZeroUsize::new(of_one).unwrap_or(NonZeroUsize::MIN);
    }
}

/// `http.socket`: the Unix socket whose clients have admin access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalSocket {
    /// `<database>.sock`.
    NextToDatabase,
    /// None.
    Off,
    /// This path.
    At(PathBuf),
}

/// The name of the clients of the local socket.
pub const LOCAL_CLIENT: &str = "local";

/// `[[http.token]]`: a client.
#[derive(Debug, Clone)]
pub struct Token {
    /// The client's name, for people and for its idempotency keys.
    pub name: String,
    /// Its access.
    pub access: Access,
    /// The hash of the token; the token itself is not stored.
    pub hash: TokenHash,
}

/// The allowed limits of body bytes in memory.
const BODIES: RangeInclusive<i64> = 1024..=68_719_476_736;

pub(super) fn read_http_section(keys: &mut TypedKeys<'_>) -> Http {
    let connections_max = keys.count("http.connections_max", 4096, 1..=100_000);
    let half = i64::try_from(connections_max.get() / 2)
        .unwrap_or(i64::MAX)
        .max(1);
    let http = Http {
        listen: read_listen_key(keys),
        socket: read_socket_key(keys),
        body_bytes_max: keys.integer("http.body_bytes_max", 262_144, 1024..=67_108_864),
        body_timeout: keys.duration("http.body_timeout", "10s", MS..=FOREVER),
        header_timeout: keys.duration("http.header_timeout", "30s", MS..=FOREVER),
        write_timeout: keys.duration("http.write_timeout", "30s", MS..=FOREVER),
        connections_max,
        client_connections_max: keys.count("http.client_connections_max", half, 1..=100_000),
        client_requests_per_second: NonZeroU32::new(keys.integer(
            "http.client_requests_per_second",
            0,
            0..=1_000_000,
        )),
        client_body_bytes_max: keys.integer("http.client_body_bytes_max", 33_554_432, BODIES),
        bodies_bytes_max: keys.integer("http.bodies_bytes_max", 67_108_864, BODIES),
        public_url: keys.optional_text(
            "http.public_url",
            "empty, or an http:// or https:// URL without '<', '>' and '|'",
            |text| TypedKeys::is_url(text) && !text.contains(['<', '>', '|']),
        ),
        tokens: (0..keys.tables("http.token"))
            .filter_map(|index| read_http_token(keys, index))
            .collect(),
    };
    for (key, limit) in [
        ("client_body_bytes_max", http.client_body_bytes_max),
        ("bodies_bytes_max", http.bodies_bytes_max),
    ] {
        if limit < http.body_bytes_max {
            keys.add_problem(format!(
                "http.{key} is smaller than http.body_bytes_max: a body of that size would \
                    never be accepted"
            ));
        }
    }
    if http.client_connections_max > http.connections_max {
        keys.add_problem(
            "http.client_connections_max is larger than http.connections_max: set it to as \
                many where one address, such as a proxy's, may have them all"
                .to_owned(),
        );
    }
    if keys.tables("http.token") == 0 && !is_loopback(http.listen) {
        keys.add_problem(format!(
            "http.listen = \"{}\": any client that reaches this address could pay and administer: \
                set an [[http.token]] (`payrelay token` makes one), or listen on 127.0.0.1",
            http.listen
        ));
    }
    http
}

pub(super) fn read_listen_key(keys: &mut TypedKeys<'_>) -> SocketAddr {
    keys.socket_address("http.listen", "127.0.0.1:8080")
}

pub(super) fn read_socket_key(keys: &mut TypedKeys<'_>) -> LocalSocket {
    let allowed = "\"off\", the path of a socket, or empty for DATABASE.sock";
    let text = keys.text("http.socket", "", allowed, |text| !text.contains('\0'));
    match text.as_str() {
        "" => LocalSocket::NextToDatabase,
        "off" => LocalSocket::Off,
        path => LocalSocket::At(path.into()),
    }
}

fn read_http_token(keys: &mut TypedKeys<'_>, index: usize) -> Option<Token> {
    let key = |name: &str| format!("http.token[{index}].{name}");
    let name = keys.text(
        &key("name"),
        "",
        "1 to 32 letters, digits, '.', '_' and '-'",
        |text| {
            text.len() <= 32
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        },
    );
    let access = keys.choice(&key("access"), &Access::BY_NAME);
    let hash = keys.secret(&key("hash"), TokenHash::EXPECTED, |text| {
        TokenHash::parse(text).is_some()
    });
    let needed = [
        ("name", "it names the client in the log and in the limits"),
        ("access", "it says what the token allows"),
        (
            "hash",
            "it identifies the token; `payrelay token` prints one",
        ),
    ];
    for (name, why) in needed {
        if !keys.is_set(&key(name)) {
            keys.add_problem(format!("{} is missing: {why}", key(name)));
        }
    }
    if name == LOCAL_CLIENT {
        keys.add_problem(format!(
            "{} = {name:?}: clients of the local socket have this name; choose another one",
            key("name")
        ));
    }
    if !name.is_empty() {
        keys.require_unique_name(&key("name"), &name);
    }
    let hash = hash.and_then(|hash| TokenHash::parse(hash.expose()))?;
    keys.require_unique_secret(&key("hash"), &hash.expose());
    Some(Token { name, access, hash })
}
