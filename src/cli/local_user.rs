//! The local user who runs a command, for the record of an action.

use std::env;

use payrelay::runtime::local_user::local_user_name;

/// The origin of an action: `local user NAME`. With sudo, the user who called it. Other variables,
/// such as `USER`, say what their user likes.
pub(super) fn local_user_origin() -> String {
    let uid = rustix::process::getuid();
    let caller = env::var("SUDO_USER").ok().filter(|_| uid.is_root());
    let name = caller.unwrap_or_else(|| local_user_name(uid.as_raw()));
    format!("local user {name}")
}
