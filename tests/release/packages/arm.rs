//! The packages for ARM, emulated by qemu: the unit tests, and a payment.

use std::path::Path;
use std::process::Command;

use testkit::child::{KillOnDrop, without_configuration};
use testkit::http::{Client, pay};
use testkit::paths;

use super::machine::Service;
use super::{build_package, printed, run};
use crate::report::Report;

/// An architecture of Debian.
struct Architecture {
    debian: &'static str,
    rust: &'static str,
    /// The prefix of its compiler, and of its libraries in /usr.
    gnu: &'static str,
    emulator: &'static str,
}

const ARM64: Architecture = Architecture {
    debian: "arm64",
    rust: "aarch64-unknown-linux-gnu",
    gnu: "aarch64-linux-gnu",
    emulator: "qemu-aarch64-static",
};

const ARMHF: Architecture = Architecture {
    debian: "armhf",
    rust: "armv7-unknown-linux-gnueabihf",
    gnu: "arm-linux-gnueabihf",
    emulator: "qemu-arm-static",
};

impl Architecture {
    fn libraries(&self) -> String {
        format!("/usr/{}", self.gnu)
    }

    /// Runs the unit tests, with few cases of the random ones. Returns how many passed. Left out is
    /// the one that reads /proc/self/stat: qemu fills it with zeros.
    fn run_unit_tests(&self) -> String {
        let cargo = format!(
            "CARGO_TARGET_{}",
            self.rust.to_uppercase().replace('-', "_")
        );
        let runner = format!("{} -L {}", self.emulator, self.libraries());
        let mut command = Command::new("cargo");
        let output = without_configuration(&mut command)
            .args(["test", "--lib", "--target", self.rust, "--"])
            .args(["--skip", "the_numbers_of_the_process"])
            .current_dir(paths::repository())
            .env("CARGO_TARGET_DIR", paths::target())
            .env(format!("{cargo}_LINKER"), format!("{}-gcc", self.gnu))
            .env(format!("{cargo}_RUNNER"), runner)
            .env("PAYRELAY_FUZZ_CASES", "100")
            .env("PROPTEST_CASES", "16")
            .output()
            .unwrap();
        let text = printed(&output);
        assert!(output.status.success(), "{text}");
        let (_, counts) = text.split_once("test result: ok. ").unwrap();
        counts.split(';').next().unwrap().to_owned()
    }

    /// Runs the program of the package.
    fn run_package(&self, dir: &Path) -> String {
        let package = build_package(&["deb", self.debian]);
        let [from, to] = [&package, dir].map(|path| path.to_str().unwrap());
        run("dpkg-deb", &["-x", from, to]);
        let program = dir.join("usr/bin/payrelay");
        let program = program.to_str().unwrap();
        let emulate = |command: &mut Command| {
            command.args(["-L", &self.libraries(), program]);
            command.current_dir(dir);
            command.env("PAYRELAY_HTTP_LISTEN", "127.0.0.1:0");
        };
        let mut command = KillOnDrop::command(self.emulator);
        emulate(&mut command);
        let service = Service::start(command, &dir.join("log"));
        let mut client = Client::connect(service.address);
        assert_eq!(pay(&mut client, 42, 1001..2001).len(), 1000);
        let mut command = Command::new(self.emulator);
        emulate(without_configuration(&mut command));
        let shown = printed(&command.args(["payment", "1000"]).output().unwrap());
        assert!(shown.contains("2000"), "{shown}");
        service.stop();
        run("file", &["-b", program])
    }

    fn check(&self) {
        let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
        let kind = self.run_package(dir.path());
        let mut report = Report::new(
            &format!("debian-{}", self.debian),
            "The package and the unit tests, emulated by qemu on this machine.",
        );
        report.add(
            "program",
            kind.split(", dynamically").next().unwrap_or_default(),
        );
        report.add("unit tests", self.run_unit_tests());
        report.add("payments", 1000);
        report.finish();
    }
}

#[test]
fn the_package_for_arm64_runs() {
    ARM64.check();
}

#[test]
fn the_package_for_armhf_runs() {
    ARMHF.check();
}
