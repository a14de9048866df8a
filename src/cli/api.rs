//! What the API of a payrelay answers, or why it does not.

use std::fmt;

use serde_json::Value;

use super::exit_code;
use super::output::{print_error, print_temporary_error};

/// A response, whatever its status.
#[derive(Debug)]
pub(super) struct ApiResponse {
    pub(super) status: u16,
    pub(super) body: Value,
}

/// Why there is no response, and the exit code for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoResponse {
    pub(super) reason: String,
    pub(super) code: u8,
}

impl NoResponse {
    pub(super) fn temporary(reason: impl fmt::Display) -> Self {
        Self {
            reason: format!("payrelay does not answer: {reason}"),
            code: exit_code::TEMPORARY,
        }
    }

    pub(super) fn print(&self) -> u8 {
        match self.code {
            exit_code::TEMPORARY => print_temporary_error(&self.reason),
            code => {
                print_error(&self.reason);
                code
            }
        }
    }
}

/// Whether a body can be that of payrelay's API: an object, and an error has one of its types.
pub(super) fn is_api_response(response: &ApiResponse, path: &str) -> bool {
    let problem = response.body["type"].as_str();
    let is_problem = problem.is_some_and(|problem| problem.starts_with("urn:payrelay:problem:"));
    let is_health = path == "/health/ready" && response.body["status"].is_string();
    match response.status {
        200..=299 => response.body.is_object(),
        _ => is_problem || is_health,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_error_of_another_server_is_none_of_payrelays() {
        let is_api = |status, body| is_api_response(&ApiResponse { status, body }, "/payments/1");
        assert!(is_api(200, json!({})));
        assert!(!is_api(200, json!([])) && !is_api(200, Value::Null));
        assert!(is_api(
            404,
            json!({"type": "urn:payrelay:problem:not-found"})
        ));
        assert!(!is_api(404, json!({"error": "not found"})));
        let unready = ApiResponse {
            status: 503,
            body: json!({"status": "unavailable"}),
        };
        assert!(is_api_response(&unready, "/health/ready"));
    }
}
