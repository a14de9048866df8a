//! More than can be held: requests are refused at once, or accepted and answered in bounded time.
//! Memory does not grow, for as long as it lasts.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testkit::bench::cost::rss_mb;
use testkit::bench::load::{self, Outcome, Since, payment};
use testkit::bench::{Figure, Goal, Plan, Table, folder, start_without_kafka};
use testkit::process::Payrelay;

/// Longer than of other benchmarks: 256 connections.
const WARM_UP: Duration = Duration::from_secs(1);

/// Open loop needs enough connections for all requests in progress.
const CONNECTIONS: u64 = 2000;

/// Reservations of a request: with one, the clients on the same two cores could not ask for
/// twice what is held.
const EACH: u64 = 10;

fn request(run: u64) -> impl Fn(&mut Vec<u8>, u64) + 'static {
    let base = (run + 1) << 40;
    move |out, number| payment(out, number % 1000, base + number * EACH, EACH)
}

/// As much as 256 connections can: requests a second.
fn held(payrelay: &Payrelay, span: Duration, run: u64) -> f64 {
    load::closed(payrelay.addr(), 256, (WARM_UP, span), 201, request(run)).rate()
}

/// This number of requests a second, whatever the responses; no client waits for `Retry-After`.
fn press(payrelay: &Payrelay, rate: f64, span: Duration, run: u64) -> Outcome {
    load::paced(
        payrelay.addr(),
        CONNECTIONS,
        rate,
        (span, Since::Sent),
        request(run),
    )
}

/// Memory once a second while `work` is done.
fn sampled(payrelay: &Payrelay, work: impl FnOnce()) -> Vec<f64> {
    let pid = payrelay.pid();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut samples = Vec::new();
            while !done.load(Ordering::Relaxed) {
                samples.push(rss_mb(pid));
                thread::park_timeout(Duration::from_secs(1));
            }
            samples
        });
        work();
        done.store(true, Ordering::Relaxed);
        sampler.thread().unpark();
        sampler.join().unwrap()
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// As many descriptors as the machine allows.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

#[derive(Default)]
struct Figures {
    held: Figure,
    offered: Figure,
    accepted: Figure,
    p99: Figure,
    refused_p99: Figure,
}

impl Figures {
    fn measure(&mut self, plan: Plan, run: u64) {
        let dir = folder();
        let payrelay = start_without_kafka(dir.path(), &[]);
        let held = held(&payrelay, plan.span, 2 * run);
        let mut over = press(&payrelay, 2.0 * held, plan.span, 2 * run + 1);
        let offered = (over.good + over.other) as f64 / over.elapsed.as_secs_f64();
        self.held.0.push(held);
        self.offered.0.push(offered);
        self.accepted.0.push(over.rate());
        self.p99.0.push(over.percentile(99.0));
        self.refused_p99.0.push(over.other_percentile(99.0));
    }

    fn add_rows(self, table: &mut Table) {
        table.row(
            format!("held: requests of {EACH} reservations, 256 connections"),
            "/s",
            self.held.clone(),
            Goal::None,
        );
        table.against(
            format!("asked, from {CONNECTIONS} connections"),
            "/s",
            self.offered,
            ("held", self.held.clone()),
            Goal::None,
        );
        table.against(
            "of these accepted",
            "/s",
            self.accepted,
            ("held", self.held),
            Goal::None,
        );
        let name = "answer to what is accepted, p99";
        table.row(name, "ms", self.p99, Goal::None);
        table.row("refusal (503), p99", "ms", self.refused_p99, Goal::None);
    }
}

/// Memory, once a second, while more is asked than is held for this long.
fn memory_under_overload(rate: f64, long: Duration) -> Vec<f64> {
    let dir = folder();
    let payrelay = start_without_kafka(dir.path(), &[]);
    let started = Instant::now();
    sampled(&payrelay, || {
        // In pieces, so that the latencies of ten minutes need not be kept.
        let mut piece = 0;
        while started.elapsed() < long {
            press(&payrelay, rate, Duration::from_secs(10), 100 + piece);
            piece += 1;
        }
    })
}

fn main() {
    let plan = Plan::from_args();
    raise_descriptor_limit();
    let mut figures = Figures::default();
    for run in 0..plan.runs as u64 {
        figures.measure(plan, run);
    }
    let long = Duration::from_secs(if plan.quick { 20 } else { 600 });
    let samples = memory_under_overload(2.0 * figures.held.median(), long);
    let tenth = (samples.len() / 10).max(1);
    let first = mean(&samples[tenth..2 * tenth]);
    let last = mean(&samples[samples.len() - tenth..]);

    let mut table = Table::new("overload");
    figures.add_rows(&mut table);
    let name = format!("memory in the last tenth of {} s of this", long.as_secs());
    table.against(
        name,
        "MB",
        Figure(vec![last]),
        ("second tenth", Figure(vec![first])),
        Goal::RatioAtMost(1.1),
    );
    table.finish();
}
