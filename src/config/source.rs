//! The value of a key: from the environment, else from the file, else the default.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use toml::Value;

use super::nearest_name::nearest_name;
use super::problems::Problems;
use super::secret::Secret;

/// Variables of payrelay that are no keys.
const OTHER_VARIABLES: [&str; 3] = ["PAYRELAY_CONFIG", "PAYRELAY_LOG", "PAYRELAY_TOKEN"];

/// Whether a value may be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Display {
    Shown,
    Masked,
}

/// The raw values, read one key at a time.
pub(super) struct Source<'a> {
    file: BTreeMap<String, Value>,
    environment: &'a BTreeMap<String, String>,
    /// The tables of the file.
    sections: BTreeSet<String>,
    asked: BTreeSet<String>,
    /// How many tables an array of tables has, by its key.
    tables: BTreeMap<String, usize>,
    variables: BTreeSet<String>,
    effective: Vec<(String, String, &'static str)>,
    /// Keys whose value differs from the default.
    changed: BTreeSet<String>,
    given: BTreeMap<String, Secret>,
    described: Vec<KeyDescription>,
    problems: Vec<String>,
}

/// A key, as a section asked for it.
#[derive(Debug)]
pub(super) struct KeyDescription {
    pub(super) key: String,
    pub(super) default: Value,
    pub(super) allowed: String,
    pub(super) display: Display,
}

/// The values that were read, for people and for a comparison with other ones.
#[derive(Debug)]
pub(super) struct Values {
    /// As TOML, secrets masked, each key with the source of its value.
    pub(super) effective: String,
    /// Variables that begin with `PAYRELAY_` and name no key.
    pub(super) ignored_variables: Vec<String>,
    /// Keys whose value differs from the default.
    pub(super) changed: BTreeSet<String>,
    /// Each key's value as it was given.
    pub(super) given: BTreeMap<String, Secret>,
}

/// The environment variable of a key.
fn variable_name(key: &str) -> String {
    let words = key.replace(['.', '['], "_").replace(']', "");
    format!("PAYRELAY_{}", words.to_uppercase())
}

impl<'a> Source<'a> {
    /// Reads the text of a configuration file.
    pub(super) fn parse(
        file: &str,
        environment: &'a BTreeMap<String, String>,
    ) -> Result<Self, Problems> {
        let table = file
            .parse()
            .map_err(|error| Problems::single(Self::not_toml(file, &error)))?;
        Ok(Self::new(table, environment))
    }

    fn new(table: toml::Table, environment: &'a BTreeMap<String, String>) -> Self {
        let mut source = Self {
            file: BTreeMap::new(),
            environment,
            sections: BTreeSet::new(),
            asked: BTreeSet::new(),
            changed: BTreeSet::new(),
            tables: BTreeMap::new(),
            variables: BTreeSet::new(),
            effective: Vec::new(),
            given: BTreeMap::new(),
            described: Vec::new(),
            problems: Vec::new(),
        };
        for (section, value) in table {
            let is_section = match &value {
                Value::Table(_) => true,
                Value::Array(items) => !items.is_empty() && items.iter().all(Value::is_table),
                _ => false,
            };
            if is_section {
                source.sections.insert(section.clone());
            }
            match value {
                Value::Table(keys) => {
                    for (key, value) in keys {
                        source.insert(format!("{section}.{key}"), value);
                    }
                }
                value => {
                    source.file.insert(section, value);
                }
            }
        }
        source
    }

    /// Splits an array of tables into the keys of each.
    fn insert(&mut self, key: String, value: Value) {
        match value {
            Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_table) => {
                self.tables.insert(key.clone(), items.len());
                for (index, item) in items.into_iter().enumerate() {
                    let keys = item.as_table().cloned().unwrap_or_default();
                    self.file.extend(
                        keys.into_iter()
                            .map(|(name, value)| (format!("{key}[{index}].{name}"), value)),
                    );
                }
            }
            value => {
                self.file.insert(key, value);
            }
        }
    }

    /// How many tables there are in an array of tables. Variables may add some after those of the
    /// file: a container needs no file.
    pub(super) fn tables(&self, key: &str) -> usize {
        let in_file = self.tables.get(key).copied().unwrap_or(0);
        let is_added = |number: &usize| {
            let prefix = variable_name(&format!("{key}[{number}]."));
            let mut variables = self.environment.iter();
            variables.any(|(name, value)| name.starts_with(&prefix) && !value.is_empty())
        };
        let numbers = in_file..in_file + self.environment.len();
        in_file + numbers.take_while(is_added).count()
    }

    /// Whether a key that was read is set, validly or not.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.effective
            .iter()
            .any(|(asked, value, origin)| asked == key && *origin != "default" && value != "\"\"")
    }

    /// The keys with this prefix whose value differs from the default.
    pub(super) fn changed_keys(&self, prefix: &str) -> Vec<String> {
        let keys = self.changed.iter();
        keys.filter(|key| key.starts_with(prefix))
            .cloned()
            .collect()
    }

    pub(super) fn add_problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// Reads a value: from the environment, else from the file, else the default.
    pub(super) fn read<T>(
        &mut self,
        key: &str,
        default: &Value,
        allowed: &str,
        display: Display,
        parse: impl Fn(&Value) -> Option<T>,
    ) -> T {
        self.asked.insert(key.to_owned());
        self.described.push(KeyDescription {
            key: key.to_owned(),
            default: default.clone(),
            allowed: allowed.to_owned(),
            display,
        });
        let (value, origin) = match self.variable(key, display) {
            Some(text) => (Self::coerce_variable(text, default), "environment"),
            None => match self.file.get(key) {
                Some(value) => (value.clone(), "file"),
                None => (default.clone(), "default"),
            },
        };
        // Variables number the tables: when a table is removed, they would apply to another one.
        if key.contains('[')
            && origin == "environment"
            && self.file.get(key).is_some_and(|v| v.as_str() != Some(""))
        {
            self.problems.push(format!(
                "{key} is set in the file and in the environment: set it in one of them"
            ));
        }
        let shown = if display == Display::Masked && value.as_str() != Some("") {
            "\"***\"".to_owned()
        } else {
            value.to_string()
        };
        let parsed = parse(&value).unwrap_or_else(|| {
            self.problems
                .push(format!("{key} = {shown} ({origin}): allowed is {allowed}"));
            match parse(default) {
                Some(value) => value,
                None => unreachable!("the default of {key} is not allowed"),
            }
        });
        self.effective.push((key.to_owned(), shown, origin));
        if value != *default {
            self.changed.insert(key.to_owned());
        }
        self.given
            .insert(key.to_owned(), Secret::new(value.to_string()));
        parsed
    }

    /// A key's environment variable; a secret's may name a file that holds it.
    pub(super) fn variable(&mut self, key: &str, display: Display) -> Option<String> {
        let name = variable_name(key);
        let file_name = format!("{name}_FILE");
        let set = |name: &String| {
            self.environment
                .get(name)
                .filter(|value| !value.is_empty())
                .cloned()
        };
        let value = set(&name);
        self.variables.insert(name.clone());
        if display == Display::Shown {
            return value;
        }
        self.variables.insert(file_name.clone());
        let Some(path) = set(&file_name) else {
            return value;
        };
        if value.is_some() {
            self.problems.push(format!(
                "{name} and {file_name} are both set: set one of them"
            ));
        }
        // Shows neither the path nor the content: either may be the secret, given by mistake.
        match std::fs::read_to_string(path) {
            Ok(text) if text.trim().is_empty() => self
                .problems
                .push(format!("{file_name}: the file is empty")),
            // Editors end a line; a secret may begin or end with a space.
            Ok(text) => {
                let line = text.strip_suffix('\n').unwrap_or(&text);
                return Some(line.strip_suffix('\r').unwrap_or(line).to_owned());
            }
            Err(error) => self
                .problems
                .push(format!("{file_name}: the file cannot be read: {error}")),
        }
        value
    }

    /// Every key that was read, in the order of the sections.
    pub(super) fn into_descriptions(self) -> Vec<KeyDescription> {
        self.described
    }

    /// Ends the reading of a few keys, whatever else there is.
    pub(super) fn finish_partly(self) -> Result<(), Problems> {
        Problems::into_result(self.problems)
    }

    /// Reports keys that no section has read: they do not exist. A variable of one of our sections
    /// is a misspelt key, unless it has the form of those that container runtimes set.
    pub(super) fn finish(mut self) -> Result<Values, Problems> {
        let sections: BTreeSet<_> = self
            .asked
            .iter()
            .filter_map(|key| key.split('.').next())
            .collect();
        let unknown = |section: &&str| !sections.contains(*section);
        for section in self.sections.iter().map(String::as_str).filter(unknown) {
            self.problems
                .push(Self::no_such_section(section, &sections));
        }
        let is_in_unknown_section = |key: &str| {
            let section = key.split(['.', '[']).next().unwrap_or(key);
            self.sections.contains(section) && !sections.contains(section)
        };
        for key in self
            .file
            .keys()
            .filter(|key| !self.asked.contains(key.as_str()) && !is_in_unknown_section(key))
        {
            let known = self.asked.iter().map(String::as_str);
            self.problems
                .push(no_such_key(key, nearest_name(key, known)));
        }
        let mut ignored_variables = Vec::new();
        for name in self
            .environment
            .keys()
            .filter(|name| !self.variables.contains(*name))
        {
            let Some(rest) = name
                .strip_prefix("PAYRELAY_")
                .filter(|_| !OTHER_VARIABLES.contains(&name.as_str()))
            else {
                continue;
            };
            let value = self.environment.get(name).map_or("", String::as_str);
            if value.is_empty() {
                continue;
            }
            let section = rest.split('_').next().unwrap_or("").to_lowercase();
            if sections.contains(section.as_str())
                && !Self::is_container_runtime_variable(name, value)
            {
                let known = self.variables.iter().map(String::as_str);
                self.problems
                    .push(no_such_key(name, nearest_name(name, known)));
            } else {
                ignored_variables.push(name.clone());
            }
        }
        if !self.problems.is_empty() {
            return Err(Problems::new(self.problems));
        }
        Ok(Values {
            effective: Self::render(&self.effective),
            ignored_variables,
            changed: self.changed,
            given: self.given,
        })
    }

    /// Names the section that was probably meant, or else all of them.
    fn no_such_section(section: &str, known: &BTreeSet<&str>) -> String {
        if let Some(known) = nearest_name(section, known.iter().copied()) {
            return format!("[{section}]: there is no such section; did you mean [{known}]?");
        }
        let all: Vec<_> = known.iter().map(|known| format!("[{known}]")).collect();
        format!(
            "[{section}]: there is no such section; the sections are {}",
            all.join(", ")
        )
    }

    /// Without the invalid line, which may hold a secret.
    fn not_toml(file: &str, error: &toml::de::Error) -> String {
        let before = error
            .span()
            .and_then(|span| file.get(..span.start))
            .unwrap_or("");
        format!(
            "not TOML: line {}: {}",
            before.matches('\n').count() + 1,
            error.message()
        )
    }

    /// The variables that Kubernetes sets for a service called payrelay-kafka, and Docker for a
    /// link (<https://kubernetes.io/docs/concepts/services-networking/service/>).
    fn is_container_runtime_variable(name: &str, value: &str) -> bool {
        let address = ["tcp://", "udp://", "sctp://"]
            .iter()
            .any(|scheme| value.starts_with(scheme));
        let numbered = |(_, rest): (&str, &str)| {
            let mut parts = rest.split('_');
            let number = parts.next().is_some_and(|part| part.parse::<u16>().is_ok());
            number
                && parts
                    .next()
                    .is_some_and(|part| ["TCP", "UDP", "SCTP"].contains(&part))
        };
        name.ends_with("_SERVICE_HOST")
            || name.ends_with("_SERVICE_PORT")
            || name.contains("_SERVICE_PORT_")
            || (name.ends_with("_PORT") && address)
            || name.rsplit_once("_PORT_").is_some_and(numbered)
            || name.split_once("_PORT_").is_some_and(numbered)
            || (name.ends_with("_NAME") && value.starts_with('/'))
            || name.contains("_ENV_")
    }

    /// Converts a variable's text to the type of the key.
    fn coerce_variable(text: String, default: &Value) -> Value {
        match default {
            Value::Integer(_) => text.parse().map_or(Value::String(text), Value::Integer),
            Value::Float(_) => text.parse().map_or(Value::String(text), Value::Float),
            Value::Array(_) => Value::from(text.split(',').map(str::trim).collect::<Vec<_>>()),
            _ => Value::String(text),
        }
    }

    fn render(effective: &[(String, String, &'static str)]) -> String {
        let mut text = String::new();
        let mut current = "";
        for (key, value, origin) in effective {
            let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
            if section != current {
                let gap = if current.is_empty() { "" } else { "\n" };
                let _ = match section.split_once('[') {
                    None => writeln!(text, "{gap}[{section}]"),
                    Some((array, _)) => writeln!(text, "{gap}[[{array}]]"),
                };
                current = section;
            }
            let _ = writeln!(text, "{name} = {value} # {origin}");
        }
        text
    }
}

fn no_such_key(key: &str, meant: Option<&str>) -> String {
    let advice = match meant {
        Some(meant) => format!("did you mean {meant}?"),
        None => "config.toml in the source lists them all".to_owned(),
    };
    format!("{key}: there is no such key; {advice}")
}
