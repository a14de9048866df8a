//! The log on standard error. No thread waits for it: lines go into a bounded queue, and one thread
//! writes them.
//!
//! The reader of standard error may stop reading, and a pipe holds 64 KiB. Then the queue fills,
//! further lines are dropped and counted, and the log says how many once it can be written again.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, panic, thread};

use super::log_format::LineFormat;
use env_logger::{Builder, Logger, Target};
use log::{LevelFilter, Log, Metadata, Record};
use payrelay::config::Problems;
use payrelay::runtime::metrics::count_log_line;
use payrelay::runtime::plural::counted;

/// How many bytes of lines wait at most.
const QUEUE_BYTES_MAX: usize = 1024 * 1024;

/// How long the end of the process waits for lines that are still to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Lines that wait for standard error.
#[derive(Default)]
struct LogQueue {
    state: Mutex<LogQueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct LogQueueState {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: u64,
    /// The thread is writing the lines that it removed last.
    writing: bool,
}

impl LogQueue {
    fn push(&self, line: Vec<u8>) {
        let mut state = self.lock();
        if state.bytes + line.len() > QUEUE_BYTES_MAX {
            state.dropped += 1;
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line);
        drop(state);
        self.changed.notify_all();
    }

    fn write_to(&self, mut out: impl Write, format: LineFormat) {
        loop {
            let mut state = self.lock();
            state.writing = false;
            self.changed.notify_all();
            while state.lines.is_empty() {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let mut text = Vec::with_capacity(state.bytes);
            for line in state.lines.drain(..) {
                text.extend_from_slice(&line);
            }
            state.bytes = 0;
            let dropped = std::mem::take(&mut state.dropped);
            state.writing = true;
            drop(state);
            // Nothing can be done about a standard error that is closed.
            let _ = out.write_all(&text);
            if dropped > 0 {
                let message = format!(
                    "dropped {} of the log: standard error was not read",
                    counted(dropped, "line")
                );
                let _ = format.write_dropped(&mut out, dropped, &message);
            }
        }
    }

    fn flush(&self) {
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        let mut state = self.lock();
        while !state.lines.is_empty() || state.writing {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return;
            };
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, LogQueueState> {
        // The queue is whole whenever the lock is free: a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Receives each formatted line.
struct LogInput(Arc<LogQueue>);

impl Write for LogInput {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct LogQueueLogger {
    format: Logger,
    queue: Arc<LogQueue>,
}

impl Log for LogQueueLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.format.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.format.matches(record) {
            count_log_line(record.level());
        }
        self.format.log(record);
    }

    /// Waits for the queued lines, at most `FLUSH_TIMEOUT`.
    fn flush(&self) {
        self.queue.flush();
    }
}

/// Starts the thread that writes the lines, and logs panics. Lines of libraries are shown from
/// warnings on: below that level they could show a secret, such as the URL of a webhook.
pub(super) fn start_logger(level: LevelFilter, format: LineFormat) -> io::Result<()> {
    let queue = Arc::new(LogQueue::default());
    // Not through std's handle: its lock would be held while the pipe is full.
    let out = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    thread::Builder::new().name("log".to_owned()).spawn({
        let queue = Arc::clone(&queue);
        move || queue.write_to(out, format)
    })?;
    let logger = Builder::new()
        .filter_level(level.min(LevelFilter::Warn))
        .filter_module("payrelay", level)
        .target(Target::Pipe(Box::new(LogInput(Arc::clone(&queue)))))
        .format(move |out, record| format.write(out, record))
        .build();
    log::set_max_level(logger.filter());
    let logger = LogQueueLogger {
        format: logger,
        queue,
    };
    log::set_boxed_logger(Box::new(logger)).map_err(io::Error::other)?;
    panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        log::error!(
            event = "panic";
            "panic in thread {}: {panic}",
            thread.name().unwrap_or("without a name")
        );
    }));
    Ok(())
}

/// The level that `PAYRELAY_LOG` names; info without it.
pub(super) fn configured_log_level() -> Result<LevelFilter, Problems> {
    let text = env::var("PAYRELAY_LOG")
        .ok()
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| "info".to_owned());
    text.parse().map_err(|_| {
        Problems::single(format!(
            "PAYRELAY_LOG = {text:?}: allowed is error, warn, info, debug, trace or off"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use payrelay::config::LogFormat;
    use std::sync::mpsc::{Sender, channel};

    /// A writer that blocks until the gate is opened.
    struct Gate {
        opened: Arc<(Mutex<bool>, Condvar)>,
        written: Sender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut opened = self.opened.0.lock().unwrap();
            while !*opened {
                opened = self.opened.1.wait(opened).unwrap();
            }
            self.written.send(bytes.to_vec()).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_blocked_log_output_blocks_no_writer_and_dropped_lines_are_counted() {
        let queue = Arc::new(LogQueue::default());
        let opened = Arc::new((Mutex::new(false), Condvar::new()));
        let (written, lines) = channel();
        let gate = Gate {
            opened: Arc::clone(&opened),
            written,
        };
        thread::spawn({
            let queue = Arc::clone(&queue);
            move || queue.write_to(gate, LineFormat::new(LogFormat::Text))
        });
        let mut input = LogInput(Arc::clone(&queue));
        let line = [b'x'; 1000];
        for _ in 0..5000 {
            input.write_all(&line).unwrap();
        }
        let started = Instant::now();
        queue.flush();
        assert!(
            started.elapsed() < 10 * FLUSH_TIMEOUT,
            "{:?}",
            started.elapsed()
        );
        *opened.0.lock().unwrap() = true;
        opened.1.notify_all();
        let mut text = String::new();
        while !text.contains("standard error was not read\n") {
            text +=
                &String::from_utf8(lines.recv_timeout(Duration::from_secs(10)).unwrap()).unwrap();
        }
        let dropped = text
            .matches(" of the log: standard error was not read\n")
            .count();
        assert_eq!(dropped, 1, "{}", &text[text.len().saturating_sub(100)..]);
    }
}
