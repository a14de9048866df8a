//! The metrics that every process exports: read from /proc at each scrape (proc(5)). Their names
//! are Prometheus' own
//! (<https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>).

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Reads the numbers of this process. A number that cannot be read is 0.
#[derive(Debug)]
pub(super) struct ProcessCollector;

/// What the kernel knows of this process.
#[derive(Debug, Default)]
struct ProcessNumbers {
    cpu_seconds: f64,
    resident_bytes: f64,
    threads: f64,
    start_seconds: f64,
    open_fds: f64,
    max_fds: f64,
}

impl ProcessNumbers {
    fn read() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The name of the command may have spaces, and ends with the last parenthesis.
        let fields: Vec<f64> = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest)
            .unwrap_or_default()
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0.0))
            .collect();
        // The fields that proc_pid_stat(5) numbers from 1; the third is the first here.
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0.0);
        let ticks = clock_ticks_per_second();
        Self {
            cpu_seconds: (field(14) + field(15)) / ticks,
            resident_bytes: field(24) * page_bytes(),
            threads: field(20),
            start_seconds: boot_seconds() + field(22) / ticks,
            open_fds: fs::read_dir("/proc/self/fd").map_or(0.0, |fds| count_as_float(fds.count())),
            max_fds: rustix::process::getrlimit(rustix::process::Resource::Nofile)
                .current
                .map_or(f64::INFINITY, |max| {
                    std::time::Duration::from_secs(max).as_secs_f64()
                }),
        }
    }
}

fn count_as_float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

fn clock_ticks_per_second() -> f64 {
    std::time::Duration::from_secs(rustix::param::clock_ticks_per_second()).as_secs_f64()
}

fn page_bytes() -> f64 {
    count_as_float(rustix::param::page_size())
}

/// When the machine was started, in seconds since 1970.
fn boot_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let time = stat.lines().find_map(|line| line.strip_prefix("btime "));
    time.and_then(|time| time.trim().parse().ok())
        .unwrap_or(0.0)
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let numbers = ProcessNumbers::read();
        encoder
            .encode_descriptor(
                "process_cpu_seconds",
                "Processor time of the process, user and system",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, f64>(&numbers.cpu_seconds, None)?;
        let gauges = [
            (
                "process_resident_memory_bytes",
                "Memory that the process holds",
                numbers.resident_bytes,
            ),
            (
                "process_open_fds",
                "Open file descriptors",
                numbers.open_fds,
            ),
            (
                "process_max_fds",
                "The most file descriptors that may be open",
                numbers.max_fds,
            ),
            (
                "process_start_time_seconds",
                "When the process started",
                numbers.start_seconds,
            ),
            ("process_threads", "Threads", numbers.threads),
        ];
        for (name, help, value) in gauges {
            encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_the_process_are_those_of_this_one() {
        let numbers = ProcessNumbers::read();
        assert!(numbers.resident_bytes > 1_000_000.0, "{numbers:?}");
        assert!(numbers.threads >= 1.0, "{numbers:?}");
        assert!(
            (3.0..numbers.max_fds).contains(&numbers.open_fds),
            "{numbers:?}"
        );
        let now = crate::domain::timestamp::Timestamp::now().as_seconds();
        let age = now - numbers.start_seconds;
        assert!((-2.0..86_400.0).contains(&age), "{numbers:?}");
    }
}
