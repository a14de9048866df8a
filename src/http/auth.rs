//! Authentication: a client with a bearer token (RFC 6750); without any configured token, a client
//! on this machine that is no web page.
//!
//! A token is 256 random bits, so its plain SHA-256 can be stored: it cannot be guessed, and needs
//! no slow hash. The token of a request is hashed and compared with every configured hash, in
//! constant time.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::Method;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN};
use hyper::http::request::Parts;
use subtle::ConditionallySelectable as _;

use super::host::{host_of_authority, host_of_url, is_local_host};
use super::limits::ClientUsage;
use super::peer::{LocalPeer, LocalUser};
use super::problem::Problem;
use crate::config;
use crate::domain::access::Access;
use crate::domain::token::TokenHash;

/// An authenticated client.
#[derive(Debug, Clone)]
pub(super) struct AuthenticatedClient {
    /// The name of the token; empty without tokens.
    pub(super) name: Arc<str>,
    pub(super) access: Access,
    /// Its usage of the shared capacity.
    pub(super) usage: Arc<ClientUsage>,
    /// The user, if it came through the local socket.
    local_user: Option<LocalUser>,
}

impl AuthenticatedClient {
    /// A process that can open the local socket: its mode has decided.
    pub(super) fn local(peer: &LocalPeer) -> Self {
        Self {
            name: config::LOCAL_CLIENT.into(),
            access: Access::Admin,
            usage: Arc::clone(&peer.usage),
            local_user: Some(peer.user),
        }
    }

    /// Refuses a request that needs more access than the client has.
    pub(super) fn require(&self, needed: Access) -> Result<(), Problem> {
        if self.access >= needed {
            return Ok(());
        }
        let detail = format!(
            "this needs a token whose access is {}; the request's is {}",
            needed.name(),
            self.access.name()
        );
        Err(Problem::insufficient_access(detail))
    }

    /// The origin of an action, for its record: with tokens `http, token NAME`, through the local
    /// socket `local user NAME`.
    pub(super) fn origin(&self) -> String {
        if let Some(user) = self.local_user {
            user.origin()
        } else if self.name.is_empty() {
            "http".to_owned()
        } else {
            format!("http, token {}", self.name)
        }
    }
}

#[derive(Debug)]
struct AuthenticatorToken {
    hash: TokenHash,
    client: AuthenticatedClient,
}

/// The tokens in effect.
#[derive(Debug, Default)]
struct AuthenticatorTokens(Vec<AuthenticatorToken>);

impl AuthenticatorTokens {
    /// Compares with every token, found or not: the duration reveals nothing.
    fn find(&self, token: &str) -> Option<&AuthenticatedClient> {
        let hash = TokenHash::of_token(token);
        let mut found = u64::MAX;
        for (index, token) in (0..).zip(&self.0) {
            found.conditional_assign(&index, token.hash.ct_eq(&hash));
        }
        self.0
            .get(usize::try_from(found).ok()?)
            .map(|token| &token.client)
    }

    fn named(&self, name: &str) -> Option<&AuthenticatorToken> {
        self.0.iter().find(|token| &*token.client.name == name)
    }
}

/// The names of the changed tokens.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TokenDiff {
    /// A new token.
    pub added: Vec<String>,
    /// A removed token.
    pub removed: Vec<String>,
    /// The names of tokens that were configured before, with another hash or another access.
    pub changed: Vec<String>,
}

impl fmt::Display for TokenDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("added", &self.added),
            ("removed", &self.removed),
            ("changed", &self.changed),
        ];
        let changes: Vec<_> = parts
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(verb, names)| format!("{verb} {}", names.join(", ")))
            .collect();
        f.write_str(if changes.is_empty() {
            "none changed"
        } else {
            ""
        })?;
        f.write_str(&changes.join("; "))
    }
}

/// The new tokens cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "http.token: there is none any more, and without tokens every client is let in: set one, or \
        restart payrelay if that is meant"
)]
pub struct LastTokenRemoved;

/// Authenticates requests. The HTTP thread shares it with the thread that reloads the
/// configuration.
#[derive(Debug)]
pub struct Authenticator {
    /// The host of `http.public_url`, which requests may name as well.
    public_host: Option<String>,
    /// The usage of all clients, where there are no tokens.
    anonymous: Arc<str>,
    tokens: Mutex<Arc<AuthenticatorTokens>>,
}

impl Authenticator {
    /// With the configured tokens.
    pub fn new(settings: &config::Http) -> Self {
        let authenticator = Self {
            public_host: settings
                .public_url
                .as_deref()
                .map(|url| host_of_url(url).to_owned()),
            anonymous: Arc::default(),
            tokens: Mutex::default(),
        };
        authenticator.set_tokens(&settings.tokens);
        authenticator
    }

    /// Replaces the tokens, from the next request on. A configuration without its tokens opens
    /// nothing, wherever payrelay listens: there may be a proxy in front of it.
    pub fn replace(&self, tokens: &[config::Token]) -> Result<TokenDiff, LastTokenRemoved> {
        if tokens.is_empty() && !self.tokens().0.is_empty() {
            return Err(LastTokenRemoved);
        }
        Ok(self.set_tokens(tokens))
    }

    fn set_tokens(&self, tokens: &[config::Token]) -> TokenDiff {
        let old = self.tokens();
        let mut change = TokenDiff::default();
        let new = tokens.iter().map(|token| {
            let known = old.named(&token.name);
            match known {
                None => change.added.push(token.name.clone()),
                Some(known) if known.hash != token.hash || known.client.access != token.access => {
                    change.changed.push(token.name.clone());
                }
                Some(_) => {}
            }
            // A client's usage stays, whatever its token is now.
            let usage = known.map_or_else(Arc::default, |known| Arc::clone(&known.client.usage));
            let client = AuthenticatedClient {
                name: token.name.as_str().into(),
                access: token.access,
                usage,
                local_user: None,
            };
            AuthenticatorToken {
                hash: token.hash,
                client,
            }
        });
        let new = AuthenticatorTokens(new.collect());
        let gone = old
            .0
            .iter()
            .map(|token| &*token.client.name)
            .filter(|name| new.named(name).is_none());
        change.removed = gone.map(str::to_owned).collect();
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        change
    }

    fn tokens(&self) -> Arc<AuthenticatorTokens> {
        // The value is replaced as a whole: a panic elsewhere leaves no half of one.
        Arc::clone(&self.tokens.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Authenticates a request: without tokens as anonymous, with tokens by its token.
    pub(super) fn authenticate(
        &self,
        head: &Parts,
        peer: &Arc<ClientUsage>,
    ) -> Result<Option<AuthenticatedClient>, Problem> {
        let tokens = self.tokens();
        if tokens.0.is_empty() {
            Self::reject_forwarded(&head.headers)?;
            self.reject_browsers(head)?;
            return Ok(Some(AuthenticatedClient {
                name: Arc::clone(&self.anonymous),
                access: Access::Admin,
                usage: Arc::clone(peer),
                local_user: None,
            }));
        }
        let Some(token) = Self::bearer_token(&head.headers)? else {
            return Ok(None);
        };
        tokens
            .find(token)
            .cloned()
            .map(Some)
            .ok_or_else(|| Problem::wrong_token("this token is not known"))
    }

    /// Without tokens, every program on this machine is accepted, and a browser runs the scripts of
    /// any web page. The `Host` gives away a page whose name resolves to this machine (DNS
    /// rebinding). The `Origin` gives away a form or a script: browsers add it to every POST
    /// (<https://fetch.spec.whatwg.org/#origin-header>). Only payrelay's own page may send one.
    /// With tokens neither matters: a browser has no token to add.
    fn reject_browsers(&self, head: &Parts) -> Result<(), Problem> {
        if !self.is_allowed_host(head) {
            return Err(Problem::misdirected(
                "without tokens, the Host must be an IP address, localhost or the host of \
                    http.public_url",
            ));
        }
        let is_page = head.headers.contains_key(ORIGIN);
        if head.method == Method::POST && is_page && !is_own_page(&head.headers) {
            return Err(Problem::forbidden(
                "without tokens, requests of other web pages are refused: the request names an \
                    Origin",
            ));
        }
        Ok(())
    }

    /// Without tokens, every client that reaches this address may do everything. A request through
    /// a proxy is from another machine.
    fn reject_forwarded(headers: &HeaderMap) -> Result<(), Problem> {
        let forwarded = |name: &str| FORWARDED.contains(&name) || name.starts_with("x-forwarded-");
        match headers.keys().find(|name| forwarded(name.as_str())) {
            None => Ok(()),
            Some(name) => Err(Problem::forbidden(format!(
                "the request came through a proxy (it has the header {name}), and no token is \
                    configured: configure tokens ([[http.token]], `payrelay token`)"
            ))),
        }
    }

    /// The token of a request.
    fn bearer_token(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let Some(value) = values.next() else {
            return Ok(None);
        };
        let token = value
            .to_str()
            .ok()
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer"))
            .map(|(_, token)| token.trim_matches(' '))
            .filter(|token| !token.is_empty() && values.next().is_none());
        token.map(Some).ok_or_else(|| {
            Problem::wrong_token("the Authorization must be one: Bearer and a token")
        })
    }

    /// A request without a `Host` is from no browser.
    fn is_allowed_host(&self, head: &Parts) -> bool {
        let ours = |authority: &str| {
            is_local_host(host_of_authority(authority), self.public_host.as_deref())
        };
        let named = head
            .headers
            .get_all(HOST)
            .iter()
            .all(|value| value.to_str().is_ok_and(ours));
        named
            && head
                .uri
                .authority()
                .is_none_or(|authority| ours(authority.as_str()))
    }
}

/// Whether a script of payrelay's own page sent the request. The browser says so, and no page can
/// change that (<https://www.w3.org/TR/fetch-metadata/#sec-fetch-site-header>). The `Origin` must
/// also be the `Host`, which the rule against DNS rebinding has checked.
fn is_own_page(headers: &HeaderMap) -> bool {
    let only = |name: &str| {
        let mut values = headers.get_all(name).iter();
        let value = values.next()?.to_str().ok()?;
        values.next().is_none().then_some(value)
    };
    let authority = only("origin").and_then(|origin| {
        let http = origin.strip_prefix("http://");
        http.or_else(|| origin.strip_prefix("https://"))
    });
    only("sec-fetch-site") == Some("same-origin")
        && authority
            .zip(only("host"))
            .is_some_and(|(authority, host)| authority.eq_ignore_ascii_case(host))
}

/// The headers that proxies add to requests (RFC 7239, RFC 9110 7.6.3, and the older names).
const FORWARDED: [&str; 3] = ["forwarded", "via", "x-real-ip"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::loopback::is_loopback;
    use hyper::Request;
    use proptest::prelude::*;

    fn auth_settings(tokens: &[(&str, Access, &str)]) -> config::Http {
        let mut http = config::Config::load("", &std::collections::BTreeMap::new())
            .unwrap()
            .config
            .http;
        http.tokens = auth_tokens(tokens);
        http
    }

    fn auth_tokens(tokens: &[(&str, Access, &str)]) -> Vec<config::Token> {
        let token = |(name, access, token): &(&str, Access, &str)| config::Token {
            name: (*name).to_owned(),
            access: *access,
            hash: TokenHash::of_token(token),
        };
        tokens.iter().map(token).collect()
    }

    fn auth_request_head(method: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri("/payments");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn authenticate_post(
        authenticator: &Authenticator,
        headers: &[(&str, &str)],
    ) -> Result<Option<String>, Problem> {
        let client =
            authenticator.authenticate(&auth_request_head("POST", headers), &Arc::default());
        client.map(|client| client.map(|client| client.name.to_string()))
    }

    #[test]
    fn a_client_is_authenticated_by_the_hash_of_its_token() {
        let authenticator = Authenticator::new(&auth_settings(&[
            ("till", Access::Full, "abc"),
            ("boss", Access::Admin, "xyz"),
        ]));
        assert_eq!(
            authenticate_post(&authenticator, &[("authorization", "Bearer abc")]),
            Ok(Some("till".into()))
        );
        assert_eq!(
            authenticate_post(&authenticator, &[("authorization", "bearer  xyz")]),
            Ok(Some("boss".into()))
        );
        assert_eq!(
            authenticate_post(
                &authenticator,
                &[("host", "evil.example"), ("origin", "https://evil.example")]
            ),
            Ok(None)
        );
        let twice = [
            ("authorization", "Bearer abc"),
            ("authorization", "Bearer abc"),
        ];
        assert!(authenticate_post(&authenticator, &twice).is_err());
        for wrong in [
            "Bearer ABC",
            "Bearer abc def",
            "Basic abc",
            "Bearer",
            "Bearer ",
            "abc",
            "",
            "Bearer \u{fc}",
        ] {
            assert!(
                authenticate_post(&authenticator, &[("authorization", wrong)]).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_client_with_more_access_may_do_all_that_less_access_allows() {
        let client = |access| AuthenticatedClient {
            name: "a".into(),
            access,
            usage: Arc::default(),
            local_user: None,
        };
        for (access, reads, pays, orders) in [
            (Access::ReadOnly, true, false, false),
            (Access::Full, true, true, false),
            (Access::Admin, true, true, true),
        ] {
            let allowed = [Access::ReadOnly, Access::Full, Access::Admin]
                .map(|n| client(access).require(n).is_ok());
            assert_eq!(allowed, [reads, pays, orders], "{access:?}");
        }
        assert_eq!(
            Access::BY_NAME.map(|(_, access)| access.name()),
            Access::BY_NAME.map(|(name, _)| name)
        );
    }

    #[test]
    fn replaced_tokens_take_effect_and_keep_their_clients_usage() {
        let authenticator = Authenticator::new(&auth_settings(&[
            ("a", Access::Full, "1"),
            ("b", Access::Full, "2"),
        ]));
        let usage = |authenticator: &Authenticator, name: &str| {
            Arc::clone(&authenticator.tokens().named(name).unwrap().client.usage)
        };
        let before = usage(&authenticator, "b");
        let tokens = [("b", Access::Full, "3"), ("c", Access::ReadOnly, "4")];
        let change = authenticator.replace(&auth_tokens(&tokens)).unwrap();
        assert_eq!(change.to_string(), "added c; removed a; changed b");
        assert!(Arc::ptr_eq(&before, &usage(&authenticator, "b")));
        assert!(authenticate_post(&authenticator, &[("authorization", "Bearer 1")]).is_err());
        assert_eq!(
            authenticate_post(&authenticator, &[("authorization", "Bearer 3")]),
            Ok(Some("b".into()))
        );
        assert_eq!(
            authenticator
                .replace(&auth_tokens(&tokens))
                .unwrap()
                .to_string(),
            "none changed"
        );
    }

    #[test]
    fn a_reload_never_removes_the_last_token() {
        let authenticator = Authenticator::new(&auth_settings(&[]));
        assert_eq!(
            authenticator.replace(&[]).unwrap().to_string(),
            "none changed"
        );
        authenticator
            .replace(&auth_tokens(&[("a", Access::Full, "1")]))
            .unwrap();
        assert!(authenticator.replace(&[]).is_err());
        assert_eq!(authenticate_post(&authenticator, &[]), Ok(None));
        assert!(authenticate_post(&authenticator, &[("authorization", "Bearer 1")]).is_ok());
    }

    #[test]
    fn without_tokens_a_request_must_name_this_machine_as_its_host() {
        let mut http = auth_settings(&[]);
        http.public_url = Some("https://x@pay.local:8080/path".into());
        let authenticator = Authenticator::new(&http);
        let ours = "127.0.0.1 127.0.0.1:8080 192.0.2.7:1 [::1]:8080 [::1] localhost LocalHost:1 \
            localhost.:1 till.localhost:1 pay.local:8080 PAY.LOCAL.";
        for host in ours.split(' ') {
            assert_eq!(
                authenticate_post(&authenticator, &[("host", host)]),
                Ok(Some(String::new())),
                "{host}"
            );
        }
        let others = "evil.example 127.0.0.1.evil.example localhost.evil.example notlocalhost \
            pay.local.evil.example xpay.local [::1].evil.example [evil] [::1 :80 \
            127.0.0.1@evil.example 0x7f000001 \u{fc}";
        for host in others.split(' ').chain([""]) {
            assert!(
                authenticate_post(&authenticator, &[("host", host)]).is_err(),
                "{host}"
            );
        }
        assert!(
            authenticate_post(
                &authenticator,
                &[("host", "127.0.0.1"), ("host", "evil.example")]
            )
            .is_err()
        );
        assert!(
            authenticate_post(
                &authenticator,
                &[("host", "127.0.0.1"), ("origin", "http://127.0.0.1")]
            )
            .is_err()
        );
        assert_eq!(
            authenticate_post(&authenticator, &[]),
            Ok(Some(String::new()))
        );
        let absolute = Request::get("http://evil.example/payments")
            .header("host", "localhost")
            .body(())
            .unwrap();
        assert!(
            authenticator
                .authenticate(&absolute.into_parts().0, &Arc::default())
                .is_err()
        );
    }

    #[test]
    fn without_tokens_only_the_own_page_may_post() {
        let authenticator = Authenticator::new(&auth_settings(&[]));
        let post = |host: &str, origin: &str, site: &str| {
            let named = [("host", host), ("origin", origin), ("sec-fetch-site", site)];
            let headers: Vec<_> = named
                .into_iter()
                .filter(|(_, value)| !value.is_empty())
                .collect();
            authenticate_post(&authenticator, &headers).is_ok()
        };
        let ours = "http://127.0.0.1:8080";
        assert!(post("127.0.0.1:8080", ours, "same-origin"));
        assert!(post("LOCALHOST", "https://localhost", "same-origin"));
        for (host, origin, site) in [
            ("127.0.0.1:8080", ours, "cross-site"),
            ("127.0.0.1:8080", ours, "same-site"),
            ("127.0.0.1:8080", ours, "none"),
            ("127.0.0.1:8080", ours, ""),
            ("127.0.0.1:8080", "null", "same-origin"),
            ("127.0.0.1:8080", "http://127.0.0.1:8081", "same-origin"),
            ("127.0.0.1:8080", "http://127.0.0.1", "same-origin"),
            ("127.0.0.1:8080", "ftp://127.0.0.1:8080", "same-origin"),
            ("", ours, "same-origin"),
            ("evil.example", "http://evil.example", "same-origin"),
        ] {
            assert!(!post(host, origin, site), "{host} {origin} {site}");
        }
        let twice = [
            ("host", "127.0.0.1:8080"),
            ("origin", ours),
            ("origin", "http://evil.example"),
            ("sec-fetch-site", "same-origin"),
        ];
        assert!(authenticate_post(&authenticator, &twice).is_err());
    }

    #[test]
    fn the_authenticator_knows_loopback_by_its_address() {
        let loopback = |text: &str| is_loopback(text.parse().unwrap());
        assert!(loopback("127.0.0.1:1") && loopback("127.9.9.9:1") && loopback("[::1]:1"));
        assert!(loopback("[::ffff:127.0.0.1]:1"));
        assert!(!loopback("0.0.0.0:1") && !loopback("[::]:1") && !loopback("192.0.2.1:1"));
    }

    proptest! {
        #[test]
        fn no_request_makes_the_authenticator_panic(host in "\\PC*", authorization in "\\PC*") {
            let open = auth_settings(&[]);
            let closed = auth_settings(&[("a", Access::Full, "1")]);
            let cases = [(open, "host", &host), (closed, "authorization", &authorization)];
            for (http, name, value) in cases {
                let mut parts = auth_request_head("GET", &[]);
                if let Ok(value) = hyper::header::HeaderValue::from_bytes(value.as_bytes()) {
                    parts.headers.insert(name, value);
                }
                let _ = Authenticator::new(&http).authenticate(&parts, &Arc::default());
            }
        }
    }
}
