//! What the program needs besides the library: the logger, and one file for each command that is not a few lines.

pub(crate) mod logger;
pub(crate) mod restore;
