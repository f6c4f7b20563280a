//! Programs of other projects that the engine calls, such as mkfs.
//!
//! A program that writes to a volume must not be ended in the middle, and no second one may run
//! beside it. So each has a process group of its own and leaves the control group (`group.rs`),
//! writes to memory instead of a pipe that ends with this process, and holds the volume's lock as
//! its standard input: the next process finds the volume locked until the program has ended.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};
use sheave_core::printable;

use crate::error::refused;
use crate::group::Group;
use crate::lock::VolumeLock;
use crate::{Error, Kind, Result};

/// Where system programs are, beside PATH: that of a service may lack them.
const SYSTEM: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";
/// How much of a program's output a message quotes.
const QUOTED_MAX: usize = 400;
const OUTPUT_MAX: usize = 64 << 10;

/// Finds and runs programs.
#[derive(Clone, Debug)]
pub struct Tools {
    path: OsString,
}

/// How a program ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    /// Its exit code; `None` if a signal has ended it.
    pub(crate) code: Option<i32>,
    pub(crate) output: String,
    what: String,
    status: String,
}

impl Tools {
    /// Looks in the directories of PATH first, then in those of the system.
    #[must_use]
    pub fn from_env() -> Self {
        Self::in_path(&std::env::var_os("PATH").unwrap_or_default())
    }

    /// Looks in these directories, separated by `:`, first.
    #[must_use]
    pub fn in_path(path: &OsStr) -> Self {
        let mut path = path.to_owned();
        path.push(":");
        path.push(SYSTEM);
        Self { path }
    }

    /// The absolute path of a program.
    ///
    /// # Errors
    /// [`Kind::Refused`] when it is not installed.
    pub(crate) fn find(&self, name: &str) -> Result<PathBuf> {
        let dirs = std::env::split_paths(&self.path).filter(|dir| dir.is_absolute());
        let mut files = dirs.map(|dir| dir.join(name));
        files.find(|file| is_executable(file)).ok_or_else(|| {
            let package = match name {
                "mkfs.xfs" | "xfs_repair" | "xfs_growfs" => "xfsprogs",
                "mkfs.btrfs" | "btrfs" => "btrfs-progs",
                _ => "e2fsprogs",
            };
            refused(format!("{name} is not installed on this node; install {package}"))
        })
    }

    /// Runs a program on a device or directory until it ends, however long that takes.
    ///
    /// # Errors
    /// When it is not installed or cannot be started.
    pub(crate) fn run(
        &self,
        name: &str,
        args: &[&str],
        on: &Path,
        lock: &VolumeLock,
    ) -> Result<Ended> {
        let program = self.find(name)?;
        let fail = |error| Error::of_io(format!("start {}", printable(&program)), &error);
        let output = memfd_create("output", MemfdFlags::CLOEXEC).map_err(|e| fail(e.into()))?;
        let output = File::from(output);
        tracing::info!(program = name, on = %printable(on), "running");
        let mut child = Command::new(&program)
            .args(args)
            .arg(on)
            .env("PATH", &self.path)
            .env("LC_ALL", "C")
            .stdin(Stdio::from(lock.share()?))
            .stdout(Stdio::from(output.try_clone().map_err(fail)?))
            .stderr(Stdio::from(output.try_clone().map_err(fail)?))
            .process_group(0)
            .spawn()
            .map_err(fail)?;
        let _group = Group::of(&child);
        let status = child.wait().map_err(|error| {
            Error::new(Kind::Unavailable, format!("wait for {}: {error}", printable(&program)))
        })?;
        let output = text(&output);
        let what = format!("{name} {}", printable(on));
        tracing::info!(program = name, on = %printable(on), %status, "ended");
        let code = status.code();
        let status = match status.signal() {
            Some(signal) => format!("ended by signal {signal}"),
            None => format!("exit code {}", code.unwrap_or_default()),
        };
        Ok(Ended { code, output, what, status })
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> =
            self.output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let text = lines.join(" / ");
        let start = text.len().saturating_sub(QUOTED_MAX);
        let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or_default();
        write!(f, "{}: {}: {}", self.what, self.status, &text[start..])
    }
}

fn is_executable(file: &Path) -> bool {
    let metadata = file.metadata();
    metadata.is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// What a program has written, as far as it is kept.
fn text(output: &File) -> String {
    let mut bytes = vec![0; OUTPUT_MAX];
    let len = output.read_at(&mut bytes, 0).unwrap_or_default();
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}
