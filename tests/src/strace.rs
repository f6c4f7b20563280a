//! Kills a process at a chosen system call, by strace: no program needs hooks for it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{Run, eventually};

/// What is looked at of a process: its durable steps, its mounts, and the messages that it sends.
const STEPS: &str = "fsync,fdatasync,?rename,?renameat,renameat2,?unlink,unlinkat,mount,umount2,\
    ?mkdir,mkdirat,?rmdir,?symlinkat,ftruncate,fallocate,sendto,sendmsg,writev";

/// strace, attached to a process and its threads, but not to programs that it starts.
pub struct Trace {
    strace: Child,
    output: PathBuf,
}

impl Trace {
    /// Kills a process when one of its threads begins its nth call of this name from now on.
    ///
    /// # Panics
    /// When strace cannot be attached.
    #[must_use]
    pub fn kill_at(pid: u32, call: &str, nth: usize, dir: &Path) -> Self {
        let inject = format!("--inject={call}:signal=KILL:when={nth}");
        Self::attach(pid, &[&format!("--trace={call}"), &inject], dir)
    }

    /// Notes the calls of a process, see [`STEPS`].
    ///
    /// # Panics
    /// When strace cannot be attached.
    #[must_use]
    pub fn record(pid: u32, dir: &Path) -> Self {
        Self::attach(pid, &[&format!("--trace={STEPS}")], dir)
    }

    fn attach(pid: u32, args: &[&str], dir: &Path) -> Self {
        let (output, errors) = (dir.join("strace"), dir.join("strace.err"));
        let strace = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "strace", "--follow-forks"])
            .args(["--detach-on=execve", "--string-limit=0"])
            .args(args)
            .arg("--output")
            .arg(&output)
            .arg(format!("--attach={pid}"))
            .stdin(Stdio::null())
            .stderr(File::create(&errors).expect("a file"))
            .spawn()
            .expect("strace");
        let said = || fs::read_to_string(&errors).unwrap_or_default();
        let attached = format!("Process {pid} attached");
        assert!(eventually(|| said().contains(&attached)), "strace: {}", said());
        Self { strace, output }
    }

    /// Leaves the process alone.
    pub fn end(mut self) {
        let _ = Run::new("kill").arg("-INT").arg(self.strace.id().to_string()).output();
        let _ = self.strace.wait();
    }

    /// Leaves it alone, and returns how many calls of each name its busiest thread made.
    ///
    /// # Panics
    /// When strace has noted nothing that can be read.
    #[must_use]
    pub fn counts(self) -> BTreeMap<String, usize> {
        let output = self.output.clone();
        self.end();
        let text = fs::read_to_string(output).expect("its output");
        let mut by_thread = BTreeMap::<(&str, &str), usize>::new();
        for line in text.lines() {
            let Some((thread, rest)) = line.split_once(' ') else { continue };
            let rest = rest.trim_start();
            let name = rest.split(['(', ' ']).next().unwrap_or_default();
            // Neither signals nor the second halves of calls.
            if !rest.starts_with(['+', '-', '<']) {
                *by_thread.entry((name, thread)).or_default() += 1;
            }
        }
        let mut counts = BTreeMap::new();
        for ((name, _), count) in by_thread {
            let most = counts.entry(name.to_owned()).or_default();
            *most = count.max(*most);
        }
        counts
    }
}
