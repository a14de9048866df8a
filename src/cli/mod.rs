//! What the program needs besides the library: the logger, and one file for each command that is
//! not a few lines.

pub(crate) mod channels;
pub(crate) mod logger;
pub(crate) mod restore;

use std::env;

/// The local user, for the record of what was done.
fn user() -> String {
    let named = env::var("SUDO_USER")
        .or_else(|_| env::var("USER"))
        .or_else(|_| env::var("LOGNAME"));
    named.unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw()))
}
