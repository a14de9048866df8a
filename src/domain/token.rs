//! A bearer token, and its hash.

use std::fmt::{self, Write as _};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

/// The SHA-256 of a token. It is a secret too: a client that could replace it would have access.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// The form of a hash in the configuration.
    pub const EXPECTED: &str =
        "\"sha256:\" and 64 hexadecimal digits, as `payrelay token` prints it";

    /// The hash of a token.
    pub fn of_token(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }

    /// Reads `sha256:<64 hexadecimal digits>`.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text
            .strip_prefix("sha256:")
            .filter(|digits| digits.len() == 64 && digits.is_ascii())?;
        let mut hash = [0; 32];
        for (index, byte) in hash.iter_mut().enumerate() {
            let pair = digits.get(2 * index..2 * index + 2)?;
            // `from_str_radix` would accept a sign.
            *byte = u8::from_str_radix(pair, 16)
                .ok()
                .filter(|_| !pair.starts_with('+'))?;
        }
        Some(Self(hash))
    }

    /// Compares in constant time.
    pub fn ct_eq(&self, other: &Self) -> Choice {
        self.0.ct_eq(&other.0)
    }

    /// The hash in the form of the configuration.
    pub fn expose(&self) -> String {
        format!("sha256:{}", token_hex(&self.0))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

fn token_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A new token: 32 bytes of the operating system's randomness, in hexadecimal digits.
pub fn new_token() -> std::io::Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(token_hex(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_hash_is_parsed_as_it_is_shown() {
        // The example of FIPS 180-2, B.1.
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(TokenHash::of_token("abc").expose(), abc);
        assert_eq!(TokenHash::parse(abc), Some(TokenHash::of_token("abc")));
        assert_eq!(
            TokenHash::parse(&abc.to_uppercase().replace("SHA", "sha")),
            Some(TokenHash::of_token("abc"))
        );
        assert_eq!(format!("{:?}", TokenHash::of_token("abc")), "***");
        let long = format!("{abc}0");
        let signed = abc.replace("ba78", "+a78");
        for bad in [
            "",
            "abc",
            &abc[7..],
            &abc[..70],
            &long,
            &signed,
            &abc.replace("ba", "zz"),
            &abc.replace("ba", "é"),
        ] {
            assert_eq!(TokenHash::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_new_token_is_different() {
        let one = new_token().unwrap();
        let other = new_token().unwrap();
        assert!(one.len() == 64 && one != other);
        assert_eq!(
            TokenHash::parse(&TokenHash::of_token(&one).expose()),
            Some(TokenHash::of_token(&one))
        );
    }
}
