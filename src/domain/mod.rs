//! Payments, events, topics, access and times. Pure: it imports no other folder, and no library of
//! an outside world.

pub mod access;
pub mod event;
pub mod loopback;
pub mod node_id;
pub mod node_role;
pub mod node_status;
pub mod payment;
pub mod payment_record;
pub mod reason;
pub mod template;
pub(crate) mod text_enum;
pub mod timestamp;
pub mod token;
pub mod topic;
pub mod trace_context;
