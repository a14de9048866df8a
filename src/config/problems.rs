//! All problems of a configuration, in one report.

use std::fmt;

/// All problems of a configuration.
#[derive(Debug)]
pub struct Problems(pub(super) Vec<String>);

impl Problems {
    /// A single problem, found after reading.
    pub fn single(problem: impl Into<String>) -> Self {
        Self(vec![problem.into()])
    }

    /// The problems that were found after reading, if there are any.
    pub fn into_result(problems: Vec<String>) -> Result<(), Self> {
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Self(problems))
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(
            f,
            "the configuration has {count} problem{}:",
            if count == 1 { "" } else { "s" }
        )?;
        for problem in &self.0 {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
