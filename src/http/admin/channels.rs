//! `/admin/channels`: lists the channels, resumes one, or skips a payment of a paused one.

use hyper::{Response, StatusCode};
use serde::{Deserialize, Serialize};

use super::super::app::{App, Channel};
use super::super::auth::AuthenticatedClient;
use super::super::body::IncomingBody;
use super::super::problem::Problem;
use super::super::response::{Body, json_response};
use super::{ActionRequested, action_requested};
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::{Health, HealthLevel};
use crate::store::channel_action;

/// The longest reason of an action, in bytes.
const REASON_MAX: usize = 500;

const OUTCOME: &str = "GET /admin/channels shows it; the channel acts within a second";

#[derive(Serialize)]
struct ChannelList<'a> {
    /// When the waiting payments were counted.
    sampled_at: Option<Timestamp>,
    channels: Vec<ChannelView<'a>>,
}

#[derive(Serialize)]
struct ChannelView<'a> {
    name: &'a str,
    #[serde(flatten)]
    health: Health,
    /// `null` until the first sample.
    waiting: Option<i64>,
    oldest_waiting_s: Option<u64>,
}

/// The body of a skip.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChannelSkipRequest {
    reason: String,
}

impl ChannelSkipRequest {
    fn parse(body: &[u8]) -> Result<Self, Problem> {
        let request: Self = serde_json::from_slice(body)
            .map_err(|_| Problem::invalid_field("body", "must be {\"reason\": \"...\"}"))?;
        if request.reason.trim().is_empty() || request.reason.len() > REASON_MAX {
            return Err(Problem::invalid_field(
                "reason",
                format!("must have 1 to {REASON_MAX} bytes"),
            ));
        }
        Ok(request)
    }
}

impl App {
    pub(super) fn list_channels(&self) -> Response<Body> {
        let snapshot = self.context.snapshots.latest();
        let now = Timestamp::now();
        // The sampler counts the channels in this order.
        let waiting = |index: usize| {
            snapshot
                .as_ref()
                .and_then(|snapshot| snapshot.backlog.channels.get(index))
        };
        let views = self
            .context
            .channels
            .iter()
            .enumerate()
            .map(|(index, channel)| ChannelView {
                name: &channel.name,
                health: channel.health.get(),
                waiting: waiting(index).map(|waiting| waiting.count),
                oldest_waiting_s: waiting(index).map(|waiting| waiting.age(now).as_secs()),
            });
        let channels = views.collect();
        let sampled_at = snapshot.as_ref().map(|snapshot| snapshot.at);
        json_response(
            StatusCode::OK,
            &ChannelList {
                sampled_at,
                channels,
            },
        )
    }

    fn find_channel(&self, name: &str) -> Result<&Channel, Problem> {
        let channel = self
            .context
            .channels
            .iter()
            .find(|channel| channel.name == name);
        channel.ok_or_else(|| Problem::not_found(format!("there is no channel {name:?}")))
    }

    /// Records the action, and wakes the notifier, which executes it.
    async fn request_channel_action(
        &self,
        client: &AuthenticatedClient,
        name: &str,
        action: channel_action::ChannelAction,
    ) -> Result<(), Problem> {
        let resume = self.find_channel(name)?.resume.clone();
        let name = name.to_owned();
        let origin = client.origin();
        self.write(move |tx| {
            channel_action::request_channel_action(tx, &name, &action, &origin, Timestamp::now())
        })
        .await?;
        resume.wake();
        Ok(())
    }

    pub(super) async fn resume_channel(
        &self,
        client: &AuthenticatedClient,
        name: &str,
    ) -> Result<Response<Body>, Problem> {
        self.request_channel_action(client, name, channel_action::ChannelAction::Resume)
            .await?;
        Ok(action_requested(&ActionRequested {
            requested: "resume",
            channel: Some(name),
            outcome: OUTCOME,
        }))
    }

    /// Dead-letters the oldest payment of a paused channel.
    pub(super) async fn skip_in_channel(
        &self,
        client: &AuthenticatedClient,
        name: &str,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        let settings = &self.context.settings;
        let mut limit = self.limits().body_limit(&client.usage);
        let bytes = body
            .read_to_end(settings.body_bytes_max, settings.body_timeout, &mut limit)
            .await?;
        let ChannelSkipRequest { reason } = ChannelSkipRequest::parse(&bytes)?;
        if self.find_channel(name)?.health.get().state != HealthLevel::Paused {
            return Err(Problem::conflict(
                "the channel is not paused, so no payment was skipped",
            ));
        }
        self.request_channel_action(client, name, channel_action::ChannelAction::Skip(reason))
            .await?;
        Ok(action_requested(&ActionRequested {
            requested: "skip",
            channel: Some(name),
            outcome: OUTCOME,
        }))
    }
}
