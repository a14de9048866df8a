//! The progress of a long command: a bar at a terminal, else a line every ten seconds, always on
//! standard error.

use std::io::{self, IsTerminal as _};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{is_quiet, print_note};
use super::table::{show_age, show_bytes};

/// A command that ends earlier shows no bar.
const FIRST: Duration = Duration::from_millis(500);

/// The interval of the bar.
const BAR_INTERVAL: Duration = Duration::from_millis(200);

/// The interval of the lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// How far a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Measure {
    Bytes {
        done: u64,
        total: u64,
    },
    Count {
        done: u64,
        total: u64,
    },
    /// Offsets of the topic.
    Offsets {
        done: u64,
        total: u64,
    },
    /// Checks of the database. They take very different times.
    Checks {
        done: u64,
        total: u64,
    },
    /// Only its time is known.
    Time,
}

impl Measure {
    fn parts(self) -> (u64, u64) {
        match self {
            Self::Bytes { done, total }
            | Self::Count { done, total }
            | Self::Offsets { done, total }
            | Self::Checks { done, total } => (done.min(total), total),
            Self::Time => (0, 0),
        }
    }

    /// The progress in words, after this time.
    fn describe(self, elapsed: Duration) -> String {
        let (done, total) = self.parts();
        let amount = match self {
            Self::Bytes { .. } => format!("{} of {}", show_bytes(done), show_bytes(total)),
            Self::Count { .. } => format!("{done} of {total}"),
            Self::Offsets { .. } => format!("{done} of {total} offsets"),
            Self::Checks { .. } => {
                return format!(
                    "database, {done} of {total} checks, {}",
                    Self::Time.describe(elapsed)
                );
            }
            Self::Time => return format!("{} so far", show_age(elapsed)),
        };
        let percent = (done * 100).checked_div(total).unwrap_or(0);
        let left = total - done;
        let rest = match u32::try_from(left * 1000 / done.max(1)) {
            Ok(thousandths) if done > 0 => {
                let rest = elapsed.saturating_mul(thousandths) / 1000;
                format!(", {} to go", show_age(Duration::from_secs(rest.as_secs())))
            }
            _ => String::new(),
        };
        let stage = if matches!(self, Self::Offsets { .. }) {
            "topic "
        } else {
            ""
        };
        format!("{stage}{percent} %, {amount}{rest}")
    }
}

/// Shows the progress until it is dropped.
pub(super) struct Progress {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Shows what `measure` returns. Without a thread nothing is shown, and the command works.
    pub(super) fn show(what: &'static str, measure: impl Fn() -> Measure + Send + 'static) -> Self {
        let (stop, stopped) = bounded(0);
        let thread = thread::Builder::new()
            .name("progress".to_owned())
            .spawn(move || {
                if is_quiet() {
                    // --quiet.
                } else if io::stderr().is_terminal() {
                    draw_bar(what, &measure, &stopped);
                } else {
                    print_lines(what, &measure, &stopped);
                }
            });
        Self {
            stop: Some(stop),
            thread: thread.ok(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether the command continues after this time.
fn continues_after(time: Duration, stopped: &Receiver<()>) -> bool {
    stopped
        .recv_timeout(time)
        .is_err_and(|error| error.is_timeout())
}

fn draw_bar(what: &'static str, measure: &impl Fn() -> Measure, stopped: &Receiver<()>) {
    let begun = Instant::now();
    if !continues_after(FIRST, stopped) {
        return;
    }
    let target = ProgressDrawTarget::stderr();
    let bar = ProgressBar::with_draw_target(Some(0), target).with_message(what);
    // The template is our own, and valid.
    if let Ok(style) = ProgressStyle::with_template("{msg}: {prefix} {wide_bar}") {
        bar.set_style(style);
    }
    loop {
        let measured = measure();
        let (done, total) = measured.parts();
        bar.set_length(total);
        bar.set_position(done);
        bar.set_prefix(measured.describe(begun.elapsed()));
        if !continues_after(BAR_INTERVAL, stopped) {
            return bar.finish_and_clear();
        }
    }
}

fn print_lines(what: &'static str, measure: &impl Fn() -> Measure, stopped: &Receiver<()>) {
    let begun = Instant::now();
    while continues_after(LINE_INTERVAL, stopped) {
        print_note(&format!("{what}: {}", measure().describe(begun.elapsed())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    #[test]
    fn progress_says_how_much_is_done_and_how_long_the_rest_takes() {
        let elapsed = Duration::from_secs(20);
        let bytes = Measure::Bytes {
            done: 1 << 20,
            total: 4 << 20,
        };
        assert_eq!(
            bytes.describe(elapsed),
            "25 %, 1.0 MiB of 4.0 MiB, 1 m to go"
        );
        let count = |done, total| Measure::Count { done, total }.describe(elapsed);
        assert_eq!(count(0, 9), "0 %, 0 of 9");
        assert_eq!(count(9, 9), "100 %, 9 of 9, 0 s to go");
        assert_eq!(count(12, 9), "100 %, 9 of 9, 0 s to go");
        assert_eq!(count(0, 0), "0 %, 0 of 0");
        assert_eq!(Measure::Time.describe(elapsed), "20 s so far");
        let offsets = Measure::Offsets {
            done: 2000,
            total: 5000,
        };
        let expected = "topic 40 %, 2000 of 5000 offsets, 30 s to go";
        assert_eq!(offsets.describe(elapsed), expected);
        let checks = Measure::Checks { done: 7, total: 27 };
        assert_eq!(
            checks.describe(elapsed),
            "database, 7 of 27 checks, 20 s so far"
        );
    }

    #[test]
    fn a_short_command_shows_no_progress() {
        let asked = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&asked);
        drop(Progress::show("test", move || {
            counted.fetch_add(1, Relaxed);
            Measure::Time
        }));
        assert_eq!(asked.load(Relaxed), 0);
    }
}
