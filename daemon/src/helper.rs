//! Runs calls that may block in the kernel in a child process.
//!
//! A thread of the daemon must not wait for one of its own devices inside the kernel. When the
//! daemon is killed, the thread keeps waiting, and keeps alive what all threads share: the
//! connections of devices and the lock of the records. No successor could then serve the device,
//! and the thread would wait for ever. A child has neither, and may wait as long as it takes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::thread::Builder;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result};
use sheave_local::start_process;

use crate::block::BlockDevice;
use crate::slot::lock;

/// The hidden command of this program that calls [`run_task`] with its only argument.
pub const HELPER: &str = "device-helper";
/// Adding a device takes milliseconds, loading the driver little more.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// The task of a child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Write back the kernel's dirty pages of this device, and hold it open exclusively until the
    /// parent releases it.
    Claim { name: String },
    /// Write back the kernel's dirty pages of this device, if nothing uses it.
    WriteBack { name: String },
    /// Tune the queue of this device, and find its partitions.
    Tune { name: String },
    /// Set a new size in the kernel's NBD client, in bytes.
    ResizeNbd { index: u32, size: u64, identifier: String },
    /// Load the ublk driver if need be, make a device and end it.
    ProbeUblk,
}

/// The result of a child's task.
#[derive(Serialize, Deserialize)]
struct Answer {
    /// An error number (errno(3)), 0 if it is done.
    errno: i32,
    why: String,
}

/// A child with a task. Dropping this ends the child, with what it holds, and waits for it.
pub(crate) struct Helper {
    child: Child,
    /// The child ends when this is closed.
    hold: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
}

/// Runs a task in this process, the child. Writes the result to standard output, and returns when
/// standard input ends.
///
/// # Errors
/// When the task cannot be read.
pub fn run_task(task: &str) -> Result<()> {
    let task: Task = serde_json::from_str(task)
        .map_err(|error| Error::new(ErrorKind::Invalid, "task", error.to_string()))?;
    let mut held = None;
    let done = match task {
        Task::Claim { name } => BlockDevice::new(name).claim().map(|file| held = Some(file)),
        Task::WriteBack { name } => BlockDevice::new(name).write_back(),
        Task::Tune { name } => {
            let device = BlockDevice::new(name);
            device.tune();
            device.add_partitions()
        }
        Task::ResizeNbd { index, size, identifier } => {
            sheave_knbd::resize(index, size, &identifier)
        }
        Task::ProbeUblk => probe_ublk_here(),
    };
    let answer = match done {
        Ok(()) => Answer { errno: 0, why: String::new() },
        Err(error) => Answer { errno: error.kind().linux_errno(), why: error.to_string() },
    };
    let answer = serde_json::to_string(&answer).expect("an answer is plain data");
    // The daemon may be gone; then this process ends as well.
    let _ = writeln!(io::stdout(), "{answer}");
    let _ = io::stdin().read_to_end(&mut Vec::new());
    drop(held);
    Ok(())
}

/// Runs a task and waits for its result, as a step of `op`; for at most `patience`, if given. The
/// child holds what the task has claimed until it is dropped.
///
/// # Errors
/// Errors of the task; [`ErrorKind::Busy`] when it takes longer.
pub(crate) fn wait_for(
    op: &'static str,
    task: &Task,
    patience: Option<Duration>,
) -> Result<Helper> {
    let mut helper = Helper::start(op, task)?;
    match helper.answer(op, patience)? {
        Some(answer) => answer.result(op).map(|()| helper),
        None => {
            helper.give_up();
            let patience = patience.unwrap_or_default();
            let why = format!("its volume has not answered within {patience:?}");
            Err(Error::new(ErrorKind::Busy, op, why))
        }
    }
}

/// Starts a task without waiting for its end.
pub(crate) fn begin(task: Task) {
    let begun = Builder::new().name("helper".to_owned()).spawn(move || {
        if let Err(error) = wait_for("attach", &task, None) {
            tracing::warn!(%error, ?task, "not done");
        }
    });
    if let Err(error) = begun {
        tracing::debug!(%error, "not begun");
    }
}

/// Finds out whether ublk works here, by making a device and ending it in a child, since some
/// kernels kill or hang the first process that does so. Loads the driver if need be.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with the reason when it does not work; [`ErrorKind::TimedOut`] when
/// the child is not through in time.
pub fn probe_ublk() -> Result<()> {
    /// A child that is still blocked in the kernel. Another one would wait behind it.
    static HUNG: Mutex<Option<Helper>> = Mutex::new(None);
    let unsupported = |why: String| Error::new(ErrorKind::Unsupported, "ublk", why);
    let hangs = || {
        let why = format!(
            "the kernel has added no device within {PROBE_TIMEOUT:?}: it hangs (see dmesg), or \
             the machine is overloaded"
        );
        Error::new(ErrorKind::TimedOut, "ublk", why)
    };
    let mut hung = lock(&HUNG);
    if hung.as_mut().is_some_and(Helper::is_running) {
        return Err(hangs());
    }
    *hung = None;
    let mut helper = Helper::start("ublk", &Task::ProbeUblk)?;
    match helper.answer("ublk", Some(PROBE_TIMEOUT)) {
        Ok(Some(Answer { errno: 0, .. })) => Ok(()),
        Ok(Some(answer)) => Err(unsupported(answer.reason().to_owned())),
        Ok(None) => {
            // While it is blocked in the kernel, it cannot be waited for either.
            let _ = helper.child.kill();
            *hung = Some(helper);
            Err(hangs())
        }
        Err(error) => Err(unsupported(format!("the probe: {error}"))),
    }
}

/// The task of [`probe_ublk`]'s child.
fn probe_ublk_here() -> Result<()> {
    match sheave_ublk::check() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // The kernel does not load this driver by itself, since it has no alias. The output of
            // modprobe is dropped: check() reports what is missing.
            let _ =
                Command::new("modprobe").args(["-q", "ublk_drv"]).stderr(Stdio::null()).status();
        }
        _ => {}
    }
    sheave_ublk::probe()
}

impl Answer {
    fn result(&self, op: &'static str) -> Result<()> {
        if self.errno == 0 {
            return Ok(());
        }
        let kind = ErrorKind::of_io(&io::Error::from_raw_os_error(self.errno));
        Err(Error::new(kind, op, self.reason()))
    }

    /// The reason, without the operation that it was a step of.
    fn reason(&self) -> &str {
        self.why.split_once(": ").map_or(&self.why, |(_, why)| why)
    }
}

impl Helper {
    fn start(op: &'static str, task: &Task) -> Result<Self> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => {
                Error::new(ErrorKind::Unsupported, op, "a helper process needs /proc, mounted")
            }
            _ => Error::from_io(op, "helper process", error),
        };
        let text = serde_json::to_string(task).expect("a task is plain data");
        let mut command = Command::new("/proc/self/exe");
        // It must not get Ctrl-C of the daemon's terminal.
        command.args([HELPER, &text]).process_group(0).stderr(Stdio::null());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = start_process(|| command.spawn()).map_err(failed)?;
        let (hold, stdout) = (child.stdin.take(), child.stdout.take());
        Ok(Self { child, hold, stdout })
    }

    /// Waits for the result; `None` if there is none in time.
    fn answer(&mut self, op: &'static str, patience: Option<Duration>) -> Result<Option<Answer>> {
        let failed = |error| Error::from_io(op, "helper process", error);
        let mut line = String::new();
        if let Some(stdout) = &mut self.stdout {
            if !is_readable(stdout, patience).map_err(failed)? {
                return Ok(None);
            }
            BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
        }
        let answer = serde_json::from_str(&line).map_err(|_| {
            let status =
                self.child.wait().map_or_else(|error| error.to_string(), |s| s.to_string());
            let why = format!("the helper process ended without an answer ({status})");
            Error::new(ErrorKind::Io, op, why)
        })?;
        Ok(Some(answer))
    }

    fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills a child that is blocked in the kernel, and waits for it in a thread.
    fn give_up(mut self) {
        let _ = self.child.kill();
        // If no thread can be made, this one waits.
        let _ = Builder::new().name("helper".to_owned()).spawn(move || drop(self));
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.hold.take());
        // It is about to end: it has answered, or is gone.
        let _ = self.child.wait();
    }
}

/// Whether there is input, or its end, within this time.
fn is_readable(file: &impl AsFd, within: Option<Duration>) -> io::Result<bool> {
    let Some(within) = within else { return Ok(true) };
    let timeout = Timespec::try_from(within).map_err(io::Error::other)?;
    let mut polled = [PollFd::new(file, PollFlags::IN)];
    Ok(poll(&mut polled, Some(&timeout))? > 0)
}
