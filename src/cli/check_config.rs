//! `payrelay check-config`: the effective configuration, and the source of each value.

use payrelay::config::LoadedConfig;
use payrelay::service;

use super::exit_code;
use super::output::{Output, print_config_error};

pub(super) fn run_check_config(loaded: &LoadedConfig) -> u8 {
    let mut output = Output::default();
    if let Some(file) = &loaded.file {
        output.line(format_args!("# {}", file.display()));
    }
    output.line(loaded.effective().trim_end());
    for name in loaded.ignored_variables() {
        output.line(format_args!(
            "# ignored: the environment variable {name} names no key"
        ));
    }
    for warning in loaded.warnings() {
        output.line(format_args!("# warning: {warning}"));
    }
    let code = match service::check_service_config(&loaded.config) {
        Ok(()) => exit_code::OK,
        Err(error) => print_config_error(error.in_file(loaded.file.as_deref())),
    };
    output.exit_code(code)
}
