//! The example clients: a response is lost, and each repeats its request under its key.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use testkit::child::KillOnDrop;
use testkit::http::Client;
use testkit::kafka::Broker;
use testkit::maven;
use testkit::paths;
use testkit::pipeline::{Pipeline, TOPIC};
use testkit::process::{Options, Payrelay};
use testkit::proxy::Proxy;
use testkit::{wait_for, wait_until};

use super::report::Report;

const LIMIT: Duration = Duration::from_mins(1);

const KOTLIN: &str = "2.2.20";

/// What a client prints for the payments 1 and 2.
type Example<'a> = (&'a mut Command, &'a str);

/// Pays two reservations with an example, whose first response is lost.
fn check_example(name: &str, (command, printed): Example<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let payrelay = Payrelay::start(Options::new(dir.path(), &[]));
    let mut client = Client::connect(payrelay.addr());
    let mut proxy = Proxy::start(payrelay.addr().to_string());
    proxy.slow(Duration::from_millis(300));
    let url = format!("http://{}", proxy.address());
    let arguments = [url.as_str(), "42", "1001:150000", "1002:120000"];
    let example: Child = command
        .args(arguments)
        .env("ORDER_KEY", "order-17")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the payment", LIMIT, || {
        client.get("/payments/2").status == 200
    });
    // The response has not arrived yet.
    proxy.cut();
    proxy.heal();
    let output = example.wait_with_output().unwrap();
    assert!(output.status.success(), "{name}: {output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.trim(), printed, "{name}");
    assert_eq!(client.get("/payments/3").status, 404, "{name}: paid once");
    // The same order again, as after a restart of the shop.
    let again = command.output().unwrap();
    assert_eq!(again.stdout, output.stdout, "{name}");
    assert_eq!(client.get("/payments/3").status, 404, "{name}: paid once");
    // Another order under the same key is refused, and not repeated.
    let other = command.arg("1003:1").output().unwrap();
    assert_eq!(other.status.code(), Some(1), "{name}: {other:?}");
    let mut report = Report::new(
        &format!("example-{name}"),
        &format!("The {name} client of examples/, whose first response is lost."),
    );
    report.add("payments stored", 2);
    report.finish();
}

fn example(name: &str) -> PathBuf {
    paths::repository().join("examples").join(name)
}

#[test]
fn the_python_client_pays_once() {
    let mut command = Command::new("python3");
    command.arg(example("payment_client.py"));
    let printed = "1 1001 COMPLETED\n2 1002 COMPLETED";
    check_example("Python", (&mut command, printed));
}

/// Compiles a Kotlin file with these jars, by the compiler as Maven brings it.
fn compile_kotlin(source: &Path, jars: &[PathBuf], classes: &Path) -> String {
    let compiler =
        maven::dependencies(&[("org.jetbrains.kotlin", "kotlin-compiler-embeddable", KOTLIN)]);
    let class_path = format!("{}/*", compiler.display());
    let standard = compiler.join(format!("kotlin-stdlib-{KOTLIN}.jar"));
    let libraries: Vec<String> = [&[standard], jars]
        .concat()
        .iter()
        .map(|jar| jar.display().to_string())
        .collect();
    fs::create_dir_all(classes).unwrap();
    let output = Command::new("java")
        .args([
            "-cp",
            &class_path,
            "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
        ])
        .args(["-no-stdlib", "-no-reflect", "-Werror", "-jvm-target", "17"])
        .arg("-classpath")
        .arg(libraries.join(":"))
        .arg("-d")
        .arg(classes)
        .arg(source)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    format!("{}:{}", classes.display(), libraries.join(":"))
}

#[test]
fn the_kotlin_client_pays_once() {
    let classes = tempfile::tempdir().unwrap();
    let class_path = compile_kotlin(&example("PaymentClient.kt"), &[], classes.path());
    let mut command = Command::new("java");
    command.args(["-cp", &class_path, "payrelay.example.PaymentClientKt"]);
    check_example("Kotlin", (&mut command, "1 2"));
}

/// Starts payrelay with JSON, and an example that reads the topic twice: the second time from the
/// beginning, where it knows every event.
fn check_consumer(name: &str, start: impl Fn(&str, &Path) -> Command) {
    let broker = Broker::start("4.4.0");
    let pipeline = Pipeline::new(broker.bootstrap());
    let payrelay = pipeline.start_with(&[("PAYRELAY_KAFKA_FORMAT", "json")]);
    let mut client = Client::connect(payrelay.addr());
    let large = json!([{"reservation_id": 1001, "seat_price": i64::MAX}]);
    let body = json!({"user_id": 42, "reservations": large});
    // The second payment fails.
    for _ in 0..2 {
        assert_eq!(client.post_json("/payments", &body).status, 201);
    }
    let node = client.get("/payments/1").json()["event"]["id"].clone();
    let node = node.as_str().unwrap().trim_end_matches("-1").to_owned();
    let dir = tempfile::tempdir().unwrap();
    let expected = [
        format!("{node}-1 COMPLETED {} KRW", i64::MAX),
        format!("{node}-2 FAILED {} KRW", i64::MAX),
    ];
    let read = |count: usize, offset_reset: bool| {
        if offset_reset {
            testkit::topic::commit(&broker.bootstrap(), "payment-report", TOPIC, 0);
        }
        let mut command = start(&broker.bootstrap(), dir.path());
        let output = dir.path().join("output");
        command.stdout(File::create(&output).unwrap());
        let mut example = KillOnDrop::spawn(command);
        let shown = wait_for("the events", LIMIT, || {
            assert!(example.try_exit().is_none(), "{name} has ended");
            let text = fs::read_to_string(&output).unwrap();
            (text.lines().count() >= count).then_some(text)
        });
        example.terminate(LIMIT);
        shown.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(read(2, false), expected, "{name}");
    let body = json!({"user_id": 7, "reservations": [{"reservation_id": 7, "seat_price": 1}]});
    assert_eq!(client.post_json("/payments", &body).status, 201);
    let third = format!("{node}-3 COMPLETED 1 KRW");
    assert_eq!(read(1, true), [third], "{name} knows the first two");
    let mut report = Report::new(
        &format!("example-{name}"),
        &format!("The {name} example reads a topic of a real Kafka twice, each payment once."),
    );
    report.add("payments", 3);
    report.finish();
}

#[test]
fn the_spring_listener_reads_each_payment_once() {
    let jars = maven::dependencies(&[
        ("org.springframework.kafka", "spring-kafka", "4.1.2"),
        ("org.springframework", "spring-jdbc", "7.0.10"),
        ("tools.jackson.core", "jackson-databind", "3.1.7"),
        ("org.xerial", "sqlite-jdbc", "3.53.4.0"),
        ("org.slf4j", "slf4j-simple", "2.0.17"),
    ]);
    let jars: Vec<PathBuf> = fs::read_dir(jars)
        .unwrap()
        .map(|jar| jar.unwrap().path())
        .collect();
    let classes = tempfile::tempdir().unwrap();
    let class_path = compile_kotlin(&example("PaymentListener.kt"), &jars, classes.path());
    check_consumer("Spring", |bootstrap, dir| {
        let mut command = KillOnDrop::command("java");
        command.arg("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn");
        command.args(["-cp", &class_path, "payrelay.example.PaymentListenerKt"]);
        let database = format!("jdbc:sqlite:{}/report.db", dir.display());
        command.env("BOOTSTRAP_SERVERS", bootstrap);
        command.env("DATABASE_URL", database);
        command
    });
}

/// The library comes from `PyPI`, into a folder of its own.
fn python_with_kafka() -> PathBuf {
    let folder = paths::target().join("tools/python-kafka");
    let python = folder.join("bin/python3");
    if !python.exists() {
        for (program, arguments) in [
            ("python3", vec!["-m", "venv", folder.to_str().unwrap()]),
            (
                python.to_str().unwrap(),
                vec!["-m", "pip", "install", "-q", "confluent-kafka==2.16.1"],
            ),
        ] {
            let status = Command::new(program).args(arguments).status().unwrap();
            assert!(status.success(), "python3-venv is needed");
        }
    }
    python
}

#[test]
fn the_python_consumer_reads_each_payment_once() {
    let python = python_with_kafka();
    check_consumer("Python-consumer", |bootstrap, dir| {
        let mut command = KillOnDrop::command(&python);
        command.arg(example("consumer.py")).arg(bootstrap);
        command.arg(dir.join("seen.db"));
        command
    });
}
