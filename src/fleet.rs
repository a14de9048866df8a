//! `payrelay fleet`: the edges of a topic, as they report themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::config::{self, Config};
use crate::domain::node_id::NodeId;
use crate::domain::node_status::{NodeStatus, status_topic};
use crate::domain::text_enum::text_enum;
use crate::domain::timestamp::Timestamp;
use crate::kafka::latest_records::{LatestRecord, read_latest_records};

text_enum! {
    /// What is remarkable about a node, the worst first.
    #[derive(PartialOrd, Ord)]
    pub enum NodeState {
        /// It was silent for longer than `fleet.late_after`.
        Late = "late",
        /// Its disk is full: it refuses payments.
        Full = "full",
        /// It has rejected events that wait for an operator.
        Rejected = "rejected",
        /// Its clock is further off than `fleet.clock_skew_max`.
        Clock = "clock",
        /// Events wait for longer than `fleet.late_after`.
        Behind = "behind",
        /// Its record is no report that this version can read.
        Unknown = "unknown",
        /// Nothing.
        Ok = "ok",
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FleetNode {
    /// Its id.
    pub node: String,
    /// What is remarkable.
    pub state: NodeState,
    /// When the broker has stored its last report.
    pub seen_at: Timestamp,
    /// By how many milliseconds its clock is ahead of the broker's; less than 0: behind.
    pub clock_skew_ms: Option<i64>,
    /// Its last report.
    pub status: Option<NodeStatus>,
}

/// Reads the last report of each node, the worst first. The error says what to do.
pub fn read_fleet(config: &Config, now: Timestamp) -> Result<Vec<FleetNode>, String> {
    let topic = status_topic(&config.kafka.topic);
    let records = read_latest_records(&config.kafka, &topic)?;
    let records = records.ok_or_else(|| {
        format!("there is no topic {topic}: `payrelay fleet init` creates it, and edges fill it")
    })?;
    Ok(describe_fleet(records, &config.fleet, now))
}

fn describe_fleet(
    records: BTreeMap<String, LatestRecord>,
    limits: &config::Fleet,
    now: Timestamp,
) -> Vec<FleetNode> {
    let mut nodes: Vec<FleetNode> = records
        .into_iter()
        // Another program may have written to the topic.
        .filter(|(node, _)| NodeId::parse(node).is_some())
        .map(|(node, record)| describe_node(node, &record, limits, now))
        .collect();
    nodes.sort_by(|one, other| (one.state, &one.node).cmp(&(other.state, &other.node)));
    nodes
}

fn describe_node(
    node: String,
    record: &LatestRecord,
    limits: &config::Fleet,
    now: Timestamp,
) -> FleetNode {
    let status: Option<NodeStatus> = serde_json::from_slice(&record.value).ok();
    let seen_at = record.appended_at;
    let clock_skew_ms = status
        .as_ref()
        .map(|status| status.at.as_micros().saturating_sub(seen_at.as_micros()) / 1000);
    let state = match &status {
        None => NodeState::Unknown,
        Some(_) if now.since(seen_at) > limits.late_after => NodeState::Late,
        Some(status) if status.is_full => NodeState::Full,
        Some(status) if status.rejected > 0 => NodeState::Rejected,
        Some(_) if is_off(clock_skew_ms, limits.clock_skew_max) => NodeState::Clock,
        Some(status) if waits_long(status, limits.late_after) => NodeState::Behind,
        Some(_) => NodeState::Ok,
    };
    FleetNode {
        node,
        state,
        seen_at,
        clock_skew_ms,
        status,
    }
}

fn is_off(skew_ms: Option<i64>, limit: Duration) -> bool {
    let skew = skew_ms.unwrap_or(0).unsigned_abs();
    Duration::from_millis(skew) > limit
}

/// By the node's own clock: it may be wrong.
fn waits_long(status: &NodeStatus, limit: Duration) -> bool {
    let oldest = status.pending.oldest_at;
    status.pending.count > 0 && oldest.is_some_and(|oldest| status.at.since(oldest) > limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::node_status::{ReportedEvents, ReportedPending};

    const SECOND: i64 = 1_000_000;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(1_795_000_000 * SECOND + seconds * SECOND)
    }

    fn report() -> NodeStatus {
        NodeStatus {
            v: 1,
            version: "0.2.0".into(),
            role: "edge".into(),
            at: at(0),
            started_at: at(-100),
            events: ReportedEvents {
                stored: 7,
                published: 7,
            },
            pending: ReportedPending {
                count: 0,
                oldest_at: None,
            },
            rejected: 0,
            last_payment: 7,
            disk_free: Some(1 << 30),
            is_full: false,
            database_bytes: 4096,
        }
    }

    fn states(reports: &[(&str, Option<NodeStatus>)], now: i64) -> Vec<(String, NodeState)> {
        let limits = config::Fleet {
            status_interval: Duration::from_mins(1),
            late_after: Duration::from_mins(5),
            clock_skew_max: Duration::from_mins(1),
        };
        let record = |report: &Option<NodeStatus>| LatestRecord {
            appended_at: at(0),
            value: match report {
                Some(report) => serde_json::to_vec(report).unwrap(),
                None => b"no report".to_vec(),
            },
        };
        let records = reports
            .iter()
            .map(|(node, it)| ((*node).into(), record(it)));
        describe_fleet(records.collect(), &limits, at(now))
            .into_iter()
            .map(|node| (node.node, node.state))
            .collect()
    }

    #[test]
    fn each_state_of_a_fleets_node_follows_from_its_report_and_the_worst_comes_first() {
        let waiting = |count, oldest| ReportedPending {
            count,
            oldest_at: Some(at(oldest)),
        };
        let reports = [
            ("a", Some(report())),
            (
                "b",
                Some(NodeStatus {
                    pending: waiting(3, -301),
                    ..report()
                }),
            ),
            (
                "c",
                Some(NodeStatus {
                    at: at(61),
                    ..report()
                }),
            ),
            (
                "d",
                Some(NodeStatus {
                    at: at(-61),
                    ..report()
                }),
            ),
            (
                "e",
                Some(NodeStatus {
                    rejected: 1,
                    ..report()
                }),
            ),
            (
                "f",
                Some(NodeStatus {
                    is_full: true,
                    ..report()
                }),
            ),
            (
                "g",
                Some(NodeStatus {
                    pending: waiting(3, -299),
                    ..report()
                }),
            ),
            ("h", None),
            ("no node", Some(report())),
        ];
        let expected = [
            ("f", NodeState::Full),
            ("e", NodeState::Rejected),
            ("c", NodeState::Clock),
            ("d", NodeState::Clock),
            ("b", NodeState::Behind),
            ("h", NodeState::Unknown),
            ("a", NodeState::Ok),
            ("g", NodeState::Ok),
        ];
        let expected = expected.map(|(node, state)| (node.to_owned(), state));
        assert_eq!(states(&reports, 10), expected);
        let late = states(&reports[..1], 301);
        assert_eq!(late, [("a".to_owned(), NodeState::Late)]);
        assert_eq!(states(&reports[..1], 300)[0].1, NodeState::Ok);
    }

    #[test]
    fn a_report_of_a_later_version_is_read() {
        let mut value = serde_json::to_value(report()).unwrap();
        value["added_later"] = true.into();
        let read: NodeStatus = serde_json::from_value(value).unwrap();
        assert_eq!(read, report());
    }
}
