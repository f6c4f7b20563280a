//! Kills a process at a chosen system call, or has the call fail, by strace: no program needs hooks
//! for it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::command::wait;
use crate::{Run, eventually};

/// How long strace may take to leave a process.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);

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

    /// Has the flushes of a directory fail, in each thread of a process from its nth on.
    ///
    /// # Panics
    /// When strace cannot be attached.
    #[must_use]
    pub fn fail_flushes(pid: u32, of: &Path, nth: usize, dir: &Path) -> Self {
        let path = format!("--trace-path={}", of.display());
        let inject = format!("--inject=fsync:error=EIO:when={nth}+");
        Self::attach(pid, &[&path, "--trace=fsync", &inject], dir)
    }

    /// Notes the calls of a process, see [`STEPS`].
    ///
    /// # Panics
    /// When strace cannot be attached.
    #[must_use]
    pub fn record(pid: u32, dir: &Path) -> Self {
        Self::attach(pid, &[&format!("--trace={STEPS}")], dir)
    }

    /// The same, and the programs that it starts.
    ///
    /// # Panics
    /// When strace cannot be attached.
    #[must_use]
    pub fn record_programs(pid: u32, dir: &Path) -> Self {
        Self::attach(pid, &[&format!("--trace=execve,{STEPS}")], dir)
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
        self.leave();
    }

    /// Whether strace has ended by itself.
    fn leave(&mut self) -> bool {
        let _ = Run::new("kill").arg("-INT").arg(self.strace.id().to_string()).output();
        // If the process dies just then, strace may wait for ever for its first thread, whose end
        // the kernel reports only after those of all others, for which strace does not wait then.
        let has_ended = wait(&mut self.strace, DETACH_TIMEOUT).is_some();
        if !has_ended {
            let _ = self.strace.kill();
            let _ = self.strace.wait();
        }
        has_ended
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;
    use crate::{Scratch, child, have, part, skip};

    const THREADS: usize = 64;
    const ROUNDS: usize = 100;

    /// A process of many threads.
    fn stay() {
        let all = Arc::new(Barrier::new(THREADS + 1));
        for _ in 0..THREADS {
            let all = Arc::clone(&all);
            thread::spawn(move || all.wait());
        }
        thread::sleep(crate::PATIENCE);
    }

    /// Whether strace has ended by itself that was to leave a process just after that was killed.
    fn leave_the_dying(test: &str, after: Duration) -> bool {
        let dir = Scratch::new();
        let mut command = child(test, "stay", dir.path());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().expect("this program");
        let tasks = format!("/proc/{}/task", process.id());
        let count = || fs::read_dir(&tasks).map_or(0, Iterator::count);
        assert!(eventually(|| count() > THREADS));
        let mut trace = Trace::record(process.id(), dir.path());
        process.kill().expect("our own child");
        thread::sleep(after);
        let has_ended = trace.leave();
        process.wait().expect("our own child");
        has_ended
    }

    #[test]
    fn a_process_that_dies_can_be_left() {
        let test = "strace::tests::a_process_that_dies_can_be_left";
        if part().is_some() {
            return stay();
        }
        if !have("strace") {
            return skip(test, "strace (strace) is not installed");
        }
        // The moment at which strace does not end by itself has to be found.
        let round = Arc::new(AtomicUsize::new(0));
        let rounds = Arc::clone(&round);
        let trying = thread::spawn(move || {
            let steps = (0..ROUNDS).map(|step| Duration::from_micros(step as u64 % 20 * 150));
            steps.take_while(|after| leave_the_dying(test, *after)).for_each(|_| {
                rounds.fetch_add(1, Relaxed);
            });
        });
        assert!(eventually(|| trying.is_finished()), "strace does not end");
        trying.join().expect("no panic");
        crate::note(&format!("strace has left {} of {ROUNDS}\n", round.load(Relaxed)));
    }
}
