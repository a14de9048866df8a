//! The example clients: a response is lost, and each repeats its request under its key.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use testkit::http::Client;
use testkit::maven;
use testkit::paths;
use testkit::process::{Options, Payrelay};
use testkit::proxy::Proxy;
use testkit::wait_until;

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

/// Compiles a Kotlin file, with the compiler as Maven brings it.
fn compile_kotlin(source: &Path, classes: &Path) -> String {
    let compiler =
        maven::dependencies("org.jetbrains.kotlin", "kotlin-compiler-embeddable", KOTLIN);
    let class_path = format!("{}/*", compiler.display());
    fs::create_dir_all(classes).unwrap();
    let output = Command::new("java")
        .args([
            "-cp",
            &class_path,
            "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
        ])
        .args(["-no-stdlib", "-no-reflect", "-Werror", "-jvm-target", "17"])
        .arg("-classpath")
        .arg(compiler.join(format!("kotlin-stdlib-{KOTLIN}.jar")))
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
    format!("{}:{class_path}", classes.display())
}

#[test]
fn the_kotlin_client_pays_once() {
    let classes = tempfile::tempdir().unwrap();
    let class_path = compile_kotlin(&example("PaymentClient.kt"), classes.path());
    let mut command = Command::new("java");
    command.args(["-cp", &class_path, "payrelay.example.PaymentClientKt"]);
    check_example("Kotlin", (&mut command, "1 2"));
}
