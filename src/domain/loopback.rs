//! Addresses that only this machine reaches.

use std::net::SocketAddr;

/// Whether only this machine reaches an address.
pub fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}
