//! Slack: the one place that names ureq.
//!
//! [`notifier`] is the loop of one [`channel`], [`message`] the text, [`webhook`] one POST.
//! [`isolation`] decides what a rejection means, and [`rate_limit`] when to post.

pub mod channel;
mod delivery_log;
mod delivery_queue;
pub mod isolation;
pub mod message;
pub mod notifier;
pub mod rate_limit;
mod resolver;
pub mod webhook;
