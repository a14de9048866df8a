//! The resources of a process, from Linux's /proc.

use std::fs;

/// What a process has used since it started.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// On all cores.
    pub cpu_s: f64,
    pub rss_max_mb: f64,
    pub threads: u64,
}

pub fn usage(pid: u32) -> Usage {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    // The name in brackets may hold spaces; user and system time are the 14th and 15th field
    // (proc_pid_stat(5)).
    let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|text| text.parse::<u64>().unwrap_or(0))
        .sum();
    // A tick is a hundredth of a second on every common Linux.
    let cpu_s = ticks as f64 / 100.0;
    Usage {
        cpu_s,
        rss_max_mb: status(pid, "VmHWM") * 1024.0 / 1e6,
        threads: status(pid, "Threads") as u64,
    }
}

/// Memory now, in millions of bytes.
pub fn rss_mb(pid: u32) -> f64 {
    status(pid, "VmRSS") * 1024.0 / 1e6
}

fn status(pid: u32, name: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .expect("Linux reports it");
    line.split_whitespace()
        .next()
        .and_then(|number| number.parse().ok())
        .expect("a number")
}
