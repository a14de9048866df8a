//! The body of an action: why an operator does it.

use serde::Deserialize;

use super::super::app::App;
use super::super::auth::AuthenticatedClient;
use super::super::body::IncomingBody;
use super::super::problem::Problem;

/// The longest reason of an action, in bytes.
const REASON_MAX: usize = 500;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionReason {
    reason: String,
}

fn parse_reason(body: &[u8]) -> Result<String, Problem> {
    let ActionReason { reason } = serde_json::from_slice(body)
        .map_err(|_| Problem::invalid_field("body", "must be {\"reason\": \"...\"}"))?;
    if reason.trim().is_empty() || reason.len() > REASON_MAX {
        return Err(Problem::invalid_field(
            "reason",
            format!("must have 1 to {REASON_MAX} bytes"),
        ));
    }
    Ok(reason)
}

impl App {
    /// Reads the reason of an action. An empty body has none.
    pub(super) async fn read_reason(
        &self,
        client: &AuthenticatedClient,
        body: &mut IncomingBody,
    ) -> Result<Option<String>, Problem> {
        let settings = &self.context.settings;
        let mut limit = self.limits().body_limit(&client.usage);
        let bytes = body
            .read_to_end(settings.body_bytes_max, settings.body_timeout, &mut limit)
            .await?;
        if bytes.is_empty() {
            return Ok(None);
        }
        parse_reason(&bytes).map(Some)
    }
}
