//! Work that waits for a device, in a process of its own.
//!
//! A thread of the daemon must not wait for one of its own devices inside the kernel. When the
//! daemon is killed the thread goes on waiting, and with it lives what all threads share: the
//! connections of devices and the lock of the records. Nobody could serve the device then, and the
//! thread would wait for ever. A child has neither, and may wait as long as it takes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin};
use std::thread::Builder;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use sheave_core::{Error, ErrorKind, Result};

use crate::block::BlockDevice;

/// Starts a process of this program that calls [`run_task`] with this text, and whose standard
/// input and output are pipes.
pub type Helper = fn(&str) -> io::Result<Child>;

/// What a child is asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Write what the kernel has not written of this device, and hold it until told to let go.
    Claim { name: String },
    /// Set how the queue of this device works, and find its partitions.
    Tune { name: String },
    /// Tell the kernel's NBD client a new size, in bytes.
    ResizeNbd { index: u32, size: u64, identifier: String },
}

/// What a child says of its task.
#[derive(Serialize, Deserialize)]
struct Answer {
    /// An error number (errno(3)), 0 if it is done.
    errno: i32,
    why: String,
}

/// A device that nobody can begin to use; let go of when this is dropped.
pub(crate) struct Claim {
    child: Child,
    /// Its end tells the child.
    hold: Option<ChildStdin>,
}

/// Does a task in this process, which is the child. Answers on standard output, and ends when
/// standard input does.
///
/// # Errors
/// When the task cannot be read or the answer not written.
pub fn run_task(task: &str) -> Result<()> {
    let task: Task = serde_json::from_str(task)
        .map_err(|error| Error::new(ErrorKind::Invalid, "task", error.to_string()))?;
    let mut held = None;
    let done = match task {
        Task::Claim { name } => BlockDevice::new(name).claim().map(|file| held = Some(file)),
        Task::Tune { name } => {
            let device = BlockDevice::new(name);
            device.tune();
            device.add_partitions()
        }
        Task::ResizeNbd { index, size, identifier } => {
            sheave_knbd::resize(index, size, &identifier)
        }
    };
    let answer = match done {
        Ok(()) => Answer { errno: 0, why: String::new() },
        Err(error) => Answer { errno: error.kind().linux_errno(), why: error.to_string() },
    };
    let answer = serde_json::to_string(&answer).expect("an answer is plain data");
    // Whoever asked may be gone, which ends this process as well.
    let _ = writeln!(io::stdout(), "{answer}");
    let _ = io::stdin().read_to_end(&mut Vec::new());
    drop(held);
    Ok(())
}

/// Has a task done and waits for its end, as a step of `op`; for so long, if that is bounded.
///
/// # Errors
/// What the task says; [`ErrorKind::Busy`] when it takes longer.
pub(crate) fn wait_for(
    helper: Helper,
    op: &'static str,
    task: &Task,
    patience: Option<Duration>,
) -> Result<Claim> {
    let failed = |error| Error::from_io(op, "helper process", error);
    let text = serde_json::to_string(task).map_err(|error| failed(error.into()))?;
    let mut child = helper(&text).map_err(failed)?;
    let (hold, stdout) = (child.stdin.take(), child.stdout.take());
    let claim = Claim { child, hold };
    let mut line = String::new();
    if let Some(stdout) = stdout {
        if !is_readable(&stdout, patience).map_err(failed)? {
            claim.give_up();
            let why =
                format!("its volume has not answered within {:?}", patience.unwrap_or_default());
            return Err(Error::new(ErrorKind::Busy, op, why));
        }
        BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
    }
    let answer: Answer = serde_json::from_str(&line).map_err(|_| {
        Error::new(ErrorKind::Io, op, "the helper process ended without an answer; try again")
    })?;
    if answer.errno == 0 {
        return Ok(claim);
    }
    let kind = ErrorKind::of_io(&io::Error::from_raw_os_error(answer.errno));
    let why = answer.why.split_once(": ").map_or(&*answer.why, |(_, why)| why);
    Err(Error::new(kind, op, why))
}

/// Has a task done, whenever that may be.
pub(crate) fn begin(helper: Helper, task: Task) {
    let begun = Builder::new().name("helper".to_owned()).spawn(move || {
        if let Err(error) = wait_for(helper, "attach", &task, None) {
            tracing::warn!(%error, ?task, "not done");
        }
    });
    if let Err(error) = begun {
        tracing::debug!(%error, "not begun");
    }
}

/// Whether there is something to be read, or the end, within this time.
fn is_readable(file: &impl AsFd, within: Option<Duration>) -> io::Result<bool> {
    let Some(within) = within else { return Ok(true) };
    let timeout = Timespec::try_from(within).map_err(io::Error::other)?;
    let mut polled = [PollFd::new(file, PollFlags::IN)];
    Ok(poll(&mut polled, Some(&timeout))? > 0)
}

impl Claim {
    /// Ends a child that waits in the kernel, once that lets go of it.
    fn give_up(mut self) {
        let _ = self.child.kill();
        // A thread that cannot be made leaves it to be waited for here.
        let _ = Builder::new().name("helper".to_owned()).spawn(move || drop(self));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        drop(self.hold.take());
        // It is about to end, since it has answered or is gone.
        let _ = self.child.wait();
    }
}
