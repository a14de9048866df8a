//! Why an operator did something, in the operator's words. Pure.

/// The reason for a line of the log: in quotes, so that it cannot look like another line.
pub fn describe_reason(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!(" ({reason:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_cannot_look_like_another_line_of_the_log() {
        assert_eq!(describe_reason(None), "");
        assert_eq!(describe_reason(Some("no\nERROR")), " (\"no\\nERROR\")");
    }
}
