//! The administrative endpoints: which there are, and the relay and the topic themselves.

pub(super) mod channels;
mod dead_letters;
mod outbox;
mod reason;

use hyper::{Method, Response, StatusCode};
use serde::Serialize;

pub(super) use self::dead_letters::{DeadLetterPage, DeadLetterResolution};
use self::outbox::OutboxPage;
use super::app::App;
use super::auth::AuthenticatedClient;
use super::body::IncomingBody;
use super::params::{parse_path_param, reject_params};
use super::problem::Problem;
use super::response::{Body, json_response};
use crate::domain::reason::describe_reason;
use crate::domain::timestamp::Timestamp;
use crate::store::channel_action::ChannelAction;
use crate::store::dead_letter_action::{DeadLetterAction, Selection};
use crate::store::relay_action::{self, RelayAction};
use crate::store::{Transaction, topic};

/// A request for an existing administrative endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AdminRoute {
    Channels,
    PauseChannel { name: String },
    ResumeChannel { name: String },
    SkipInChannel { name: String },
    DeadLetters(DeadLetterPage),
    DeadLetter { id: i64 },
    ResolveDeadLetters(DeadLetterResolution),
    Outbox(OutboxPage),
    ResumeRelay,
    Topic,
    WakeRelay,
}

impl AdminRoute {
    /// Finds the endpoint of a path below `/admin/`.
    fn find(path: &str, rest: &[&str], query: &str) -> Result<Self, Problem> {
        let plain = |route| reject_params(query).map(|()| route);
        let one = |id| parse_path_param(path, id).map(Selection::Id);
        match *rest {
            ["channels"] => plain(Self::Channels),
            ["channels", name, "pause"] => plain(Self::PauseChannel {
                name: name.to_owned(),
            }),
            ["channels", name, "resume"] => plain(Self::ResumeChannel {
                name: name.to_owned(),
            }),
            ["channels", name, "skip"] => plain(Self::SkipInChannel {
                name: name.to_owned(),
            }),
            ["dead-letters"] => DeadLetterPage::parse(query).map(Self::DeadLetters),
            ["dead-letters", "replay"] => Self::resolve_all(DeadLetterAction::Replay, query),
            ["dead-letters", "discard"] => Self::resolve_all(DeadLetterAction::Discard, query),
            ["dead-letters", id] => plain(Self::DeadLetter {
                id: parse_path_param(path, id)?,
            }),
            ["dead-letters", id, "replay"] => {
                Self::resolve(one(id)?, DeadLetterAction::Replay, query)
            }
            ["dead-letters", id, "discard"] => {
                Self::resolve(one(id)?, DeadLetterAction::Discard, query)
            }
            ["outbox"] => OutboxPage::parse(query).map(Self::Outbox),
            ["relay", "resume"] => plain(Self::ResumeRelay),
            ["relay", "wake"] => plain(Self::WakeRelay),
            ["topic"] => plain(Self::Topic),
            _ => Err(Problem::not_found(format!(
                "there is no resource at {path}"
            ))),
        }
    }

    fn resolve_all(action: DeadLetterAction, query: &str) -> Result<Self, Problem> {
        Self::resolve(DeadLetterResolution::ALL, action, query)
    }

    fn resolve(
        selection: Selection,
        action: DeadLetterAction,
        query: &str,
    ) -> Result<Self, Problem> {
        DeadLetterResolution::parse(selection, action, query).map(Self::ResolveDeadLetters)
    }

    /// Whether it may have a body: the reason of the action.
    pub(super) fn expects_body(&self) -> bool {
        matches!(
            self,
            Self::PauseChannel { .. }
                | Self::ResumeChannel { .. }
                | Self::SkipInChannel { .. }
                | Self::ResolveDeadLetters(_)
                | Self::ResumeRelay
                | Self::WakeRelay
        )
    }

    /// Whether it changes anything, so that it needs a POST.
    fn is_action(&self) -> bool {
        match self {
            Self::Channels
            | Self::DeadLetters(_)
            | Self::DeadLetter { .. }
            | Self::Outbox(_)
            | Self::Topic => false,
            Self::PauseChannel { .. }
            | Self::ResumeChannel { .. }
            | Self::SkipInChannel { .. }
            | Self::ResolveDeadLetters(_)
            | Self::ResumeRelay
            | Self::WakeRelay => true,
        }
    }
}

/// Finds the endpoint for a method, the rest of a path and a query.
pub(super) fn route_admin_request(
    method: &Method,
    path: &str,
    rest: &[&str],
    query: &str,
) -> Result<AdminRoute, Problem> {
    let found = AdminRoute::find(path, rest, query)?;
    match *method {
        Method::POST if found.is_action() => Ok(found),
        Method::GET | Method::HEAD if !found.is_action() => Ok(found),
        _ if found.is_action() => Err(Problem::method_not_allowed("POST")),
        _ => Err(Problem::method_not_allowed("GET, HEAD")),
    }
}

/// The response to an action that another thread executes: its outcome is not known yet.
#[derive(Serialize)]
struct ActionRequested<'a> {
    requested: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<&'a str>,
    /// Where the outcome shows.
    outcome: &'static str,
}

fn action_requested(action: &ActionRequested<'_>) -> Response<Body> {
    json_response(StatusCode::ACCEPTED, action)
}

#[derive(Serialize)]
struct TopicView<'a> {
    topic: &'a str,
    partitions: Vec<topic::Partition>,
}

impl App {
    pub(super) async fn dispatch_admin(
        &self,
        client: &AuthenticatedClient,
        route: AdminRoute,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        match route {
            AdminRoute::Channels => Ok(self.list_channels()),
            AdminRoute::PauseChannel { name } => {
                self.steer_channel(client, &name, body, ChannelAction::Pause)
                    .await
            }
            AdminRoute::ResumeChannel { name } => {
                self.steer_channel(client, &name, body, ChannelAction::Resume)
                    .await
            }
            AdminRoute::SkipInChannel { name } => self.skip_in_channel(client, &name, body).await,
            AdminRoute::DeadLetters(page) => self.list_dead_letters(page).await,
            AdminRoute::DeadLetter { id } => self.find_dead_letter(id).await,
            AdminRoute::ResolveDeadLetters(resolution) => {
                let reason = self.read_reason(client, body).await?;
                self.resolve_dead_letters(client, resolution, reason).await
            }
            AdminRoute::Outbox(page) => self.list_outbox(page).await,
            AdminRoute::ResumeRelay => {
                let outcome =
                    "GET /health/ready shows the publisher; a fenced one resumes within a second";
                let reason = self.read_reason(client, body).await?;
                self.act_on_relay(client, RelayAction::Resume, reason, outcome)
                    .await
            }
            AdminRoute::WakeRelay => {
                let outcome = "GET /health/ready shows the publisher";
                let reason = self.read_reason(client, body).await?;
                self.act_on_relay(client, RelayAction::Wake, reason, outcome)
                    .await
            }
            AdminRoute::Topic => self.admin_topic().await,
        }
    }

    async fn admin_topic(&self) -> Result<Response<Body>, Problem> {
        let name = self.context.topic.clone();
        let partitions = self
            .query(move |connection| topic::topic_partitions_by_name(connection, &name))
            .await?;
        let topic = &self.context.topic;
        Ok(json_response(
            StatusCode::OK,
            &TopicView { topic, partitions },
        ))
    }

    /// Records what the relay is to do. A fenced relay looks for a resume itself.
    async fn act_on_relay(
        &self,
        client: &AuthenticatedClient,
        action: RelayAction,
        reason: Option<String>,
        outcome: &'static str,
    ) -> Result<Response<Body>, Problem> {
        let origin = client.origin();
        let why = describe_reason(reason.as_deref());
        log::info!(
            event = "relay_action", action = action.as_str(), by = origin;
            "{} of the relay requested by {origin}{why}", action.as_str()
        );
        self.write(move |tx: &Transaction<'_>| {
            relay_action::record_relay_action(
                tx,
                action,
                &origin,
                reason.as_deref(),
                Timestamp::now(),
            )
        })
        .await?;
        if action == RelayAction::Wake {
            self.context.relay.wake();
        }
        Ok(action_requested(&ActionRequested {
            requested: action.as_str(),
            channel: None,
            outcome,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::params::PAGE_MAX;
    use crate::store::dead_letter::DeadLetterFilter;

    fn admin_route(method: &Method, path: &str, query: &str) -> Result<AdminRoute, Problem> {
        let rest: Vec<_> = path
            .strip_prefix("/admin/")
            .unwrap_or(path)
            .split('/')
            .collect();
        route_admin_request(method, path, &rest, query)
    }

    #[test]
    fn each_admin_route_is_found_by_its_method_and_path() {
        let get = &Method::GET;
        let post = &Method::POST;
        assert_eq!(
            admin_route(get, "/admin/channels", ""),
            Ok(AdminRoute::Channels)
        );
        assert_eq!(admin_route(get, "/admin/topic", ""), Ok(AdminRoute::Topic));
        assert_eq!(
            admin_route(post, "/admin/channels/till-3/resume", ""),
            Ok(AdminRoute::ResumeChannel {
                name: "till-3".into()
            })
        );
        assert_eq!(
            admin_route(post, "/admin/relay/resume", ""),
            Ok(AdminRoute::ResumeRelay)
        );
        let letters = Ok(AdminRoute::DeadLetters(DeadLetterPage {
            filter: DeadLetterFilter::All,
            after: 7,
            limit: 2,
        }));
        assert_eq!(
            admin_route(get, "/admin/dead-letters", "all=true&after=7&limit=2"),
            letters
        );
        assert_eq!(
            admin_route(get, "/admin/dead-letters/7", ""),
            Ok(AdminRoute::DeadLetter { id: 7 })
        );
        let resolve = |selection, action, dry_run| {
            Ok(AdminRoute::ResolveDeadLetters(DeadLetterResolution {
                selection,
                action,
                dry_run,
            }))
        };
        assert_eq!(
            admin_route(post, "/admin/dead-letters/7/replay", ""),
            resolve(Selection::Id(7), DeadLetterAction::Replay, false)
        );
        let all = resolve(
            Selection::Open {
                after: 3,
                limit: PAGE_MAX,
            },
            DeadLetterAction::Discard,
            true,
        );
        assert_eq!(
            admin_route(
                post,
                "/admin/dead-letters/discard",
                "all=true&dry_run=true&after=3"
            ),
            all
        );
    }

    #[test]
    fn no_admin_route_changes_anything_on_get() {
        for (path, query) in [
            ("/admin/dead-letters/7/replay", ""),
            ("/admin/dead-letters/discard", "all=true"),
            ("/admin/channels/a/resume", ""),
            ("/admin/relay/resume", ""),
        ] {
            assert_eq!(
                admin_route(&Method::GET, path, query),
                Err(Problem::method_not_allowed("POST")),
                "{path}"
            );
        }
        assert_eq!(
            admin_route(&Method::POST, "/admin/channels", ""),
            Err(Problem::method_not_allowed("GET, HEAD"))
        );
        for query in [
            "",
            "dry_run=true",
            "all=false",
            "all=true&dryrun=true",
            "all=true&dry_run=yes",
        ] {
            assert!(
                admin_route(&Method::POST, "/admin/dead-letters/replay", query).is_err(),
                "{query}"
            );
        }
        assert!(admin_route(&Method::POST, "/admin/dead-letters/7/replay", "all=true").is_err());
        assert!(admin_route(&Method::POST, "/admin/dead-letters/7/replay", "after=3").is_err());
        assert!(admin_route(&Method::GET, "/admin/nothing", "").is_err());
    }
}
