//! The host that a request names: whether it is valid, and whether it is this machine.

use std::net::{Ipv4Addr, Ipv6Addr};

use hyper::Version;
use hyper::header::HOST;
use hyper::http::request::Parts;
use hyper::http::uri::Authority;

use super::problem::Problem;

/// HTTP/1.1 needs exactly one valid Host (RFC 9112, 3.2).
pub(super) fn check_host_header(head: &Parts) -> Result<(), Problem> {
    let mut hosts = head.headers.get_all(HOST).iter();
    let Some(host) = hosts.next() else {
        return match head.version {
            Version::HTTP_11 => Err(Problem::invalid_host("the request has no Host")),
            _ => Ok(()),
        };
    };
    if hosts.next().is_some() {
        return Err(Problem::invalid_host("the request has more than one Host"));
    }
    let valid = host.to_str().is_ok_and(|text| {
        let authority = text.parse::<Authority>();
        let port = text[host_of_authority(text).len()..]
            .strip_prefix(':')
            .unwrap_or_default();
        let named =
            authority.is_ok_and(|authority| !text.contains('@') && !authority.host().is_empty());
        text.is_empty() || (named && (port.is_empty() || port.parse::<u16>().is_ok()))
    });
    if valid {
        Ok(())
    } else {
        Err(Problem::invalid_host("the Host is no host and port"))
    }
}

/// Removes the port; an IPv6 address is in brackets.
pub(super) fn host_of_authority(authority: &str) -> &str {
    let port = authority
        .rfind(':')
        .filter(|colon| !authority[*colon..].contains(']'));
    port.map_or(authority, |colon| &authority[..colon])
}

pub(super) fn host_of_url(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    host_of_authority(authority.rsplit('@').next().unwrap_or(authority))
}

/// Whether a host is this machine, or the host of `http.public_url`. An IP address needs no DNS,
/// and names below `localhost` never leave the machine (RFC 6761).
pub(super) fn is_local_host(host: &str, public_host: Option<&str>) -> bool {
    if let Some(address) = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        return address.parse::<Ipv6Addr>().is_ok();
    }
    if host.parse::<Ipv4Addr>().is_ok() {
        return true;
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    let last = host.rsplit('.').next().unwrap_or(host);
    last.eq_ignore_ascii_case("localhost")
        || public_host.is_some_and(|public_host| host.eq_ignore_ascii_case(public_host))
}
