//! The administrative endpoints: channels, outbox, dead letters, topic.

use hyper::{Method, Response, StatusCode};
use serde::{Deserialize, Serialize};

use super::app::{App, Channel};
use super::auth::Client;
use super::body::{self, IncomingBody};
use super::problem::Problem;
use super::query::{PAGE, PAGE_MAX, id_in_path, no_parameters, number, page_size, query_params};
use super::response::{Body, json};
use crate::domain::timestamp::Timestamp;
use crate::runtime::health::{Health, HealthLevel};
use crate::store::dead_letter::{self, DeadLetterFilter, DeadLetterView};
use crate::store::dead_letter_action::{
    self, DeadLetterAction, DeadLetterOutcome, DeadLetterRequest, Selection,
};
use crate::store::origin::Origin;
use crate::store::{Connection, Transaction, channel_action, relay_action, topic};

/// A request for an existing endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    Channels,
    Topic,
    Resume {
        name: String,
    },
    Skip {
        name: String,
    },
    ResumeRelay,
    DeadLetters {
        all: bool,
        after: i64,
        limit: usize,
    },
    DeadLetter {
        id: i64,
    },
    Act {
        which: Selection,
        action: DeadLetterAction,
        dry_run: bool,
    },
}

/// Finds the endpoint for a method, the rest of a path and a query.
pub(super) fn route(
    method: &Method,
    path: &str,
    rest: &[&str],
    query: &str,
) -> Result<Route, Problem> {
    let letter = |id| id_in_path(path, id).map(Selection::Id);
    let found = match *rest {
        ["channels"] => no_parameters(query).map(|()| Route::Channels)?,
        ["topic"] => no_parameters(query).map(|()| Route::Topic)?,
        ["channels", name, "resume"] => no_parameters(query).map(|()| Route::Resume {
            name: name.to_owned(),
        })?,
        ["channels", name, "skip"] => no_parameters(query).map(|()| Route::Skip {
            name: name.to_owned(),
        })?,
        ["relay", "resume"] => no_parameters(query).map(|()| Route::ResumeRelay)?,
        ["dead-letters"] => page(query)?,
        ["dead-letters", "replay"] => resolve(ALL, DeadLetterAction::Replay, query)?,
        ["dead-letters", "discard"] => resolve(ALL, DeadLetterAction::Discard, query)?,
        ["dead-letters", id] => no_parameters(query).and_then(|()| {
            Ok(Route::DeadLetter {
                id: id_in_path(path, id)?,
            })
        })?,
        ["dead-letters", id, "replay"] => resolve(letter(id)?, DeadLetterAction::Replay, query)?,
        ["dead-letters", id, "discard"] => resolve(letter(id)?, DeadLetterAction::Discard, query)?,
        _ => {
            return Err(Problem::not_found(format!(
                "there is no resource at {path}"
            )));
        }
    };
    let changes = matches!(
        found,
        Route::Resume { .. } | Route::Skip { .. } | Route::ResumeRelay | Route::Act { .. }
    );
    match *method {
        Method::POST if changes => Ok(found),
        Method::GET | Method::HEAD if !changes => Ok(found),
        _ => Err(Problem::method_not_allowed(if changes {
            "POST"
        } else {
            "GET, HEAD"
        })),
    }
}

/// The oldest open letters: one request resolves up to a page of them.
const ALL: Selection = Selection::Open {
    after: 0,
    limit: PAGE_MAX,
};

fn resolve(mut which: Selection, action: DeadLetterAction, query: &str) -> Result<Route, Problem> {
    let mut dry_run = false;
    let mut all = false;
    for (name, value) in query_params(query) {
        match (name, &mut which) {
            ("dry_run", _) => dry_run = parse_bool(name, value)?,
            ("all", Selection::Open { .. }) => all = parse_bool(name, value)?,
            ("after", Selection::Open { after, .. }) => *after = number("after", value)?,
            _ => {
                let detail = "there is no such parameter; there is dry_run, and for all letters \
                    all=true and after";
                return Err(Problem::invalid_field(name, detail));
            }
        }
    }
    if matches!(which, Selection::Open { .. }) && !all {
        return Err(Problem::invalid_field(
            "all",
            "is missing: add ?all=true to act on all open dead letters",
        ));
    }
    Ok(Route::Act {
        which,
        action,
        dry_run,
    })
}

fn page(query: &str) -> Result<Route, Problem> {
    let (mut all, mut after, mut limit) = (false, 0, PAGE);
    for (name, value) in query_params(query) {
        match name {
            "all" => all = parse_bool(name, value)?,
            "after" => after = number("after", value)?,
            "limit" => limit = page_size(value)?,
            _ => {
                let detail = "there is no such parameter; there are all, after and limit";
                return Err(Problem::invalid_field(name, detail));
            }
        }
    }
    Ok(Route::DeadLetters { all, after, limit })
}

fn parse_bool(name: &str, value: &str) -> Result<bool, Problem> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(Problem::invalid_field(name, "must be true or false")),
    }
}

#[derive(Serialize)]
struct Channels<'a> {
    channels: Vec<ShownChannel<'a>>,
}

#[derive(Serialize)]
struct ShownChannel<'a> {
    name: &'a str,
    #[serde(flatten)]
    part: Health,
    /// `null` until the first sample.
    waiting: Option<i64>,
    oldest_waiting_s: Option<u64>,
}

#[derive(Serialize)]
struct Topic<'a> {
    topic: &'a str,
    partitions: Vec<topic::Partition>,
}

#[derive(Serialize)]
struct DeadLetters<'a> {
    dead_letters: &'a [DeadLetterView],
    /// The path of later ones.
    next: Option<String>,
}

#[derive(Serialize)]
struct ActionRecord<'a> {
    dry_run: bool,
    outcomes: &'a [DeadLetterOutcome],
    /// The path of the same action on later ones.
    next: Option<String>,
}

impl App {
    pub(super) async fn dispatch_admin(
        &self,
        client: &Client,
        route: Route,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        match route {
            Route::Channels => Ok(self.channels()),
            Route::Topic => self.topic().await,
            Route::Resume { name } => self.resume(client, &name).await,
            Route::Skip { name } => self.skip(client, &name, body).await,
            Route::ResumeRelay => self.resume_relay().await,
            Route::DeadLetters { all, after, limit } => self.dead_letters(all, after, limit).await,
            Route::DeadLetter { id } => {
                let letter = self
                    .query(move |connection| dead_letter::find_dead_letter(connection, id))
                    .await?;
                let letter = letter.ok_or_else(|| no_letter(id))?;
                Ok(json(StatusCode::OK, &letter))
            }
            Route::Act {
                which,
                action,
                dry_run,
            } => self.resolve(which, action, dry_run).await,
        }
    }

    fn channels(&self) -> Response<Body> {
        let (snapshot, now) = (self.context.snapshots.latest(), Timestamp::now());
        // The sampler counts the channels in this order.
        let waiting = |index: usize| {
            snapshot
                .as_ref()
                .and_then(|snapshot| snapshot.backlog.channels.get(index))
        };
        let shown = self
            .context
            .channels
            .iter()
            .enumerate()
            .map(|(index, channel)| ShownChannel {
                name: &channel.name,
                part: channel.health.get(),
                waiting: waiting(index).map(|waiting| waiting.count),
                oldest_waiting_s: waiting(index).map(|waiting| waiting.age(now).as_secs()),
            });
        let channels = shown.collect();
        json(StatusCode::OK, &Channels { channels })
    }

    async fn topic(&self) -> Result<Response<Body>, Problem> {
        let name = self.context.topic.clone();
        let partitions = self
            .query(move |connection| topic::topic_partitions_by_name(connection, &name))
            .await?;
        Ok(json(
            StatusCode::OK,
            &Topic {
                topic: &self.context.topic,
                partitions,
            },
        ))
    }

    fn channel(&self, name: &str) -> Result<&Channel, Problem> {
        let channel = self
            .context
            .channels
            .iter()
            .find(|channel| channel.name == name);
        channel.ok_or_else(|| Problem::not_found(format!("there is no channel {name:?}")))
    }

    /// Records the action, and wakes the notifier, which executes it.
    async fn ask(
        &self,
        client: &Client,
        name: &str,
        action: channel_action::ChannelAction,
    ) -> Result<(), Problem> {
        let resume = self.channel(name)?.resume.clone();
        let (name, origin) = (name.to_owned(), origin(client));
        self.write(move |tx| {
            channel_action::request_channel_action(tx, &name, &action, &origin, Timestamp::now())
        })
        .await?;
        resume.wake();
        Ok(())
    }

    async fn resume(&self, client: &Client, name: &str) -> Result<Response<Body>, Problem> {
        self.ask(client, name, channel_action::ChannelAction::Resume)
            .await?;
        Ok(accepted(&serde_json::json!({ "resumed": name })))
    }

    /// Dead-letters the oldest payment of a paused channel.
    async fn skip(
        &self,
        client: &Client,
        name: &str,
        body: &mut IncomingBody,
    ) -> Result<Response<Body>, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Skip {
            reason: String,
        }
        let settings = &self.context.settings;
        let mut held = self.limits().body_budget(&client.account);
        let bytes = body::read(
            body,
            settings.body_bytes_max,
            settings.body_timeout,
            &mut held,
        )
        .await?;
        let detail = "must be {\"reason\": \"...\"}";
        let Skip { reason } =
            serde_json::from_slice(&bytes).map_err(|_| Problem::invalid_field("body", detail))?;
        if reason.trim().is_empty() || reason.len() > REASON_MAX {
            return Err(Problem::invalid_field(
                "reason",
                format!("must have 1 to {REASON_MAX} bytes"),
            ));
        }
        if self.channel(name)?.health.get().state != HealthLevel::Paused {
            return Err(Problem::conflict(
                "the channel is not paused, so no payment was skipped",
            ));
        }
        self.ask(client, name, channel_action::ChannelAction::Skip(reason))
            .await?;
        Ok(accepted(&serde_json::json!({ "skipping": name })))
    }

    async fn resume_relay(&self) -> Result<Response<Body>, Problem> {
        self.write(|tx: &Transaction<'_>| {
            relay_action::request_relay_action(tx, Origin::Http, Timestamp::now())
        })
        .await?;
        log::info!("an operator resumes the relay");
        Ok(accepted(&serde_json::json!({ "resumed": "relay" })))
    }

    async fn dead_letters(
        &self,
        all: bool,
        after: i64,
        limit: usize,
    ) -> Result<Response<Body>, Problem> {
        // One more row than the page shows whether there is a next page.
        use DeadLetterFilter::{All, Open};
        let filter = if all { All } else { Open };
        let list = move |connection: &Connection| {
            dead_letter::list_dead_letters(connection, filter, after, limit + 1)
        };
        let mut letters = self.query(list).await?;
        let more = letters.len() > limit;
        letters.truncate(limit);
        let next = letters.last().filter(|_| more).map(|last| {
            format!(
                "/admin/dead-letters?all={all}&after={}&limit={limit}",
                last.id
            )
        });
        Ok(json(
            StatusCode::OK,
            &DeadLetters {
                dead_letters: &letters,
                next,
            },
        ))
    }

    async fn resolve(
        &self,
        which: Selection,
        action: DeadLetterAction,
        dry_run: bool,
    ) -> Result<Response<Body>, Problem> {
        let (node, now) = (self.context.store.node().clone(), Timestamp::now());
        let work = move |tx: &Transaction<'_>| {
            let order = DeadLetterRequest {
                action,
                which,
                dry_run,
                node: &node,
                origin: Origin::Http,
                now,
            };
            dead_letter_action::act_on_dead_letters(tx, order)
        };
        let outcomes = self.write(work).await?;
        if let (Selection::Id(id), []) = (which, outcomes.as_slice()) {
            return Err(no_letter(id));
        }
        if !dry_run {
            for DeadLetterOutcome { id, outcome, .. } in &outcomes {
                log::info!(
                    "dead letter {id}, {} by the operator: {outcome}",
                    action.as_str()
                );
            }
            // Wakes the threads that deliver or publish it again.
            self.context.notifiers.wake();
            self.context.relay.wake();
        }
        let next = match (which, outcomes.last()) {
            (Selection::Open { limit, .. }, Some(last)) if outcomes.len() == limit => {
                Some(format!(
                    "/admin/dead-letters/{}?all=true&after={}&dry_run={dry_run}",
                    action.as_str(),
                    last.id
                ))
            }
            _ => None,
        };
        Ok(json(
            StatusCode::OK,
            &ActionRecord {
                dry_run,
                outcomes: &outcomes,
                next,
            },
        ))
    }
}

/// The longest reason of an action, in bytes.
const REASON_MAX: usize = 500;

/// The action was requested, or done.
fn accepted(action: &serde_json::Value) -> Response<Body> {
    json(StatusCode::ACCEPTED, action)
}

/// The origin of a request, for the record of the action.
fn origin(client: &Client) -> String {
    if client.name.is_empty() {
        "http".to_owned()
    } else {
        format!("http, token {}", client.name)
    }
}

fn no_letter(id: i64) -> Problem {
    Problem::not_found(format!("there is no dead letter {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(method: &Method, path: &str, query: &str) -> Result<Route, Problem> {
        let rest: Vec<_> = path
            .strip_prefix("/admin/")
            .unwrap_or(path)
            .split('/')
            .collect();
        route(method, path, &rest, query)
    }

    #[test]
    fn knows_its_routes() {
        let (get, post) = (&Method::GET, &Method::POST);
        assert_eq!(find(get, "/admin/channels", ""), Ok(Route::Channels));
        assert_eq!(find(get, "/admin/topic", ""), Ok(Route::Topic));
        assert_eq!(
            find(post, "/admin/channels/till-3/resume", ""),
            Ok(Route::Resume {
                name: "till-3".into()
            })
        );
        assert_eq!(
            find(post, "/admin/relay/resume", ""),
            Ok(Route::ResumeRelay)
        );
        let letters = Ok(Route::DeadLetters {
            all: true,
            after: 7,
            limit: 2,
        });
        assert_eq!(
            find(get, "/admin/dead-letters", "all=true&after=7&limit=2"),
            letters
        );
        assert_eq!(
            find(get, "/admin/dead-letters/7", ""),
            Ok(Route::DeadLetter { id: 7 })
        );
        let resolve = |which, action, dry_run| {
            Ok(Route::Act {
                which,
                action,
                dry_run,
            })
        };
        assert_eq!(
            find(post, "/admin/dead-letters/7/replay", ""),
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
            find(
                post,
                "/admin/dead-letters/discard",
                "all=true&dry_run=true&after=3"
            ),
            all
        );
    }

    #[test]
    fn get_requests_never_change_anything() {
        for (path, query) in [
            ("/admin/dead-letters/7/replay", ""),
            ("/admin/dead-letters/discard", "all=true"),
            ("/admin/channels/a/resume", ""),
            ("/admin/relay/resume", ""),
        ] {
            assert_eq!(
                find(&Method::GET, path, query),
                Err(Problem::method_not_allowed("POST")),
                "{path}"
            );
        }
        assert_eq!(
            find(&Method::POST, "/admin/channels", ""),
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
                find(&Method::POST, "/admin/dead-letters/replay", query).is_err(),
                "{query}"
            );
        }
        assert!(find(&Method::POST, "/admin/dead-letters/7/replay", "all=true").is_err());
        assert!(find(&Method::POST, "/admin/dead-letters/7/replay", "after=3").is_err());
        assert!(find(&Method::GET, "/admin/nothing", "").is_err());
    }
}
