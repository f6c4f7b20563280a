//! Starts a program through this executable, which replaces itself by it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use sheave_core::printable;

/// The command of this executable that calls [`exec`] with the two arguments behind it.
pub const HELPER: &str = "run-program";

/// The program to start, and its descriptors.
#[derive(Debug)]
pub struct Start {
    /// A command for `/bin/sh`.
    pub command: String,
    /// The directory to run it in; by default that of this process.
    pub directory: Option<PathBuf>,
    /// The listening socket.
    pub socket: OwnedFd,
    /// The destination of standard output and standard error.
    pub output: OwnedFd,
}

/// Starts a program by [`HELPER`] of this executable. The program gets SIGTERM when the calling
/// thread ends (PR_SET_PDEATHSIG of prctl(2)), so that thread has to live as long as the program.
///
/// # Errors
/// When it cannot be started.
pub fn by_helper(start: Start) -> io::Result<Child> {
    let Start { command, directory, socket, output } = start;
    let mut helper = Command::new("/proc/self/exe");
    helper.arg(HELPER).arg(std::process::id().to_string()).arg(command);
    // A process group of its own: it does not get Ctrl-C, and can be ended as a whole.
    helper.process_group(0).stdin(Stdio::from(socket));
    helper.stdout(Stdio::from(output.try_clone()?)).stderr(Stdio::from(output));
    if let Some(directory) = directory {
        // The error of a start names no path.
        std::fs::metadata(directory.join(".")).map_err(|error| {
            let why = format!("directory={}: {error}", printable(&directory));
            io::Error::new(error.kind(), why)
        })?;
        helper.current_dir(directory);
    }
    sheave_local::start_process(|| helper.spawn())
}

/// Replaces this process by the program. Returns only on failure, with the reason.
pub fn exec(parent: u32, command: &str) -> io::Error {
    // SIGTERM rather than SIGKILL: qemu-nbd then writes what it holds back of a qcow2 image, which
    // the writes that it has answered may need.
    if let Err(error) = set_parent_process_death_signal(Some(Signal::TERM)) {
        return error.into();
    }
    // The parent may have died before this call.
    if getppid().is_none_or(|now| now.as_raw_nonzero().get().cast_unsigned() != parent) {
        return io::Error::other("the process that started it has ended");
    }
    // The process number stays the same through both exec.
    let pid = std::process::id().to_string();
    Command::new("/bin/sh")
        .arg("-c")
        .arg(script(command))
        .env("LISTEN_FDS", "1")
        .env("LISTEN_PID", pid)
        .env_remove("LISTEN_FDNAMES")
        // Variables of the service manager are for this process only.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_PID")
        .env_remove("WATCHDOG_USEC")
        .exec()
}

/// Moves the socket from standard input to the descriptor of the protocol, and executes the
/// command.
pub(crate) fn script(command: &str) -> String {
    format!("exec 3<&0 </dev/null\nexec {command}")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_socket_is_descriptor_three_and_input_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(dir.path().join("s")).unwrap();
        let check = "sh -c 'test -S /proc/self/fd/3 && test -c /proc/self/fd/0'";
        let status = Command::new("/bin/sh")
            .args(["-c", &script(check)])
            .stdin(Stdio::from(OwnedFd::from(socket)))
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
    }
}
