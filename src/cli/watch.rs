//! `--watch`: repeats a command's answer until it is interrupted.

use std::time::Duration;

use clap::Args;

use super::output::Output;

#[derive(Args, Default)]
pub(super) struct Watch {
    /// Repeats until it is interrupted, every 2 s or after this many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

impl Watch {
    /// Shows the answer once, or repeatedly. Between two answers the screen is cleared, except
    /// where a program reads them.
    pub(super) fn repeat(
        &self,
        is_json: bool,
        mut show: impl FnMut(&mut Output) -> Result<u8, u8>,
    ) -> u8 {
        let mut output = Output::default();
        loop {
            let shown = show(&mut output);
            let (Ok(code) | Err(code)) = shown;
            let Some(seconds) = self.watch else {
                return output.exit_code(code);
            };
            let _ = crossbeam_channel::after(Duration::from_secs(seconds)).recv();
            if !output.is_open() || !is_json && !output.next_screen() {
                return output.exit_code(code);
            }
        }
    }
}
