//! The control group of programs that outlive this process.
//!
//! When a container or a service ends, its container engine or service manager kills all processes
//! of its control group (`cgroup.kill`, the kernel's cgroup-v2.rst). So a program that must outlive
//! this process moves to a group beside it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process;

use rustix::io::Errno;
use sheave_core::printable;

use crate::mountinfo::Mounts;

/// A directory in the root of the hierarchy. A privileged container sees the root of its node.
const NAME: &str = "sheave-tools";
/// How often a program tries to enter: the last program to leave removes the group, maybe just
/// before another one enters.
const TRIES: u32 = 10;

/// The membership of a program. The group is removed with its last member.
pub(crate) struct Group(Option<PathBuf>);

impl Group {
    /// Moves a program that was just started. Where it cannot be moved, it may end with the
    /// container of this process; the next call repeats its work.
    pub(crate) fn of(program: &process::Child) -> Self {
        match enter(program.id()) {
            Ok(group) => Self(group),
            Err(error) => {
                tracing::debug!("a program stays in the control group of this process: {error}");
                Self(None)
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = &self.0 {
            // It is not empty while another program runs.
            let _ = fs::remove_dir(group);
        }
    }
}

fn enter(pid: u32) -> Result<Option<PathBuf>, String> {
    let mounts = Mounts::read().map_err(|error| error.to_string())?;
    let Some(root) = mounts.of_type("cgroup2") else { return Ok(None) };
    let group = root.join(NAME);
    let entered = (0..TRIES).map(|_| try_enter(&group, pid)).find(|entered| !is_gone(entered));
    match entered {
        Some(Ok(())) => Ok(Some(group)),
        Some(Err(error)) => Err(format!("{}: {error}", printable(&group))),
        None => Err(format!("{}: it was removed {TRIES} times", printable(&group))),
    }
}

fn try_enter(group: &Path, pid: u32) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::write(group.join("cgroup.procs"), pid.to_string())
}

fn is_gone(entered: &io::Result<()>) -> bool {
    entered.as_ref().is_err_and(|error| {
        // ENODEV: the group was removed after its file was opened.
        [Some(Errno::NOENT), Some(Errno::NODEV)].contains(&Errno::from_io_error(error))
    })
}
