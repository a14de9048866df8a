//! Counts in texts: "1 event", "2 events".

use std::fmt::Display;

/// A count and its noun, in the plural unless the count is 1.
pub fn counted(count: impl Display, noun: &str) -> String {
    let count = count.to_string();
    if count == "1" {
        return format!("1 {noun}");
    }
    match noun.strip_suffix('y') {
        Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{count} {stem}ies"),
        _ => format!("{count} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counted_noun_is_plural_unless_the_count_is_one() {
        assert_eq!(counted(1, "event"), "1 event");
        assert_eq!(counted(0, "event"), "0 events");
        assert_eq!(counted(2, "delivery"), "2 deliveries");
        assert_eq!(counted(2, "day"), "2 days");
    }
}
