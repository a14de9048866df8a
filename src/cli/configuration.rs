//! The configuration of a command: the file that the arguments or the environment name, and the
//! variables.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use payrelay::config::{Config, LoadedConfig, LocalConfig, Problems};

/// A configuration before it is checked.
struct RawConfiguration {
    file: Option<PathBuf>,
    text: String,
    variables: BTreeMap<String, String>,
}

impl RawConfiguration {
    /// Reads the file that `--config` or `PAYRELAY_CONFIG` names, else the first usual one.
    fn read(argument: Option<&Path>) -> Result<Self, Problems> {
        let variable = || {
            env::var_os("PAYRELAY_CONFIG")
                .filter(|path| !path.is_empty())
                .map(PathBuf::from)
        };
        let named = argument
            .map(|path| ("--config", path.to_owned()))
            .or_else(|| Some(("PAYRELAY_CONFIG", variable()?)));
        let found = match named {
            Some((origin, path)) => {
                let text = fs::read_to_string(&path).map_err(|error| {
                    let path = path.display();
                    Problems::single(format!("{origin} {path}: cannot be read: {error}"))
                })?;
                Some((path, text))
            }
            None => default_configuration_file()?,
        };
        let (file, text) = found.unzip();
        let variables =
            configuration_variables().map_err(|problems| problems.in_file(file.as_deref()))?;
        Ok(Self {
            file,
            text: text.unwrap_or_default(),
            variables,
        })
    }

    /// Reads some or all of its keys.
    fn load<T>(
        &self,
        load: impl FnOnce(&str, &BTreeMap<String, String>) -> Result<T, Problems>,
    ) -> Result<T, Problems> {
        load(&self.text, &self.variables).map_err(|problems| problems.in_file(self.file.as_deref()))
    }
}

/// Every key, checked.
pub(super) fn load_configuration(argument: Option<&Path>) -> Result<LoadedConfig, Problems> {
    let raw = RawConfiguration::read(argument)?;
    let mut loaded = raw.load(Config::load)?;
    loaded.file = raw.file;
    Ok(loaded)
}

/// Where payrelay's database and socket are; other keys may be wrong.
pub(super) fn load_local_configuration(argument: Option<&Path>) -> Result<LocalConfig, Problems> {
    RawConfiguration::read(argument)?.load(LocalConfig::load)
}

/// The address of the API; other keys may be wrong.
pub(super) fn load_listen_address(argument: Option<&Path>) -> Result<SocketAddr, Problems> {
    RawConfiguration::read(argument)?.load(LocalConfig::load_listen)
}

/// The name of the topic; other keys may be wrong.
pub(super) fn load_topic_name(argument: Option<&Path>) -> Result<String, Problems> {
    RawConfiguration::read(argument)?.load(LocalConfig::load_topic)
}

/// The first usual file that exists, and its text.
fn default_configuration_file() -> Result<Option<(PathBuf, String)>, Problems> {
    for path in ["config.toml", "/etc/payrelay/config.toml"] {
        match fs::read_to_string(path) {
            Ok(text) => return Ok(Some((PathBuf::from(path), text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Problems::single(format!("{path}: cannot be read: {error}"))),
        }
    }
    Ok(None)
}

/// The environment variables that begin with `PAYRELAY_`.
fn configuration_variables() -> Result<BTreeMap<String, String>, Problems> {
    let mut variables = BTreeMap::new();
    for (name, value) in env::vars_os() {
        let Ok(name) = name.into_string() else {
            continue;
        };
        if name.starts_with("PAYRELAY_") {
            let text = value
                .into_string()
                .map_err(|_| Problems::single(format!("{name}: is not UTF-8")))?;
            variables.insert(name, text);
        }
    }
    Ok(variables)
}
