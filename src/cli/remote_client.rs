//! A client of the HTTP API of a payrelay elsewhere: `--url`. The token comes from a variable or a
//! file, and no error shows it.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;
use std::{env, fmt, fs, io};

use serde_json::Value;
use ureq::http::Uri;

use super::api::{ApiResponse, NoResponse, is_api_response};
use super::exit_code;
use super::output::print_note;

/// A payrelay that needs longer does not answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A name or a connection that needs longer is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The largest page of the API is smaller.
const BODY_MAX: u64 = 64 << 20;

/// The variable that has the token.
const TOKEN_VARIABLE: &str = "PAYRELAY_TOKEN";

/// A client of one address.
#[derive(Clone)]
pub(super) struct RemoteClient {
    agent: ureq::Agent,
    /// Without a slash at its end.
    url: String,
    token: Option<String>,
}

impl fmt::Debug for RemoteClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteClient({})", self.url)
    }
}

impl RemoteClient {
    pub(super) fn new(url: &str, token_file: Option<&Path>) -> Result<Self, NoResponse> {
        let (url, host) = check_url(url)?;
        let token = read_token(token_file)?;
        let is_local = is_loopback(&host);
        if token.is_some() && url.starts_with("http://") && !is_local {
            print_note(&format!(
                "{url} is not https: hosts on the way can read the token"
            ));
        }
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .http_status_as_error(false)
            // A token is for this address, and for no other one.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("payrelay/", env!("CARGO_PKG_VERSION")));
        if is_local {
            // A proxy cannot reach this machine's own addresses.
            config = config.proxy(None);
        }
        Ok(Self {
            agent: config.build().into(),
            url,
            token,
        })
    }

    pub(super) fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<ApiResponse, NoResponse> {
        let text = body.map(Value::to_string).unwrap_or_default();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url));
        if body.is_some() {
            request = request.header("Content-Type", "application/json");
        }
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let request = request.body(text).map_err(|_| self.bad_path())?;
        let mut response = self
            .agent
            .run(request)
            .map_err(|error| NoResponse::temporary(self.describe(&error)))?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(BODY_MAX);
        let text = body
            .read_to_string()
            .map_err(|error| NoResponse::temporary(self.describe(&error)))?;
        let response = ApiResponse {
            status,
            body: serde_json::from_str(&text).unwrap_or_default(),
        };
        if is_api_response(&response, path) {
            Ok(response)
        } else {
            Err(self.not_payrelay(status))
        }
    }

    /// What to do about a response of 401.
    pub(super) fn explain_unauthorized(&self) -> String {
        let url = &self.url;
        if self.token.is_some() {
            format!("{url} does not know this token")
        } else {
            format!("{url} needs a token: set {TOKEN_VARIABLE}, or add --token-file FILE")
        }
    }

    fn not_payrelay(&self, status: u16) -> NoResponse {
        let hint = match status {
            300..=399 => ": it redirects to another address",
            502..=504 => ": a proxy answers for it",
            _ => "",
        };
        NoResponse {
            reason: format!("{} answered {status}, not as a payrelay{hint}", self.url),
            code: if status >= 500 {
                exit_code::TEMPORARY
            } else {
                exit_code::CONFIG
            },
        }
    }

    fn bad_path(&self) -> NoResponse {
        NoResponse {
            reason: format!("{}: this is no address of a resource", self.url),
            code: exit_code::USAGE,
        }
    }

    /// An error in plain words. ureq's own texts name no header.
    fn describe(&self, error: &ureq::Error) -> String {
        let url = &self.url;
        let seconds = TIMEOUT.as_secs();
        match error {
            ureq::Error::HostNotFound => format!("{url}: the name is not known"),
            ureq::Error::Timeout(ureq::Timeout::Resolve) => {
                format!("{url}: its name could not be resolved in time")
            }
            ureq::Error::Timeout(ureq::Timeout::Connect) => format!("{url}: no connection"),
            ureq::Error::Timeout(_) => format!("{url}: no response in {seconds} s"),
            ureq::Error::Io(error) => self.describe_io(error),
            ureq::Error::Protocol(_) => format!("{url}: the response is not HTTP"),
            error => format!("{url}: {error}"),
        }
    }

    /// An error of the connection. TLS has its errors inside.
    fn describe_io(&self, error: &io::Error) -> String {
        let is_tls = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
            .is_some();
        let url = &self.url;
        if is_tls {
            format!("{url}: TLS failed: {error}")
        } else {
            format!("{url}: {error}")
        }
    }
}

/// A URL without a slash at its end, and its host. It may have a path, where a proxy adds one.
fn check_url(text: &str) -> Result<(String, String), NoResponse> {
    let usage = |reason: &str| NoResponse {
        reason: format!("--url: {reason}"),
        code: exit_code::USAGE,
    };
    let example = "it is an address such as https://payrelay.example";
    let uri: Uri = text.parse().map_err(|_| usage(example))?;
    let host = uri.host().filter(|host| !host.is_empty());
    let is_http = matches!(uri.scheme_str(), Some("http" | "https"));
    let Some(host) = host.filter(|_| is_http && uri.query().is_none() && !text.contains('#'))
    else {
        return Err(usage(example));
    };
    if uri.authority().is_some_and(|it| it.as_str().contains('@')) {
        // A secret in the command line shows in the list of processes.
        return Err(usage(&format!(
            "it must not have a user or a password; set {TOKEN_VARIABLE}, or add --token-file FILE"
        )));
    }
    Ok((text.trim_end_matches('/').to_owned(), host.to_owned()))
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The token of the file, else that of the variable.
fn read_token(file: Option<&Path>) -> Result<Option<String>, NoResponse> {
    let (origin, text) = match file {
        Some(path) => {
            let origin = format!("--token-file {}", path.display());
            let text = fs::read_to_string(path).map_err(|error| NoResponse {
                reason: format!("{origin}: {error}"),
                code: exit_code::CONFIG,
            })?;
            (origin, text)
        }
        None => match env::var(TOKEN_VARIABLE) {
            Ok(text) => (TOKEN_VARIABLE.to_owned(), text),
            Err(_) => return Ok(None),
        },
    };
    let token = text.trim();
    if token.is_empty() && file.is_none() {
        return Ok(None);
    }
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(NoResponse {
            reason: format!("{origin}: it has no token: one line, as payrelay token prints it"),
            code: exit_code::CONFIG,
        });
    }
    Ok(Some(token.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_host_and_no_secret() {
        let check = |text| check_url(text).map(|(url, _)| url);
        assert_eq!(check("https://a.example/"), Ok("https://a.example".into()));
        assert_eq!(
            check("http://[::1]:80/pay/"),
            Ok("http://[::1]:80/pay".into())
        );
        for bad in ["a.example", "ftp://a", "http://", "http://a/?b", "/a", ""] {
            let error = check(bad).unwrap_err();
            assert_eq!(error.code, exit_code::USAGE, "{bad}");
        }
        let error = check("https://kim:s3cr3t@a.example").unwrap_err();
        assert!(!error.reason.contains("s3cr3t"), "{}", error.reason);
    }

    #[test]
    fn addresses_of_this_machine_need_no_proxy() {
        assert!(is_loopback("localhost") && is_loopback("[::1]") && is_loopback("127.0.0.2"));
        assert!(!is_loopback("192.0.2.1") && !is_loopback("a.example"));
    }
}
