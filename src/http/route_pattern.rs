//! The patterns of the paths, as the metrics name them: a label never comes from a request.

use super::page::PageFile;
use crate::domain::text_enum::text_enum;
use crate::runtime::metrics::{HttpMetrics, RouteMetrics};

text_enum! {
    /// The pattern of a path.
    pub(super) enum RoutePattern {
        About = "/",
        Page = "/ui/",
        OpenApi = "/openapi.json",
        Payments = "/payments",
        Payment = "/payments/{id}",
        History = "/users/{id}/payment-history",
        Live = "/health/live",
        Ready = "/health/ready",
        Metrics = "/metrics",
        Overview = "/overview",
        OverviewHistory = "/overview/history",
        Channels = "/admin/channels",
        PauseChannel = "/admin/channels/{name}/pause",
        ResumeChannel = "/admin/channels/{name}/resume",
        SkipInChannel = "/admin/channels/{name}/skip",
        DeadLetters = "/admin/dead-letters",
        DeadLetter = "/admin/dead-letters/{id}",
        ReplayDeadLetter = "/admin/dead-letters/{id}/replay",
        DiscardDeadLetter = "/admin/dead-letters/{id}/discard",
        ReplayDeadLetters = "/admin/dead-letters/replay",
        DiscardDeadLetters = "/admin/dead-letters/discard",
        Outbox = "/admin/outbox",
        Topic = "/admin/topic",
        ResumeRelay = "/admin/relay/resume",
        WakeRelay = "/admin/relay/wake",
        None = "none",
    }
}

/// The methods and statuses whose series exist from the start.
type ExpectedSeries = (&'static [&'static str], &'static [u16]);

const READ: ExpectedSeries = (&["GET"], &[200, 401, 403, 422, 429, 503]);
const ACTION: ExpectedSeries = (&["POST"], &[200, 401, 403, 409, 422, 503]);
const PAYMENTS: ExpectedSeries = (
    &["POST"],
    &[
        201, 400, 401, 403, 408, 409, 413, 415, 421, 422, 429, 503, 507,
    ],
);
const NOTHING: ExpectedSeries = (
    &["GET", "HEAD", "POST", "OPTIONS", "other"],
    &[400, 401, 404, 405, 421, 429],
);

impl RoutePattern {
    /// The pattern of a path; [`RoutePattern::None`] if there is nothing at this path.
    pub(super) fn of_path(path: &str) -> Self {
        let mut segments = path.strip_prefix('/').unwrap_or("?").split('/');
        let first = segments.next().unwrap_or("");
        let second = segments.next();
        match (first, second) {
            ("", None) => Self::About,
            ("openapi.json", None) => Self::OpenApi,
            ("ui", None) => Self::Page,
            ("ui", Some(name)) if PageFile::find(name).is_some() && segments.next().is_none() => {
                Self::Page
            }
            ("metrics", None) => Self::Metrics,
            ("overview", None) => Self::Overview,
            ("overview", Some("history")) if segments.next().is_none() => Self::OverviewHistory,
            ("payments", None) => Self::Payments,
            ("payments", Some(_)) if segments.next().is_none() => Self::Payment,
            ("users", Some(_))
                if segments.next() == Some("payment-history") && segments.next().is_none() =>
            {
                Self::History
            }
            ("health", Some("live")) if segments.next().is_none() => Self::Live,
            ("health", Some("ready")) if segments.next().is_none() => Self::Ready,
            ("admin", Some(second)) => {
                let rest: Vec<&str> = segments.take(3).collect();
                Self::of_admin_path(second, &rest)
            }
            _ => Self::None,
        }
    }

    fn of_admin_path(second: &str, rest: &[&str]) -> Self {
        match (second, rest) {
            ("channels", []) => Self::Channels,
            ("channels", [_, "pause"]) => Self::PauseChannel,
            ("channels", [_, "resume"]) => Self::ResumeChannel,
            ("channels", [_, "skip"]) => Self::SkipInChannel,
            ("dead-letters", []) => Self::DeadLetters,
            ("dead-letters", ["replay"]) => Self::ReplayDeadLetters,
            ("dead-letters", ["discard"]) => Self::DiscardDeadLetters,
            ("dead-letters", [_]) => Self::DeadLetter,
            ("dead-letters", [_, "replay"]) => Self::ReplayDeadLetter,
            ("dead-letters", [_, "discard"]) => Self::DiscardDeadLetter,
            ("outbox", []) => Self::Outbox,
            ("topic", []) => Self::Topic,
            ("relay", ["resume"]) => Self::ResumeRelay,
            ("relay", ["wake"]) => Self::WakeRelay,
            _ => Self::None,
        }
    }

    /// The metrics of all patterns, in their order.
    pub(super) fn register(metrics: &HttpMetrics) -> Vec<RouteMetrics> {
        let add = |pattern: &Self| {
            let (methods, codes) = pattern.expected_series();
            metrics.add_route(pattern.as_str(), methods, codes)
        };
        Self::ALL.iter().map(add).collect()
    }

    fn expected_series(self) -> ExpectedSeries {
        match self {
            Self::Payments => PAYMENTS,
            Self::PauseChannel
            | Self::ResumeChannel
            | Self::SkipInChannel
            | Self::ReplayDeadLetter
            | Self::DiscardDeadLetter
            | Self::ReplayDeadLetters
            | Self::DiscardDeadLetters
            | Self::ResumeRelay
            | Self::WakeRelay => ACTION,
            Self::None => NOTHING,
            _ => READ,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_of_each_listed_route_is_its_path() {
        for listed in super::super::router::ROUTES {
            let (_, target) = listed.split_once(' ').unwrap();
            let path = target.split('?').next().unwrap();
            assert_eq!(RoutePattern::of_path(path).as_str(), path, "{listed}");
        }
        for path in [
            "",
            "x",
            "//",
            "/payments/",
            "/payments/1/2",
            "/admin",
            "/admin/",
            "/none",
        ] {
            let pattern = RoutePattern::of_path(path);
            let is_empty_id = path == "/payments/";
            assert_eq!(pattern == RoutePattern::Payment, is_empty_id, "{path}");
            assert!(is_empty_id || pattern == RoutePattern::None, "{path}");
        }
    }
}
