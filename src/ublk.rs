//! Whether ublk works here, found out by a process that can be spared.

use std::io::{self, Read};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sheave_core::{Error, ErrorKind, Result};

/// The hidden command that [`probe`] runs this program with.
pub(crate) const COMMAND: &str = "probe-ublk";
/// Adding a device takes milliseconds, loading the driver little more.
const TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);

/// A child that the kernel has not let go of. Another one would wait behind it.
static HUNG: Mutex<Option<Child>> = Mutex::new(None);

/// Loads the driver if need be, and makes a device and ends it, in a child: some kernels kill or
/// hang who does it first.
///
/// # Errors
/// Why it does not work.
pub(crate) fn probe() -> Result<()> {
    let mut hung = HUNG.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(child) = &mut *hung {
        if matches!(child.try_wait(), Ok(None)) {
            return Err(hangs());
        }
        *hung = None;
    }
    let spawned = Command::new("/proc/self/exe")
        .arg(COMMAND)
        // Ctrl-C at the terminal would leave the device that it tries.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => unsupported("the probe needs /proc, mounted".to_owned()),
        _ => Error::from_io("ublk", "probe", error),
    })?;
    let begun = Instant::now();
    while begun.elapsed() < TIMEOUT {
        match child.try_wait() {
            Ok(None) => sleep(POLL),
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(unsupported(reason(&mut child, &status.to_string()))),
            Err(error) => return Err(Error::from_io("ublk", "probe", error)),
        }
    }
    // If the kernel does not let go of it, nobody can wait for it either.
    let _ = child.kill();
    *hung = Some(child);
    Err(hangs())
}

fn hangs() -> Error {
    unsupported(format!("the kernel hangs when a device is added ({TIMEOUT:?})"))
}

/// What the child does.
///
/// # Errors
/// Why it does not work.
pub(crate) fn probe_here() -> Result<()> {
    match sheave_ublk::check() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // The driver has no name by which the kernel would load it when it is asked for. What
            // modprobe says is of no use to who did not call it.
            let _ = Command::new("modprobe").args(["-q", "ublk_drv"]).status();
        }
        _ => {}
    }
    sheave_ublk::probe()
}

fn reason(child: &mut Child, status: &str) -> String {
    let mut said = String::new();
    if let Some(stderr) = &mut child.stderr {
        let _ = stderr.read_to_string(&mut said);
    }
    let said = said.trim();
    let said = said.strip_prefix("sheave: ublk: ").unwrap_or(said);
    if said.is_empty() { format!("the probe ended by {status}") } else { said.to_owned() }
}

fn unsupported(why: String) -> Error {
    Error::new(ErrorKind::Unsupported, "ublk", why)
}
