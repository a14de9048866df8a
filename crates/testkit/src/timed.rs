//! Tests that measure time run one at a time.

use std::sync::{Mutex, MutexGuard};

/// Waits until no other test of this process measures time. The test holds the value until its end.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    crate::lock(&TURN)
}
