//! The control group of programs that outlive this process.
//!
//! Where this process is a container or a service, all processes of its group are killed when it
//! ends, each by its number or all of them by `cgroup.kill` (the kernel's cgroup-v2.rst).

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process;

use rustix::io::Errno;
use sheave_core::printable;

use crate::mountinfo::Mounts;

/// Below the root of the hierarchy, which is the node's in a privileged container.
const NAME: &str = "sheave-tools";
/// The group is removed when its last program has ended, maybe just before another one comes.
const TRIES: u32 = 10;

/// A program that has a group of its own kind. The group goes away with the last of them.
pub(crate) struct Group(Option<PathBuf>);

impl Group {
    /// Moves a program that was just started. Where there are no such groups it stays, and ends
    /// with this process if that is a container; what it was doing is then repeated.
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
        None => Err(format!("{}: it goes away again and again", printable(&group))),
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
        // The second is of a group that was removed after its file was opened.
        [Some(Errno::NOENT), Some(Errno::NODEV)].contains(&Errno::from_io_error(error))
    })
}
