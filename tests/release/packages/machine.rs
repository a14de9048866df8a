//! A minimal Debian that runs its own systemd, in a folder; and payrelay as a process.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use testkit::child::KillOnDrop;
use testkit::paths;
use testkit::wait_for;

use super::{printed, run};

const LIMIT: Duration = Duration::from_mins(1);

/// Where the service of a package listens.
pub const ADDRESS: &str = "127.0.0.1:8080";

/// A payrelay that serves, whatever started it.
pub struct Service {
    process: KillOnDrop,
    pub address: SocketAddr,
}

impl Service {
    /// Starts a command of [`KillOnDrop::command`], whose log goes to a file, and waits until it
    /// serves.
    pub fn start(mut command: Command, log: &Path) -> Self {
        command.stderr(File::create(log).unwrap());
        let process = KillOnDrop::spawn(command);
        let address = wait_for("a payrelay that serves", LIMIT, || {
            let text = fs::read_to_string(log).unwrap();
            let (_, rest) = text.split_once("listening on http://")?;
            rest.split([' ', '\n']).next()?.parse().ok()
        });
        Self { process, address }
    }

    /// Ends it as systemd does.
    pub fn stop(mut self) {
        run("kill", &[&self.process.id().to_string()]);
        let exit = wait_for("the end of payrelay", LIMIT, || self.process.try_exit());
        assert!(exit.success(), "{exit}");
    }
}

/// A Debian with its minimum, systemd and curl. It is brought once.
fn debian() -> PathBuf {
    let archive = paths::target().join("tools/debian-bookworm.tar");
    if !archive.exists() {
        let dir = tempfile::tempdir_in(paths::temporary()).unwrap();
        let root = dir.path().to_str().unwrap();
        let include = "--include=systemd,curl";
        let minimum = "--variant=minbase";
        run("debootstrap", &[minimum, include, "bookworm", root]);
        run("tar", &["-C", root, "-cf", archive.to_str().unwrap(), "."]);
    }
    archive
}

/// A Debian that has booted in a folder. It shares the network of this machine.
pub struct Machine {
    pub root: PathBuf,
    /// The process of its systemd.
    leader: String,
    _container: KillOnDrop,
}

impl Drop for Machine {
    /// With the first process of a container all others end. It would survive systemd-nspawn.
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-9", &self.leader]).status();
    }
}

impl Machine {
    pub fn boot(root: &Path) -> Self {
        fs::create_dir(root).unwrap();
        let archive = debian();
        let [into, from] = [root, &archive].map(|path| path.to_str().unwrap());
        run("tar", &["-C", into, "-xf", from]);
        let answer = "APT::Get::Assume-Yes \"true\";\n";
        fs::write(root.join("etc/apt/apt.conf.d/yes"), answer).unwrap();
        let busy = std::net::TcpListener::bind(ADDRESS).err();
        assert!(busy.is_none(), "{ADDRESS} has to be free: {busy:?}");
        let mut command = KillOnDrop::command("systemd-nspawn");
        command.args(["--register=no", "--keep-unit", "--boot", "-D", into]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let container = KillOnDrop::spawn(command);
        let parent = container.id().to_string();
        let leader = wait_for("the systemd of the container", LIMIT, || {
            let output = Command::new("pgrep")
                .args(["-x", "-P", &parent, "systemd"])
                .output();
            let text = printed(&output.unwrap());
            let is_up = text.trim().parse::<u32>().is_ok();
            is_up.then(|| text.trim().to_owned())
        });
        let machine = Self {
            root: root.into(),
            leader,
            _container: container,
        };
        wait_for("the end of the boot", LIMIT, || {
            let mut state = machine.command(&["systemctl", "is-system-running"]);
            let text = printed(&state.output().unwrap());
            ["running", "degraded"].contains(&text.trim()).then_some(())
        });
        machine
    }

    fn command(&self, program: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.leader, "-m", "-u", "-i", "-p", "-r", "-w"]);
        command.args(["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
        command.args(["DEBIAN_FRONTEND=noninteractive", "HOME=/root"]);
        command.args(program);
        command
    }

    /// Runs a program in it, as root.
    #[track_caller]
    pub fn run(&self, program: &[&str]) -> String {
        let output = self.command(program).output().unwrap();
        let text = printed(&output);
        assert!(output.status.success(), "{program:?}: {text}");
        text
    }

    /// Runs a block of a page in this folder, as root.
    #[track_caller]
    pub fn run_page(&self, folder: &str, block: &str) -> String {
        let as_service = "setpriv --reuid=payrelay --regid=payrelay --clear-groups ";
        let block = block.replace("sudo -u payrelay ", as_service);
        let script = format!("cd {folder}\n{}", block.replace("sudo ", ""));
        self.run(&["bash", "-euo", "pipefail", "-c", &script])
    }

    /// Puts a file into it.
    pub fn bring(&self, file: &Path, path: &str) {
        let to = self.root.join(path);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }

    pub fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// A property of the service, as systemd knows it.
    pub fn property(&self, name: &str) -> String {
        let value = self.run(&["systemctl", "show", "payrelay", "--value", "-p", name]);
        value.trim().to_owned()
    }

    /// The process of the service, once it serves.
    #[track_caller]
    pub fn wait_for_service(&self) -> String {
        wait_for("the service", LIMIT, || {
            let is_active = self.property("ActiveState") == "active";
            is_active.then(|| self.property("MainPID"))
        })
    }
}
