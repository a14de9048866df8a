//! More than can be held: requests are refused at once, or accepted and answered in bounded
//! time, and memory does not grow, for as long as it lasts.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![expect(clippy::cast_precision_loss, reason = "figures are small")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testkit::bench::cost::rss_mb;
use testkit::bench::load::{self, Outcome, Since, payment};
use testkit::bench::{Figure, Goal, Plan, Table, folder};
use testkit::process::{Options, Payrelay};

const WARM_UP: Duration = Duration::from_secs(1);

/// Open loop needs enough connections for all requests that are under way.
const CONNECTIONS: u64 = 2000;

/// Reservations of a request: with one, the clients on the same two cores could not ask for
/// twice what is held.
const EACH: u64 = 10;

/// Kafka is unavailable: only the intake works.
fn start(dir: &Path) -> Payrelay {
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        ("PAYRELAY_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1"),
    ];
    Payrelay::start(Options::new(dir, &env))
}

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
    let (pid, done) = (payrelay.pid(), AtomicBool::new(false));
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

fn main() {
    let plan = Plan::from_args();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )
    .unwrap();
    let mut figures: [Figure; 5] = Default::default();
    for run in 0..plan.runs as u64 {
        let dir = folder();
        let payrelay = start(dir.path());
        let held = held(&payrelay, plan.span, 2 * run);
        let mut over = press(&payrelay, 2.0 * held, plan.span, 2 * run + 1);
        let offered = (over.good + over.other) as f64 / over.elapsed.as_secs_f64();
        let values = [
            held,
            offered,
            over.rate(),
            over.percentile(99.0),
            over.other_percentile(99.0),
        ];
        for (figure, value) in figures.iter_mut().zip(values) {
            figure.0.push(value);
        }
    }
    let long = Duration::from_secs(if plan.quick { 20 } else { 600 });
    let rate = 2.0 * figures[0].median();
    let dir = folder();
    let payrelay = start(dir.path());
    let started = Instant::now();
    let samples = sampled(&payrelay, || {
        // In pieces, so that the latencies of ten minutes need not be kept.
        let mut piece = 0;
        while started.elapsed() < long {
            press(&payrelay, rate, Duration::from_secs(10), 100 + piece);
            piece += 1;
        }
    });
    let tenth = (samples.len() / 10).max(1);
    let (first, last) = (
        mean(&samples[tenth..2 * tenth]),
        mean(&samples[samples.len() - tenth..]),
    );
    let [held, offered, accepted, p99, refused_p99] = figures;
    let mut table = Table::new("overload");
    table.row(
        format!("held: requests of {EACH} reservations, 256 connections"),
        "/s",
        held.clone(),
        Goal::None,
    );
    table.against(
        format!("asked, from {CONNECTIONS} connections"),
        "/s",
        offered,
        ("held", held.clone()),
        Goal::None,
    );
    table.against(
        "of these accepted",
        "/s",
        accepted,
        ("held", held),
        Goal::None,
    );
    table.row("answer to what is accepted, p99", "ms", p99, Goal::None);
    table.row("refusal (503), p99", "ms", refused_p99, Goal::None);
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
