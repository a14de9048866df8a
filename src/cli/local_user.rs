//! The local user who runs a command, for the record of an action.

use std::env;

/// The origin of an action: `local user NAME`. With sudo, the user who called it.
pub(super) fn local_user_origin() -> String {
    let named = env::var("SUDO_USER")
        .or_else(|_| env::var("USER"))
        .or_else(|_| env::var("LOGNAME"));
    let name = named.unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw()));
    format!("local user {name}")
}
