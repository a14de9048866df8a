//! `/admin/channels`: lists the channels, pauses or resumes one, or skips a payment of a paused
//! one.

use hyper::{Response, StatusCode};
use serde::Serialize;

use super::super::app::{App, Channel};
use super::super::auth::AuthenticatedClient;
use super::super::body::IncomingBody;
use super::super::problem::Problem;
use super::super::response::{Body, json_response};
use super::{ActionRequested, action_requested};
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::{Health, HealthLevel};
use crate::sampler::{Quantiles, Sample};
use crate::store::channel_action::{self, ChannelAction};

const OUTCOME: &str = "GET /admin/channels shows it; the channel acts within a second";

#[derive(Serialize)]
struct ChannelList<'a> {
    /// When the waiting payments were counted.
    sampled_at: Option<Timestamp>,
    channels: Vec<ChannelView<'a>>,
}

#[derive(Serialize)]
pub(in crate::http) struct ChannelView<'a> {
    name: &'a str,
    #[serde(flatten)]
    health: Health,
    /// `null` until the first sample.
    waiting: Option<i64>,
    oldest_waiting_s: Option<u64>,
    /// From the commit to the channel's acceptance in the last minute; `null` without any.
    latency: Option<Quantiles>,
}

impl App {
    pub(super) fn list_channels(&self) -> Response<Body> {
        let sample = self.context.snapshots.latest();
        let list = ChannelList {
            sampled_at: sample.as_ref().map(|sample| sample.at),
            channels: self.view_channels(sample.as_deref()),
        };
        json_response(StatusCode::OK, &list)
    }

    /// The channels, with the waiting payments of a sample.
    pub(in crate::http) fn view_channels(&self, sample: Option<&Sample>) -> Vec<ChannelView<'_>> {
        let now = Timestamp::now();
        // The sampler counts the channels in this order.
        let latencies = self.context.snapshots.latencies().channels;
        let waiting = |index: usize| sample.and_then(|sample| sample.backlog.channels.get(index));
        let channels = self.context.channels.iter().enumerate();
        channels
            .map(|(index, channel)| ChannelView {
                name: &channel.name,
                health: channel.health.get(),
                waiting: waiting(index).map(|waiting| waiting.count),
                oldest_waiting_s: waiting(index).map(|waiting| waiting.age(now).as_secs()),
                latency: latencies.get(index).copied().flatten(),
            })
            .collect()
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
        action: ChannelAction,
    ) -> Result<Response<Body>, Problem> {
        let resume = self.find_channel(name)?.resume.clone();
        let requested = action.kind().as_str();
        let channel = name.to_owned();
        let origin = client.origin();
        self.write(move |tx| {
            let now = Timestamp::now();
            channel_action::request_channel_action(tx, &channel, &action, &origin, now)
        })
        .await?;
        resume.wake();
        Ok(action_requested(&ActionRequested {
            requested,
            channel: Some(name),
            outcome: OUTCOME,
        }))
    }

    /// Pauses or resumes a channel: an action that may have a reason.
    pub(super) async fn steer_channel(
        &self,
        client: &AuthenticatedClient,
        name: &str,
        body: &mut IncomingBody,
        action: fn(Option<String>) -> ChannelAction,
    ) -> Result<Response<Body>, Problem> {
        let reason = self.read_reason(client, body).await?;
        self.request_channel_action(client, name, action(reason))
            .await
    }

    /// Dead-letters the oldest payment of a paused channel.
    pub(super) async fn skip_in_channel(
        &self,
        client: &AuthenticatedClient,
        name: &str,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        let reason = self
            .read_reason(client, body)
            .await?
            .ok_or_else(|| Problem::invalid_field("body", "must be {\"reason\": \"...\"}"))?;
        if self.find_channel(name)?.health.get().state != HealthLevel::Paused {
            return Err(Problem::conflict(
                "the channel is not paused, so no payment was skipped",
            ));
        }
        self.request_channel_action(client, name, ChannelAction::Skip(reason))
            .await
    }
}
