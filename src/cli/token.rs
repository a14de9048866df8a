//! `payrelay token`: a new token for a client, and its hash for the configuration.

use payrelay::domain::token::{self, TokenHash};

use super::exit_code;
use super::output::{output_line, print_error, print_note};

/// The token goes to the client alone; payrelay keeps the hash.
pub(super) fn run_token_command() -> u8 {
    match token::new_token() {
        Ok(token) => {
            let hash = TokenHash::of_token(&token).expose();
            let code = output_line(format_args!("{token}\nhash = \"{hash}\""));
            print_note(
                "The first line is the token, for the client; the second belongs in an \
                    [[http.token]].",
            );
            code
        }
        Err(error) => {
            print_error(format_args!(
                "the operating system has no randomness: {error}"
            ));
            exit_code::THREAD_DIED
        }
    }
}
