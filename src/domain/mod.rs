//! What payments, events and times are. Pure: names nothing of the outside world and no other module.

pub mod access;
pub mod event;
pub mod payment;
pub mod template;
pub mod timestamp;
pub mod topic;
