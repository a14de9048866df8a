//! No more threads, little memory: a refusal at the start, and no half-dead process later.

use std::fs;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt as _;
use std::thread;
use std::time::Duration;

use rusqlite::Connection;

use super::{Connecting, LIMIT, acknowledged, for_at_least, load, request, verify};
use testkit::child::KillOnDrop;
use testkit::hostile::Machine;
use testkit::kafka::Broker;
use testkit::process::{Options, Payrelay, run_to_exit};
use testkit::slack::{Answer, FakeSlack};
use testkit::{wait_for, wait_until};

const SIGABRT: i32 = 6;

#[test]
fn a_machine_without_capacity_for_threads_is_reported_at_the_start() {
    let machine = Machine::new();
    for threads in [1, 2, 3, 8, 12, 14] {
        machine.set("threads", &threads.to_string());
        let output = run_to_exit(machine.options(&[]));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            error.contains("the operating system starts no further thread"),
            "{threads}: {error}"
        );
        assert!(!error.contains("panic"), "{threads}: {error}");
        assert_eq!(output.status.code(), Some(75), "{threads}: {error}");
    }
    machine.set("threads", "40");
    let mut payrelay = Payrelay::start(machine.options(&[]));
    assert_eq!(
        Connecting::new(payrelay.addr())
            .post(&request(1, 1))
            .unwrap()
            .0,
        201
    );
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
}

#[test]
fn once_it_runs_no_thread_is_started_any_more() {
    let machine = Machine::new();
    let mut slack = FakeSlack::start();
    let (broker, mut proxy) = Broker::start_behind_proxy("4.4.0");
    let env = [
        ("PAYRELAY_PUBLISHER_KIND", "kafka"),
        // A name, so that it has to be resolved.
        (
            "PAYRELAY_KAFKA_BOOTSTRAP_SERVERS",
            &broker.bootstrap().replace("127.0.0.1", "localhost"),
        ),
        (
            "PAYRELAY_SLACK_WEBHOOK_URL",
            &slack.url().replace("127.0.0.1", "localhost"),
        ),
        ("PAYRELAY_SLACK_MESSAGES_PER_SECOND", "1000"),
        ("PAYRELAY_SLACK_SUMMARY_OVER", "0"),
        ("PAYRELAY_SCHEDULER_INTERVAL", "20ms"),
        ("PAYRELAY_SCHEDULER_RETENTION", "1ms"),
    ];
    let mut payrelay = Payrelay::start(machine.options(&env));
    machine.set("threads", "0");
    let answers = load(
        &machine,
        payrelay.addr(),
        32,
        for_at_least(Duration::from_secs(2)),
    );
    assert!(
        answers.refused.is_empty() && answers.lost == 0,
        "{}",
        payrelay.log()
    );
    // Slack and Kafka stop and restart: connections are made again.
    slack.stop();
    let more = load(
        &machine,
        payrelay.addr(),
        4,
        for_at_least(Duration::from_millis(300)),
    );
    payrelay.wait_for_log("Slack unavailable", LIMIT);
    proxy.cut();
    let more_yet = load(
        &machine,
        payrelay.addr(),
        4,
        for_at_least(Duration::from_millis(300)),
    );
    payrelay.wait_for_log("Kafka (publisher) unavailable", LIMIT);
    proxy.heal();
    slack.answer_with(|_, _| Answer::Ok);
    slack.start_again();
    let delivered = [&answers, &more, &more_yet]
        .iter()
        .map(|answers| answers.acknowledged.len())
        .sum();
    wait_until("every payment to be delivered", LIMIT * 2, || {
        slack.lines().len() >= delivered
    });
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    assert!(!payrelay.log().contains("panic"), "{}", payrelay.log());
}

/// Bodies that are never finished, each as large as may be, on this number of connections at once.
fn flood(address: SocketAddr, connections: usize) -> Vec<TcpStream> {
    let head = "POST /payments HTTP/1.1\r\nHost: x\r\nContent-Type: \
        application/json\r\nContent-Length: 262144\r\n\r\n";
    let bytes = [head.as_bytes(), &b" ".repeat(262_000)].concat();
    let open = |_| -> Option<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
        stream
            .set_write_timeout(Some(Duration::from_secs(2)))
            .ok()?;
        stream.write_all(&bytes).ok()?;
        Some(stream)
    };
    (0..connections).filter_map(open).collect()
}

/// Either it has lived through it, and answers within 5 s; or it has ended in a way that every
/// supervisor takes for a failure, and what was acknowledged is there at the next start.
#[test]
fn out_of_memory_it_answers_again_soon_or_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut survived = 0;
    let mut ended = 0;
    let mut refused = 0;
    let mut payments = Vec::new();
    // In KiB; some 75,000 is what it takes to start.
    for room in [90_000, 130_000, 200_000] {
        let log = || fs::read_to_string(dir.path().join(format!("log-{room}"))).unwrap_or_default();
        let mut command = KillOnDrop::command("sh");
        command.args([
            "-c",
            &format!("ulimit -v {room}; exec \"$0\" 2>log-{room}"),
            testkit::paths::binary().to_str().unwrap(),
        ]);
        command
            .current_dir(dir.path())
            .env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0");
        let mut process = KillOnDrop::spawn(command);
        let listening = || {
            log()
                .split_once("listening on http://")
                .map(|(_, rest)| rest.to_owned())
        };
        let start = wait_for("a payrelay that serves, or refuses", LIMIT, || {
            let address = listening().and_then(|rest| rest.lines().next()?.parse().ok());
            address.map(Ok).or_else(|| process.try_exit().map(Err))
        });
        let address = match start {
            Ok(address) => address,
            // How much the allocator reserves for each thread is a matter of timing.
            Err(status) => {
                assert!(
                    [Some(75), Some(78)].contains(&status.code())
                        || status.signal() == Some(SIGABRT),
                    "{status:?}: {}",
                    log()
                );
                refused += 1;
                continue;
            }
        };
        let first = 1000 * i64::from(room);
        let paid = Connecting::new(address).post(&request(first, 5));
        if let Ok((201, paid)) = &paid {
            payments.extend(acknowledged(paid, 0));
        } else {
            // What the start has left was not enough for a single payment: it says so and lives, or
            // has ended.
            let refused = paid.as_ref().is_ok_and(|(status, _)| *status == 503);
            assert!(refused || paid.is_err(), "{paid:?}\n{}", log());
            let lives = || {
                Connecting::new(address)
                    .get("/health/live")
                    .is_ok_and(|(status, _)| status == 200)
            };
            let exit = wait_for("an answer, or the end", LIMIT, || {
                process
                    .try_exit()
                    .map(Some)
                    .or_else(|| (refused && lives()).then_some(None))
            });
            assert!(
                exit.is_none_or(|status| status.signal() == Some(SIGABRT)),
                "{exit:?}: {}",
                log()
            );
            if exit.is_some() {
                ended += 1;
            } else {
                survived += 1;
            }
            continue;
        }
        let floods: Vec<_> = (0..4)
            .map(|_| thread::spawn(move || flood(address, 100)))
            .collect();
        drop(
            floods
                .into_iter()
                .map(|flood| flood.join().unwrap())
                .collect::<Vec<_>>(),
        );
        let mut next = (first + 100..).step_by(20);
        let exit = wait_for("an answer, or the end", Duration::from_secs(5), || {
            if let Some(status) = process.try_exit() {
                return Some(Some(status));
            }
            let (status, body) = Connecting::new(address)
                .post(&request(next.next()?, 1))
                .ok()?;
            payments.extend(
                (status == 201)
                    .then(|| acknowledged(&body, 0))
                    .into_iter()
                    .flatten(),
            );
            (status == 201).then_some(None)
        });
        match exit {
            None => survived += 1,
            Some(status) => {
                assert!(
                    status.signal() == Some(SIGABRT) || status.code() == Some(70),
                    "{status:?}: {}",
                    log()
                );
                ended += 1;
            }
        }
        drop(process);
    }
    eprintln!("survived {survived}, ended {ended}, refused at the start {refused}");
    assert!(survived + ended > 0, "it started with none of these");
    let mut payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    assert_eq!(payrelay.terminate().code(), Some(0), "{}", payrelay.log());
    verify(
        &Connection::open(dir.path().join("payrelay.db")).unwrap(),
        &payments,
    );
}
