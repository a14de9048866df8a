//! All problems of a configuration, in one report.

use std::fmt;
use std::path::{Path, PathBuf};

/// All problems of a configuration.
#[derive(Debug)]
pub struct Problems {
    pub(super) problems: Vec<String>,
    file: Option<PathBuf>,
}

impl Problems {
    pub(super) fn new(problems: Vec<String>) -> Self {
        Self {
            problems,
            file: None,
        }
    }

    /// A single problem, found after reading.
    pub fn single(problem: impl Into<String>) -> Self {
        Self::new(vec![problem.into()])
    }

    /// The problems that were found after reading, if there are any.
    pub fn into_result(problems: Vec<String>) -> Result<(), Self> {
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Self::new(problems))
        }
    }

    /// Names the file that was read, if any.
    #[must_use]
    pub fn in_file(self, file: Option<&Path>) -> Self {
        Self {
            file: file.map(Path::to_owned),
            ..self
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        f.write_str("the configuration")?;
        if let Some(file) = &self.file {
            write!(f, " ({})", file.display())?;
        }
        write!(
            f,
            " has {count} problem{}:",
            if count == 1 { "" } else { "s" }
        )?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
