//! `payrelay explain`: what an alert, a problem type, an exit code or a finding of the audit means,
//! and what to do. The text is a page of the documentation.

use clap::Args;

use super::exit_code;
use super::output::{Output, print_error};

#[derive(Args)]
pub(super) struct ExplainCommand {
    /// The word: an alert, a problem type, an exit code such as 75, or a finding such as
    /// double-payment; without it all words are listed
    #[arg(value_name = "WORD")]
    word: Option<String>,
}

const PAGE: &str = include_str!("../../docs/reference/explanations.md");

/// What problem types begin with.
const PROBLEM: &str = "urn:payrelay:problem:";

impl ExplainCommand {
    pub(super) fn run(&self) -> u8 {
        let mut output = Output::default();
        let Some(word) = &self.word else {
            for (title, _) in sections() {
                output.line(title);
            }
            return output.exit_code(exit_code::OK);
        };
        let bare = word.strip_prefix(PROBLEM).unwrap_or(word);
        let found = sections().find(|(title, _)| title.eq_ignore_ascii_case(bare));
        let Some((title, text)) = found else {
            print_error(format_args!(
                "there is no explanation of {word:?}; payrelay explain lists all words"
            ));
            return exit_code::PARTIAL;
        };
        output.line(format_args!("{title}\n\n{}", text.trim().replace('`', "")));
        output.exit_code(exit_code::OK)
    }
}

/// Each word of the page with its text.
fn sections() -> impl Iterator<Item = (&'static str, &'static str)> {
    PAGE.split("\n### `").skip(1).filter_map(|section| {
        let (title, text) = section.split_once("`\n")?;
        Some((title, text.split("\n## ").next().unwrap_or(text)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_explanation_has_a_word_of_its_own_and_says_what_to_do() {
        let mut words: Vec<_> = sections().map(|(title, _)| title).collect();
        assert!(words.len() > 75, "{words:?}");
        for (title, text) in sections() {
            assert!(text.trim().len() > 40, "{title}: {text}");
        }
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), count);
    }
}
