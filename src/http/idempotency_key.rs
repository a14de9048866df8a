//! The Idempotency-Key header
//! (<https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-idempotency-key-header-07>) and the
//! fingerprint of a body.

use hyper::header::HeaderMap;
use sha2::{Digest as _, Sha256};

use super::problem::Problem;

const NAME: &str = "Idempotency-Key";

/// The longest key. That is ample: a UUID has 36 characters.
const LENGTH_MAX: usize = 255;

/// The key of a request. The draft has a string in quotes; most clients send the bare value, which
/// means the same.
pub(super) fn idempotency_key_header(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(NAME).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Problem::malformed_key(
            "the header is there more than once: a request has one key",
        ));
    }
    let parsed = value
        .to_str()
        .ok()
        .and_then(parse_idempotency_key)
        .filter(|key| (1..=LENGTH_MAX).contains(&key.len()));
    let allowed = || {
        format!(
            "must be 1 to {LENGTH_MAX} printable ASCII characters, in double quotes or without any"
        )
    };
    parsed
        .map(Some)
        .ok_or_else(|| Problem::malformed_key(allowed()))
}

/// A string of RFC 9651 (3.3.3), or a bare value.
fn parse_idempotency_key(text: &str) -> Option<String> {
    let printable = |c: char| c == ' ' || c.is_ascii_graphic();
    let Some(rest) = text.strip_prefix('"') else {
        return text.chars().all(printable).then(|| text.to_owned());
    };
    let mut key = String::new();
    let mut characters = rest.chars();
    loop {
        match characters.next()? {
            '"' => break,
            '\\' => key.push(characters.next().filter(|c| matches!(c, '"' | '\\'))?),
            c if printable(c) => key.push(c),
            _ => return None,
        }
    }
    // No parameters may follow: the draft knows none.
    characters.next().is_none().then_some(key)
}

/// The fingerprint of a body.
pub(super) fn idempotency_key_body_hash(body: &[u8]) -> [u8; 32] {
    Sha256::digest(body).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    fn idempotency_key_of(values: &[&[u8]]) -> Result<Option<String>, Problem> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(NAME, HeaderValue::from_bytes(value).unwrap());
        }
        idempotency_key_header(&headers)
    }

    #[test]
    fn an_idempotency_key_is_a_string_in_quotes_or_bare() {
        let long = "x".repeat(LENGTH_MAX);
        let pairs = [
            (
                r#""8e03978e-40d5-43e8-bc93-6894a57f9324""#,
                "8e03978e-40d5-43e8-bc93-6894a57f9324",
            ),
            (
                "8e03978e-40d5-43e8-bc93-6894a57f9324",
                "8e03978e-40d5-43e8-bc93-6894a57f9324",
            ),
            (r#""a \"b\" \\ c""#, r#"a "b" \ c"#),
            (r"a\b", r"a\b"),
            ("order 7/2", "order 7/2"),
            (&long, &long),
            (&format!("\"{long}\""), &long),
        ];
        for (text, expected) in pairs {
            assert_eq!(
                idempotency_key_of(&[text.as_bytes()]),
                Ok(Some(expected.to_owned())),
                "{text}"
            );
        }
        assert_eq!(idempotency_key_of(&[]), Ok(None));
    }

    #[test]
    fn invalid_idempotency_keys_are_refused() {
        let long = "x".repeat(LENGTH_MAX + 1);
        let bad: [&[u8]; 11] = [
            b"",
            b"\"\"",
            b"\"",
            b"\"a",
            b"\"a\\b\"",
            b"\"a\"b",
            b"\"a\", \"b\"",
            b"\"a\";p=1",
            b"\xff",
            b"a\tb",
            long.as_bytes(),
        ];
        for value in bad {
            assert!(idempotency_key_of(&[value]).is_err(), "{value:?}");
        }
        assert!(idempotency_key_of(&[b"a", b"a"]).is_err());
    }

    #[test]
    fn the_body_hash_of_an_idempotency_key_is_sha_256() {
        let expected = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(format!("{:x}", Sha256::digest(b"")), expected);
        assert_eq!(
            idempotency_key_body_hash(b"").as_slice(),
            Sha256::digest(b"").as_slice()
        );
    }

    proptest! {
        #[test]
        fn a_quoted_idempotency_key_is_read_as_it_was_written(key in "[ -~]{1,255}") {
            let quoted = format!("\"{}\"", key.replace('\\', "\\\\").replace('"', "\\\""));
            prop_assert_eq!(parse_idempotency_key(&quoted), Some(key));
        }

        #[test]
        fn no_idempotency_key_makes_the_parser_panic(text in ".{0,40}") {
            let _ = parse_idempotency_key(&text);
        }
    }
}
