//! Points in time: microseconds since 1970 UTC, in the database and the API.
//!
//! Only [`Timestamp::now`] reads the system clock, and due times are compared as data, so tests
//! pass the time that they need.

use std::fmt;
use std::time::Duration;

use jiff::fmt::temporal::DateTimePrinter;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Microseconds since 1970-01-01T00:00:00Z; shown as RFC 3339 with six decimals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The wall clock, now.
    pub fn now() -> Self {
        Self(jiff::Timestamp::now().as_microsecond())
    }

    /// A point in time, from its stored form.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Reads RFC 3339, as it is shown.
    pub fn parse(text: &str) -> Option<Self> {
        text.parse()
            .ok()
            .map(|time: jiff::Timestamp| Self(time.as_microsecond()))
    }

    /// Parses a point in time of an HTTP header (RFC 9110, 5.6.7), such as
    /// `Sun, 22 Nov 2026 10:00:00 GMT`.
    pub fn parse_http_date(text: &str) -> Option<Self> {
        let preferred = || {
            jiff::fmt::rfc2822::DateTimeParser::new()
                .parse_timestamp(text)
                .ok()
        };
        // Obsolete forms, which must be accepted: "Sunday, 06-Nov-94 08:49:37 GMT" and "Sun Nov  6
        // 08:49:37 1994".
        let civil = |format| jiff::civil::DateTime::strptime(format, text).ok();
        let obsolete = || {
            let date =
                civil("%A, %d-%b-%y %H:%M:%S GMT").or_else(|| civil("%a %b %e %H:%M:%S %Y"))?;
            date.to_zoned(jiff::tz::TimeZone::UTC)
                .ok()
                .map(|zoned| zoned.timestamp())
        };
        preferred()
            .or_else(obsolete)
            .map(|time| Self(time.as_microsecond()))
    }

    /// The stored form.
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// Seconds since 1970, as Prometheus has them: exact to a microsecond.
    #[expect(
        clippy::cast_precision_loss,
        reason = "2^53 microseconds are 285 years"
    )]
    pub fn as_seconds(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// The reverse of [`Timestamp::as_seconds`].
    #[expect(
        clippy::cast_possible_truncation,
        reason = "saturates at both ends of time"
    )]
    pub fn from_seconds(seconds: f64) -> Self {
        Self((seconds * 1e6).round() as i64)
    }

    /// Milliseconds since 1970, as Kafka's records have them.
    pub const fn as_millis(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// This much later; stops at the end of time instead of wrapping.
    #[must_use]
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(timestamp_micros(span)))
    }

    /// This much earlier; stops at the beginning of time instead of wrapping.
    #[must_use]
    pub fn minus(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(timestamp_micros(span)))
    }

    /// The time since `earlier`; zero if the clock was set back since.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

fn timestamp_micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

/// The time zone of displayed times.
#[derive(Debug, Clone)]
pub struct TimeZone(jiff::tz::TimeZone);

impl TimeZone {
    /// A name of the IANA database, such as `Asia/Seoul`; the database is built in.
    pub fn parse(name: &str) -> Option<Self> {
        jiff::tz::TimeZone::get(name).ok().map(Self)
    }

    /// The zone of this machine; UTC if it has none.
    pub fn system() -> Self {
        Self(jiff::tz::TimeZone::system())
    }

    /// The first moment of a day such as `2026-11-27`.
    pub fn start_of_date(&self, date: &str) -> Option<Timestamp> {
        let date: jiff::civil::Date = date.parse().ok()?;
        let zoned = date.to_zoned(self.0.clone()).ok()?;
        Some(Timestamp(zoned.timestamp().as_microsecond()))
    }

    /// The first moment of the day of `time`, or of the day before.
    pub fn start_of_day(&self, time: Timestamp, days_before: i32) -> Option<Timestamp> {
        let time = jiff::Timestamp::from_microsecond(time.0).ok()?;
        let date = time.to_zoned(self.0.clone()).date();
        let date = date.checked_sub(jiff::Span::new().days(days_before)).ok()?;
        self.start_of_date(&date.to_string())
    }

    /// The time of the day, to the millisecond.
    pub fn format_clock(&self, time: Timestamp) -> String {
        match jiff::Timestamp::from_microsecond(time.0) {
            Ok(time) => time
                .to_zoned(self.0.clone())
                .strftime("%H:%M:%S%.3f")
                .to_string(),
            Err(_) => "at no time".to_owned(),
        }
    }

    /// Date, time to the second, and the zone's short name.
    pub fn format_time(&self, time: Timestamp) -> String {
        match jiff::Timestamp::from_microsecond(time.0) {
            Ok(time) => time
                .to_zoned(self.0.clone())
                .strftime("%Y-%m-%d %H:%M:%S %Z")
                .to_string(),
            Err(_) => "at no time".to_owned(),
        }
    }
}

impl Timestamp {
    /// As it is displayed, with milliseconds.
    pub fn format_millis(self) -> String {
        const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(time) => PRINTER.timestamp_to_string(&time),
            Err(_) => "at no time".to_owned(),
        }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(time) => f.write_str(&PRINTER.timestamp_to_string(&time)),
            // A value of a damaged page. It must be displayable all the same.
            Err(_) => write!(f, "{} us", self.0),
        }
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom("not a time of RFC 3339"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_has_six_decimals_in_utc() {
        let time = Timestamp::from_micros(1_795_341_600_123_456);
        assert_eq!(time.to_string(), "2026-11-22T10:00:00.123456Z");
        assert_eq!(
            Timestamp::from_micros(0).to_string(),
            "1970-01-01T00:00:00.000000Z"
        );
        assert_eq!(time.as_millis(), 1_795_341_600_123);
    }

    #[test]
    fn a_timestamp_is_displayed_in_the_configured_zone() {
        let time = Timestamp::from_micros(1_795_341_600_123_456);
        assert_eq!(
            TimeZone::parse("Asia/Seoul").unwrap().format_time(time),
            "2026-11-22 19:00:00 KST"
        );
        assert_eq!(
            TimeZone::parse("UTC").unwrap().format_time(time),
            "2026-11-22 10:00:00 UTC"
        );
        assert!(TimeZone::parse("Asia/Nowhere").is_none());
        assert_eq!(
            Timestamp::parse_http_date("Sun, 22 Nov 2026 10:00:00 GMT"),
            Some(Timestamp(1_795_341_600_000_000))
        );
        assert_eq!(
            Timestamp::parse_http_date("Sunday, 22-Nov-26 10:00:00 GMT"),
            Some(Timestamp(1_795_341_600_000_000))
        );
        assert_eq!(
            Timestamp::parse_http_date("Sun Nov 22 10:00:00 2026"),
            Some(Timestamp(1_795_341_600_000_000))
        );
        assert_eq!(
            Timestamp::parse_http_date("Fri Nov  6 10:00:00 2026"),
            Some(Timestamp(1_793_959_200_000_000))
        );
        assert_eq!(Timestamp::parse_http_date("soon"), None);
    }

    #[test]
    fn the_corpus_of_timestamps_of_http() {
        let words = [
            "Sun, ", " GMT", " +0000", " -2359", "Feb", "29", "9999", ":60", "(", ")",
        ];
        crate::fuzz::fuzz_corpus("http-date", 10_000, &words, |bytes| {
            let Some(time) = Timestamp::parse_http_date(&String::from_utf8_lossy(bytes)) else {
                return false;
            };
            // It can be displayed, and is the same when it is written in the HTTP form.
            assert!(!time.to_string().is_empty());
            let written = jiff::Timestamp::from_microsecond(time.0)
                .unwrap()
                .strftime("%a, %d %b %Y %H:%M:%S GMT")
                .to_string();
            assert_eq!(
                Timestamp::parse_http_date(&written),
                Some(time),
                "{written}"
            );
            true
        });
    }

    #[test]
    fn a_timestamp_of_a_clock_that_jumped_back_is_no_time_ago() {
        let earlier = Timestamp::from_micros(10);
        assert_eq!(Timestamp::from_micros(3).since(earlier), Duration::ZERO);
        assert_eq!(
            earlier.minus(Duration::MAX),
            Timestamp::from_micros(10 - i64::MAX)
        );
    }
}
