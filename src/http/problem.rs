//! Errors as RFC 9457 `application/problem+json`.

use hyper::header::{
    ACCEPT_ENCODING, ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{Response, StatusCode};
use serde::Serialize;

use super::response::{Body, json_response};
use crate::domain::payment::{InvalidPayment, truncate_payment_error};
use crate::store::StoreError;

/// A problem, as the client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    status: StatusCode,
    slug: &'static str,
    detail: String,
    field: Option<String>,
    allow: Option<&'static str>,
    /// The challenge that RFC 6750 requires for tokens.
    challenge: Option<&'static str>,
    /// Whether the connection closes after the response: the rest of the request was not read.
    close: bool,
}

/// How long a client should wait after 429 or 503.
const RETRY_AFTER_S: &str = "1";

/// How long a client should wait after 507: a disk does not get free space by itself.
const RETRY_AFTER_FULL_S: &str = "30";

/// The title of each problem type. The type is `urn:payrelay:problem:` and the first of each pair.
pub(super) const TITLES: [(&str, &str); 21] = [
    ("not-json", "The body is not JSON"),
    ("broken-body", "The body is incomplete"),
    ("invalid-host", "The Host header is invalid"),
    (
        "malformed-idempotency-key",
        "The Idempotency-Key is malformed",
    ),
    ("unauthorized", "A valid token is needed"),
    ("forbidden", "The request is not allowed"),
    ("not-found", "The resource does not exist"),
    ("method-not-allowed", "The method is not allowed here"),
    ("body-timeout", "The body arrived too slowly"),
    ("too-large", "The body is too large"),
    ("conflict", "The state does not allow this"),
    ("unsupported-media-type", "The body's type is not supported"),
    ("unsupported-coding", "The body's coding is not supported"),
    ("misdirected", "The request is for another host"),
    ("invalid-field", "A field is invalid"),
    ("unexpected-body", "No body is expected here"),
    (
        "idempotency-key-reused",
        "The Idempotency-Key belongs to another request",
    ),
    ("too-many-requests", "The client makes too many requests"),
    (
        "unknown-transfer-coding",
        "The transfer coding is not supported",
    ),
    ("unavailable", "payrelay is unavailable"),
    ("insufficient-storage", "The disk has too little space"),
];

impl Problem {
    fn new(status: StatusCode, slug: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            slug,
            detail: truncate_payment_error(detail.into()),
            field: None,
            allow: None,
            challenge: None,
            close: false,
        }
    }

    pub(super) fn not_json(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "not-json", detail)
    }

    pub(super) fn broken_body(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "broken-body", detail)
    }

    pub(super) fn invalid_host(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid-host", detail)
    }

    pub(super) fn malformed_key(detail: impl Into<String>) -> Self {
        let field = Some("Idempotency-Key".to_owned());
        Self {
            field,
            ..Self::new(StatusCode::BAD_REQUEST, "malformed-idempotency-key", detail)
        }
    }

    pub(super) fn unsupported_coding() -> Self {
        let detail = "the body must come without a Content-Encoding";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported-coding",
            detail,
        )
    }

    pub(super) fn unknown_transfer_coding() -> Self {
        let detail = "the only supported Transfer-Encoding is chunked";
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            "unknown-transfer-coding",
            detail,
        )
    }

    pub(super) fn unexpected_body() -> Self {
        let detail = "this request has no body";
        let field = Some("body".to_owned());
        Self {
            field,
            ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "unexpected-body", detail)
        }
    }

    pub(super) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", detail)
    }

    /// Closes the connection after the response.
    pub(super) fn closing(self) -> Self {
        Self {
            close: true,
            ..self
        }
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    pub(super) fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }

    fn challenge(
        status: StatusCode,
        slug: &'static str,
        challenge: &'static str,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            challenge: Some(challenge),
            ..Self::new(status, slug, detail)
        }
    }

    pub(super) fn no_token() -> Self {
        let detail = "this needs a token: Authorization: Bearer TOKEN";
        Self::challenge(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "Bearer realm=\"payrelay\"",
            detail,
        )
    }

    pub(super) fn wrong_token(detail: impl Into<String>) -> Self {
        Self::challenge(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "Bearer realm=\"payrelay\", error=\"invalid_token\"",
            detail,
        )
    }

    pub(super) fn insufficient_access(detail: impl Into<String>) -> Self {
        Self::challenge(
            StatusCode::FORBIDDEN,
            "forbidden",
            "Bearer realm=\"payrelay\", error=\"insufficient_scope\"",
            detail,
        )
    }

    pub(super) fn misdirected(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::MISDIRECTED_REQUEST, "misdirected", detail)
    }

    pub(super) fn too_many_requests(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too-many-requests", detail)
    }

    pub(super) fn method_not_allowed(allow: &'static str) -> Self {
        let detail = format!("allowed here: {allow}");
        Self {
            allow: Some(allow),
            ..Self::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail)
        }
    }

    pub(super) fn body_timeout() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "body-timeout",
            "the body arrived too slowly (http.body_timeout)",
        )
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
        let field = Some(truncate_payment_error(field.into()));
        Self {
            field,
            ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid-field", detail)
        }
    }

    pub(super) fn key_reused() -> Self {
        let field = Some("Idempotency-Key".to_owned());
        let detail = "this key was used with another body; a new request needs a new key";
        Self {
            field,
            ..Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                detail,
            )
        }
    }

    pub(super) fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
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
            title: TITLES
                .iter()
                .find(|(slug, _)| *slug == self.slug)
                .map_or("Error", |(_, title)| title),
            status: self.status.as_u16(),
            detail: &self.detail,
            field: self.field.as_deref(),
        };
        let mut response = json_response(self.status, &json);
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if let Some(challenge) = self.challenge {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        let again = match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some(RETRY_AFTER_S),
            StatusCode::INSUFFICIENT_STORAGE => Some(RETRY_AFTER_FULL_S),
            _ => None,
        };
        if let Some(seconds) = again {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        if self.slug == "unsupported-coding" {
            // RFC 9110, 15.5.16.
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<InvalidPayment> for Problem {
    fn from(invalid: InvalidPayment) -> Self {
        match invalid {
            InvalidPayment::NotJson(detail) => Self::not_json(detail),
            InvalidPayment::Field { field, detail } => Self::invalid_field(field, detail),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Busy => {
                Self::unavailable("too many requests wait; this attempt stored nothing")
            }
            StoreError::Closed => Self::unavailable("payrelay is stopping"),
            StoreError::Full => {
                let detail = "the disk has no free space; this attempt stored nothing";
                Self::new(
                    StatusCode::INSUFFICIENT_STORAGE,
                    "insufficient-storage",
                    detail,
                )
            }
            StoreError::Damaged => {
                Self::unavailable("the database is damaged; this attempt stored nothing")
            }
            // The error of SQLite is for the operator's log.
            StoreError::Failed(_) => {
                Self::unavailable("the database failed; this attempt stored nothing")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_problem_of_a_full_disk_suggests_a_retry_after_half_a_minute() {
        let retry_after = |error| {
            let response = Problem::from(error).into_response();
            response
                .headers()
                .get(RETRY_AFTER)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        assert_eq!(
            (retry_after(StoreError::Full), retry_after(StoreError::Busy)),
            ("30".to_owned(), "1".to_owned())
        );
    }

    #[test]
    fn every_problem_type_has_its_own_title() {
        let source = include_str!("problem.rs");
        let (code, _) = source.split_once("#[cfg(test)]").unwrap();
        let made = code.split("StatusCode::").skip(1).filter_map(|rest| {
            let (_, rest) = rest.split_once(',')?;
            let rest = rest.trim_start().strip_prefix('"')?;
            rest.split_once('"').map(|(slug, _)| slug)
        });
        let made: Vec<_> = made
            .filter(|slug| slug.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
            .collect();
        assert!(made.len() > 15, "{made:?}");
        for slug in made {
            assert!(
                TITLES.iter().any(|(known, _)| *known == slug),
                "{slug} has no title"
            );
        }
        let mut titles: Vec<_> = TITLES.iter().map(|(_, title)| title).collect();
        titles.sort_unstable();
        titles.dedup();
        assert_eq!(titles.len(), TITLES.len());
    }
}
