//! The exit codes. From 64 on they are those of sysexits.h.

/// Done, or stopped by a signal.
pub(super) const OK: u8 = 0;
/// `dead-letters`: some could not be replayed or do not exist. `audit`: findings. `channels`:
/// nothing was done. `restore`: the copy is damaged.
pub(super) const PARTIAL: u8 = 1;
/// Wrong arguments (`EX_USAGE`).
pub(super) const USAGE: u8 = 64;
/// A thread died (`EX_SOFTWARE`).
pub(super) const THREAD_DIED: u8 = 70;
/// The stop needed more time than it has (`EX_OSERR`).
pub(super) const STOP_TIMEOUT: u8 = 71;
/// The output could not be written (`EX_IOERR`).
pub(super) const OUTPUT_FAILED: u8 = 74;
/// It may pass: the port or the database is in use, or did not answer (`EX_TEMPFAIL`).
pub(super) const TEMPORARY: u8 = 75;
/// The operating system does not allow it (`EX_NOPERM`).
pub(super) const NOT_ALLOWED: u8 = 77;
/// The configuration cannot be used (`EX_CONFIG`).
pub(super) const CONFIG: u8 = 78;
