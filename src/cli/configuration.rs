//! The configuration of a command: the file that the arguments or the environment name, and the
//! variables.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use payrelay::config::{Config, LoadedConfig, Problems};

/// Reads the file that `--config` or `PAYRELAY_CONFIG` names, else the first usual one.
pub(super) fn load_configuration(argument: Option<&Path>) -> Result<LoadedConfig, Problems> {
    let variable = || {
        env::var_os("PAYRELAY_CONFIG")
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    };
    let named = argument
        .map(|path| ("--config", path.to_owned()))
        .or_else(|| Some(("PAYRELAY_CONFIG", variable()?)));
    let file = match named {
        Some((origin, path)) => {
            let text = fs::read_to_string(&path).map_err(|error| {
                let path = path.display();
                Problems::single(format!("{origin} {path}: cannot be read: {error}"))
            })?;
            Some((path, text))
        }
        None => default_configuration_file()?,
    };
    let (path, text) = file.unzip();
    let text = text.unwrap_or_default();
    match configuration_variables().and_then(|variables| Config::load(&text, &variables)) {
        Ok(mut loaded) => {
            loaded.file = path;
            Ok(loaded)
        }
        Err(problems) => Err(problems.in_file(path.as_deref())),
    }
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
