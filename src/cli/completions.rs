//! `payrelay completions` and `payrelay man`, from the definition of the command line.

use std::path::PathBuf;
use std::{fs, io};

use clap::{Args, Command};
use clap_complete::Shell;

use super::exit_code;
use super::output::{output_line, print_error};

#[derive(Args)]
pub(super) struct CompletionsCommand {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

#[derive(Args)]
pub(super) struct ManCommand {
    /// The folder of the pages, created if missing
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

impl CompletionsCommand {
    pub(super) fn run(&self, command: &mut Command) -> u8 {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "payrelay", &mut script);
        output_line(String::from_utf8_lossy(&script).trim_end())
    }
}

impl ManCommand {
    pub(super) fn run(&self, command: Command) -> u8 {
        match self.write(command) {
            Ok(()) => output_line(format_args!("{}", self.dir.display())),
            Err(error) => {
                print_error(format_args!("{}: {error}", self.dir.display()));
                exit_code::OUTPUT_FAILED
            }
        }
    }

    fn write(&self, command: Command) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        clap_mangen::generate_to(command, &self.dir)
    }
}
