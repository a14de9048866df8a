//! Errors as RFC 9457 `application/problem+json`.

use hyper::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde::Serialize;

use super::routes::Body;
use crate::payment::{Invalid, shown};
use crate::store::StoreError;

/// What went wrong, as the client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    status: StatusCode,
    slug: &'static str,
    detail: String,
    field: Option<String>,
    allow: Option<&'static str>,
    /// What RFC 6750 has a server say about tokens.
    challenge: Option<&'static str>,
}

/// How long a client that is told 429, 503 or 507 should wait.
const RETRY_AFTER_S: &str = "1";

impl Problem {
    fn new(status: StatusCode, slug: &'static str, detail: impl Into<String>) -> Self {
        Self { status, slug, detail: shown(detail.into()), field: None, allow: None, challenge: None }
    }

    pub(super) fn not_json(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "not-json", detail)
    }

    pub(super) fn broken_body(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "broken-body", detail)
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    pub(super) fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }

    fn challenge(status: StatusCode, slug: &'static str, challenge: &'static str, detail: impl Into<String>) -> Self {
        Self { challenge: Some(challenge), ..Self::new(status, slug, detail) }
    }

    pub(super) fn no_token() -> Self {
        let detail = "this needs a token: Authorization: Bearer TOKEN";
        Self::challenge(StatusCode::UNAUTHORIZED, "unauthorized", "Bearer", detail)
    }

    pub(super) fn wrong_token(detail: impl Into<String>) -> Self {
        Self::challenge(StatusCode::UNAUTHORIZED, "unauthorized", "Bearer error=\"invalid_token\"", detail)
    }

    pub(super) fn insufficient_access(detail: impl Into<String>) -> Self {
        Self::challenge(StatusCode::FORBIDDEN, "forbidden", "Bearer error=\"insufficient_scope\"", detail)
    }

    pub(super) fn misdirected(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::MISDIRECTED_REQUEST, "misdirected", detail)
    }

    pub(super) fn too_many_requests(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too-many-requests", detail)
    }

    pub(super) fn method_not_allowed(allow: &'static str) -> Self {
        let detail = format!("allowed here: {allow}");
        Self { allow: Some(allow), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail) }
    }

    pub(super) fn body_timeout() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "body-timeout", "the body took too long to arrive (http.body_timeout)")
    }

    pub(super) fn too_large(limit: usize) -> Self {
        let detail = format!("the body is larger than {limit} bytes (http.body_bytes_max)");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
    }

    pub(super) fn unsupported_media_type() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported-media-type",
            "the Content-Type must be application/json",
        )
    }

    pub(super) fn invalid_field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        let field = Some(shown(field.into()));
        Self { field, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid-field", detail) }
    }

    pub(super) fn key_reused() -> Self {
        let field = Some("Idempotency-Key".to_owned());
        let detail = "this key was used with another body; a new request needs a new key";
        Self { field, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency-key-reused", detail) }
    }

    pub(super) fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
    }

    /// Whether the client had its time to send the body.
    pub(super) fn is_timeout(&self) -> bool {
        self.status == StatusCode::REQUEST_TIMEOUT
    }

    pub(super) fn into_response(self) -> Response<Body> {
        #[derive(Serialize)]
        struct Json<'a> {
            r#type: String,
            title: &'a str,
            status: u16,
            detail: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            field: Option<&'a str>,
        }
        let json = Json {
            r#type: format!("urn:payrelay:problem:{}", self.slug),
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: self.status.as_u16(),
            detail: &self.detail,
            field: self.field.as_deref(),
        };
        let mut response = super::routes::json(self.status, &json);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/problem+json"));
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, hyper::header::HeaderValue::from_static(allow));
        }
        if let Some(challenge) = self.challenge {
            headers.insert(WWW_AUTHENTICATE, hyper::header::HeaderValue::from_static(challenge));
        }
        let again = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE, StatusCode::INSUFFICIENT_STORAGE];
        if again.contains(&self.status) {
            headers.insert(RETRY_AFTER, hyper::header::HeaderValue::from_static(RETRY_AFTER_S));
        }
        response
    }
}

impl From<Invalid> for Problem {
    fn from(invalid: Invalid) -> Self {
        match invalid {
            Invalid::NotJson(detail) => Self::not_json(detail),
            Invalid::Field { field, detail } => Self::invalid_field(field, detail),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Busy => Self::unavailable("too much work waits; this attempt stored nothing"),
            StoreError::Closed => Self::unavailable("payrelay is stopping"),
            StoreError::Full => {
                let detail = "the disk has no room; this attempt stored nothing";
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "insufficient-storage", detail)
            }
            StoreError::Damaged => Self::unavailable("the database is damaged; this attempt stored nothing"),
            // What SQLite says is for the operator's log.
            StoreError::Failed(_) => Self::unavailable("the database refused; this attempt stored nothing"),
        }
    }
}
