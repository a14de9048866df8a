//! Child processes that cannot outlive the test process, however it ends.
//!
//! Drop is not enough: statics are never dropped, and a killed test process drops nothing. So each
//! child is started by a shell that leaves a watcher behind and then becomes the child. The watcher
//! reads a pipe whose other end only this process holds. A line lets it go; the end of the pipe
//! makes it kill the child.

use super::wait_for;
use std::env;
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// `$$` is the shell, and after `exec` the child: the pid that the test knows is the program
/// itself. The watcher closes its output, so that the end of the child is the end of the child's
/// pipes. `$0` is a directory that no other process is left to remove, or empty.
const SCRIPT: &str = r#"exec 3<&0 </dev/null
(read -r line <&3 || { kill -9 $$; rm -rf -- "$0"; }) >/dev/null 2>&1 &
exec "$@" 3<&-"#;

/// A running child, killed when this value is dropped or when this process dies.
pub struct KillOnDrop {
    child: Child,
    watcher: ChildStdin,
}

impl KillOnDrop {
    /// A command to complete and to hand to [`KillOnDrop::spawn`]; its stdin is used.
    pub fn command(program: impl AsRef<OsStr>) -> Command {
        KillOnDrop::command_with_scratch(program, Path::new(""))
    }

    /// The same for a child whose directory `scratch` is to go with it, should this process just
    /// die.
    pub fn command_with_scratch(program: impl AsRef<OsStr>, scratch: &Path) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT]).arg(scratch).arg(program);
        without_configuration(&mut command);
        command
    }

    pub fn spawn(mut command: Command) -> KillOnDrop {
        // A group of its own: Ctrl-C at the terminal must not end the watcher before its work.
        command.stdin(Stdio::piped()).process_group(0);
        let mut child = command.spawn().expect("sh starts");
        let watcher = child.stdin.take().expect("stdin is a pipe");
        KillOnDrop { child, watcher }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn take_stdout(&mut self) -> ChildStdout {
        self.child
            .stdout
            .take()
            .expect("stdout is a pipe that is unused")
    }

    pub fn take_stderr(&mut self) -> ChildStderr {
        self.child
            .stderr
            .take()
            .expect("stderr is a pipe that is unused")
    }

    /// The status of a child that has ended, and none while it runs.
    pub fn try_exit(&mut self) -> Option<ExitStatus> {
        let status = self
            .child
            .try_wait()
            .expect("our own child can be waited for")?;
        // The pid may now go to another process: the watcher must not kill it. It may have left
        // already.
        let _ = self.watcher.write_all(b"\n");
        Some(status)
    }

    /// Sends a signal by its name.
    #[track_caller]
    pub fn signal(&self, name: &str) {
        let pid = self.id();
        // The shell's own kill: a small image may have no other.
        let sent = Command::new("sh")
            .args(["-c", &format!("kill -{name} {pid}")])
            .status();
        assert!(
            sent.is_ok_and(|status| status.success()),
            "SIG{name} to {pid}, which may have ended"
        );
    }

    /// SIGTERM, and the status of the exit that follows within `limit`.
    #[track_caller]
    pub fn terminate(&mut self, limit: Duration) -> ExitStatus {
        let pid = self.id();
        self.signal("TERM");
        wait_for(&format!("the exit of {pid} after SIGTERM"), limit, || {
            self.try_exit()
        })
    }

    /// SIGKILL, at once, and the child is gone on return. Does nothing to a child that has ended.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().expect("our own child can be waited for");
        let _ = self.watcher.write_all(b"\n");
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The environment of the tests must not configure the product.
pub fn without_configuration(command: &mut Command) -> &mut Command {
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"PAYRELAY_") {
            command.env_remove(name);
        }
    }
    command
}
