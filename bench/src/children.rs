//! Processes that must not outlive us, whatever ends us.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, process, thread};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::iterator::Signals;

use crate::signals;

/// How long a process may take to end by itself.
const GRACE: Duration = Duration::from_secs(2);
/// The exit status of a process that a signal ended, as shells have it.
const SIGNAL_STATUS_BASE: i32 = 128;

/// What a signal has to clean up.
static OURS: Mutex<Ours> = Mutex::new(Ours { processes: Vec::new(), dirs: Vec::new() });

struct Ours {
    /// By descriptor, since an id may pass to another process.
    processes: Vec<(u32, OwnedFd)>,
    dirs: Vec<PathBuf>,
}

/// Makes a signal that ends this command kill what is registered before.
///
/// # Errors
/// When the signals cannot be caught.
pub(crate) fn clean_up_on_signals() -> Result<()> {
    signals::ignore_meaningless().context("catch signals")?;
    let mut signals = Signals::new(signals::ending()).context("catch signals")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let ours = ours();
            for (_, process) in &ours.processes {
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            ours.dirs.iter().for_each(|dir| remove(dir));
            process::exit(SIGNAL_STATUS_BASE + signal);
        }
    });
    Ok(())
}

/// Removes a directory into which others may still write: a process that was killed and has not
/// ended, or another thread of this one.
fn remove(dir: &Path) {
    let until = Instant::now() + GRACE;
    while fs::remove_dir_all(dir).is_err() && dir.exists() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}

/// A directory for sockets and images, gone when this is dropped.
#[derive(Debug)]
pub(crate) struct ScratchDir(tempfile::TempDir);

impl ScratchDir {
    /// A new one inside `parent`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn new(parent: &Path) -> Result<Self> {
        // A signal does not come between the two.
        let mut ours = ours();
        let dir = tempfile::Builder::new()
            .prefix("sheave-bench-")
            .tempdir_in(parent)
            .with_context(|| format!("make a directory in {}", parent.display()))?;
        ours.dirs.push(dir.path().to_owned());
        Ok(Self(dir))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        ours().dirs.retain(|dir| dir != self.0.path());
    }
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Guarded {
    pid: u32,
    /// `None` for a daemon, which is not our child.
    child: Option<Child>,
}

impl Guarded {
    /// Starts a process.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        let pid = child.id();
        // Registered before anything else can fail, and it cannot have been reaped yet.
        register(pid)?;
        Ok(Self { pid, child: Some(child) })
    }

    /// Takes charge of a daemon that has put itself into the background.
    ///
    /// # Errors
    /// When there is no such process, or it runs another program.
    pub(crate) fn adopt(pid: u32, program: &str) -> Result<Self> {
        register(pid)?;
        let guarded = Self { pid, child: None };
        let name = fs::read_to_string(format!("/proc/{pid}/comm"))?;
        ensure!(
            name.trim_end() == program,
            "process {pid} is {} and not {program}",
            name.trim_end()
        );
        Ok(guarded)
    }

    /// Its id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => has_not_ended(self.pid),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let process = {
            let mut ours = ours();
            let found = ours.processes.iter().position(|(pid, _)| *pid == self.pid);
            found.map(|index| ours.processes.swap_remove(index).1)
        };
        let Some(process) = process else { return };
        for signal in [Signal::TERM, Signal::KILL] {
            let _ = pidfd_send_signal(&process, signal);
            let deadline = Instant::now() + GRACE;
            while Instant::now() < deadline {
                if !self.is_alive() {
                    return;
                }
                thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Whether a process that is not our child runs. One that has ended stays a zombie for as long as
/// its parent, the system's first process, likes.
fn has_not_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // "pid (name) state …"; the name may hold anything, parentheses too.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn register(pid: u32) -> Result<()> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process id")?;
    let process = pidfd_open(raw, PidfdFlags::empty()).context("open a process")?;
    ours().processes.push((pid, process));
    Ok(())
}

/// A panic elsewhere does not make the list wrong.
fn ours() -> MutexGuard<'static, Ours> {
    OURS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guarded_process_ends_with_its_guard() {
        let guarded = Guarded::spawn(Command::new("sleep").arg("60")).unwrap();
        let pid = guarded.pid();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(guarded);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert!(ours().processes.iter().all(|(ours, _)| *ours != pid));
    }

    #[test]
    fn a_process_that_ignores_sigterm_is_killed() {
        let script = "trap '' TERM; while :; do sleep 1; done";
        let mut guarded = Guarded::spawn(Command::new("sh").args(["-c", script])).unwrap();
        // The shell needs a moment to set its trap.
        thread::sleep(Duration::from_millis(100));
        assert!(guarded.is_alive());
        let pid = guarded.pid();
        drop(guarded);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_zombie_has_ended() {
        let mut child = Command::new("true").spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while has_not_ended(child.id()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        let (ended, exists) =
            (!has_not_ended(child.id()), fs::exists(format!("/proc/{}", child.id())));
        child.wait().unwrap();
        assert!(ended && exists.unwrap());
    }

    #[test]
    fn another_program_is_not_adopted() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let refused = Guarded::adopt(child.id(), "nbd-server");
        assert!(refused.is_err());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
