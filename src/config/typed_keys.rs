//! Keys with a type: a text, a number, a duration and others, read and checked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::Value;

use super::duration;
use super::secret::Secret;
use super::source::{Display, Source};
use crate::domain::template::Template;
use crate::domain::timestamp::TimeZone;

/// Reads keys of a [`Source`] as checked values.
pub(super) struct TypedKeys<'a> {
    source: Source<'a>,
    /// Values that must not be given twice, with the key that gave them.
    unique_values: BTreeMap<String, String>,
}

impl<'a> TypedKeys<'a> {
    pub(super) fn new(source: Source<'a>) -> Self {
        Self {
            source,
            unique_values: BTreeMap::new(),
        }
    }

    /// Ends the reading of keys.
    pub(super) fn into_source(self) -> Source<'a> {
        self.source
    }

    /// How many tables there are in an array of tables.
    pub(super) fn tables(&self, key: &str) -> usize {
        self.source.tables(key)
    }

    /// Whether a key that was read is set, validly or not.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.source.is_set(key)
    }

    pub(super) fn add_problem(&mut self, problem: String) {
        self.source.add_problem(problem);
    }

    /// Reports a name that another table of the same array has.
    pub(super) fn require_unique_name(&mut self, key: &str, name: &str) {
        if let Some(other) = self.remember(key, name) {
            self.add_problem(format!("{key} = {name:?}: {other} has this name already"));
        }
    }

    /// Reports a secret that another table of the same array has.
    pub(super) fn require_unique_secret(&mut self, key: &str, secret: &str) {
        if let Some(other) = self.remember(key, secret) {
            self.add_problem(format!("{key} is the same as {other}"));
        }
    }

    fn remember(&mut self, key: &str, value: &str) -> Option<String> {
        let array = key.split('[').next().unwrap_or(key).to_owned();
        self.remember_as(&array, key, value)
    }

    /// Remembers which key has this value, such as the name of a token. Returns the key that has it
    /// already: the value must be unique among all keys of this kind.
    pub(super) fn remember_as(&mut self, kind: &str, key: &str, value: &str) -> Option<String> {
        self.unique_values
            .insert(format!("{kind} {value}"), key.to_owned())
    }

    pub(super) fn text(
        &mut self,
        key: &str,
        default: &str,
        allowed: &str,
        check: impl Fn(&str) -> bool,
    ) -> String {
        self.source.read(
            key,
            &Value::from(default),
            allowed,
            Display::Shown,
            |value| value.as_str().filter(|text| check(text)).map(str::to_owned),
        )
    }

    pub(super) fn secret(
        &mut self,
        key: &str,
        allowed: &str,
        check: impl Fn(&str) -> bool,
    ) -> Option<Secret> {
        let text = self
            .source
            .read(key, &Value::from(""), allowed, Display::Masked, |value| {
                value
                    .as_str()
                    .filter(|text| text.is_empty() || check(text))
                    .map(str::to_owned)
            });
        (!text.is_empty()).then(|| Secret::new(text))
    }

    pub(super) fn socket_address(&mut self, key: &str, default: &str) -> SocketAddr {
        let allowed = "\"address:port\", such as \"127.0.0.1:8080\"";
        self.source.read(
            key,
            &Value::from(default),
            allowed,
            Display::Shown,
            |value| value.as_str()?.parse().ok(),
        )
    }

    pub(super) fn path(&mut self, key: &str, default: &str) -> PathBuf {
        let allowed = "the path of a file on the disk (:memory: and URIs are none)";
        let is_file =
            |text: &&str| !text.is_empty() && *text != ":memory:" && !text.starts_with("file:");
        self.source.read(
            key,
            &Value::from(default),
            allowed,
            Display::Shown,
            |value| value.as_str().filter(is_file).map(PathBuf::from),
        )
    }

    pub(super) fn integer<T>(&mut self, key: &str, default: i64, range: RangeInclusive<i64>) -> T
    where
        T: TryFrom<i64>,
    {
        let allowed = format!("an integer from {} to {}", range.start(), range.end());
        self.source.read(
            key,
            &Value::from(default),
            &allowed,
            Display::Shown,
            |value| {
                value
                    .as_integer()
                    .filter(|number| range.contains(number))
                    .and_then(|number| T::try_from(number).ok())
            },
        )
    }

    pub(super) fn number(&mut self, key: &str, default: f64, range: RangeInclusive<f64>) -> f64 {
        let allowed = format!("a number from {} to {}", range.start(), range.end());
        self.source.read(
            key,
            &Value::from(default),
            &allowed,
            Display::Shown,
            |value| {
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "the range has no such large numbers"
                )]
                let number = value
                    .as_float()
                    .or_else(|| value.as_integer().map(|number| number as f64));
                number.filter(|number| range.contains(number))
            },
        )
    }

    pub(super) fn template(&mut self, key: &str, default: &str) -> Template {
        self.source.read(
            key,
            &Value::from(default),
            Template::EXPECTED,
            Display::Shown,
            |value| Template::parse(value.as_str()?),
        )
    }

    pub(super) fn zone(&mut self, key: &str, default: &str) -> TimeZone {
        let allowed = "a name of the IANA time zone database, such as \"Asia/Seoul\"";
        self.source.read(
            key,
            &Value::from(default),
            allowed,
            Display::Shown,
            |value| TimeZone::parse(value.as_str()?),
        )
    }

    pub(super) fn count(
        &mut self,
        key: &str,
        default: i64,
        range: RangeInclusive<i64>,
    ) -> NonZeroUsize {
        let number = self.integer::<usize>(key, default, range);
        NonZeroUsize::new(number).unwrap_or(NonZeroUsize::MIN)
    }

    pub(super) fn duration(
        &mut self,
        key: &str,
        default: &str,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let allowed = format!(
            "a number and a unit (ms, s, m, h, d), from {} to {}",
            duration::show_duration(*range.start()),
            duration::show_duration(*range.end())
        );
        self.source.read(
            key,
            &Value::from(default),
            &allowed,
            Display::Shown,
            |value| duration::parse_duration(value.as_str()?).filter(|span| range.contains(span)),
        )
    }

    /// One of these values; the first is the default.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> T {
        self.choice_or(key, choices, choices[0].0)
    }

    /// The same with another default.
    pub(super) fn choice_or<T: Copy>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
        default: &str,
    ) -> T {
        let names: Vec<_> = choices
            .iter()
            .map(|(name, _)| format!("{name:?}"))
            .collect();
        self.source.read(
            key,
            &Value::from(default),
            &names.join(" or "),
            Display::Shown,
            |value| {
                let text = value.as_str()?;
                choices
                    .iter()
                    .find(|(name, _)| *name == text)
                    .map(|(_, choice)| *choice)
            },
        )
    }

    pub(super) fn list(
        &mut self,
        key: &str,
        default: &[&str],
        allowed: &str,
        check: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        self.source.read(
            key,
            &Value::from(default.to_vec()),
            allowed,
            Display::Shown,
            |value| {
                let items = value
                    .as_array()?
                    .iter()
                    .map(|item| item.as_str().filter(|text| check(text)).map(str::to_owned));
                items
                    .collect::<Option<Vec<_>>>()
                    .filter(|items| !items.is_empty())
            },
        )
    }

    /// A text that may be empty, which means that there is none.
    pub(super) fn optional_text(
        &mut self,
        key: &str,
        allowed: &str,
        check: impl Fn(&str) -> bool,
    ) -> Option<String> {
        let text = self.text(key, "", allowed, |text| text.is_empty() || check(text));
        (!text.is_empty()).then_some(text)
    }

    /// Whether a text is an `http://` or `https://` URL with a host.
    pub(super) fn is_url(text: &str) -> bool {
        let host = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"));
        host.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'))
            && text.bytes().all(|b| b.is_ascii_graphic())
    }
}

/// The values of an enum by their names.
pub(super) fn by_name<T: Copy>(
    values: &[T],
    name: fn(T) -> &'static str,
) -> Vec<(&'static str, T)> {
    values.iter().map(|value| (name(*value), *value)).collect()
}
