//! Durations as people write them: a number and a unit, such as `60s` or `7d`.

use std::time::Duration;

/// Ten years of 365 days: longer than any process runs.
pub(super) const FOREVER: Duration = Duration::from_hours(3650 * 24);
pub(super) const MS: Duration = Duration::from_millis(1);

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
    Some(Duration::from_millis(
        number.parse::<u64>().ok()?.checked_mul(*factor)?,
    ))
}

pub(super) fn show_duration(span: Duration) -> String {
    let ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let (unit, factor) = UNITS
        .iter()
        .rev()
        .find(|(_, factor)| ms >= *factor && ms.is_multiple_of(*factor))
        .unwrap_or(&UNITS[0]);
    format!("{}{unit}", ms / factor)
}
