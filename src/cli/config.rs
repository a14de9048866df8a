//! `payrelay config`: the effective configuration and the source of each value, and the schema of
//! the file.

use clap::Subcommand;
use payrelay::config::{LoadedConfig, config_schema};
use payrelay::service;

use super::exit_code;
use super::output::{Output, output_line, print_config_error};

#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Prints the effective configuration, secrets masked, and the source of each value
    Check,
    /// Prints the JSON Schema of the configuration file, for editors
    Schema,
}

/// Needs no configuration.
pub(super) fn run_config_schema() -> u8 {
    // Serializing our own types cannot fail.
    output_line(serde_json::to_string_pretty(&config_schema()).unwrap_or_default())
}

pub(super) fn run_check_config(loaded: &LoadedConfig) -> u8 {
    let mut output = Output::default();
    for line in describe_configuration(loaded) {
        output.line(line);
    }
    let code = match service::check_service_config(&loaded.config) {
        Ok(()) => exit_code::OK,
        Err(error) => print_config_error(error.in_file(loaded.file.as_deref())),
    };
    output.exit_code(code)
}

/// The effective configuration, without secrets; then what has no effect, and what is risky.
pub(super) fn describe_configuration(loaded: &LoadedConfig) -> Vec<String> {
    let file = loaded.file.as_ref();
    let mut lines: Vec<_> = file
        .map(|file| format!("# {}", file.display()))
        .into_iter()
        .collect();
    lines.push(loaded.effective().trim_end().to_owned());
    for name in loaded.ignored_variables() {
        lines.push(format!(
            "# ignored: the environment variable {name} names no key"
        ));
    }
    for warning in loaded.warnings() {
        lines.push(format!("# warning: {warning}"));
    }
    lines
}
