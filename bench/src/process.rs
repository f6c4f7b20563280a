//! What a server process and its descendants use, as `/proc` tells it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// A process and all its descendants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessTree {
    root: u32,
}

/// CPU time per thread, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct CpuSample(HashMap<u32, u64>);

/// What a process tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// Resident memory in bytes; pages shared between the processes count once.
    pub(crate) resident_bytes: u64,
    /// Open file descriptors.
    pub(crate) fd_count: u64,
    /// Threads.
    pub(crate) thread_count: u64,
}

impl CpuSample {
    /// CPU time used since `earlier`, in nanoseconds. Threads that have ended in between are
    /// missing, so sample while the connections are open.
    pub(crate) fn since(&self, earlier: &Self) -> u64 {
        let used = |(thread, now): (&u32, &u64)| {
            now.saturating_sub(earlier.0.get(thread).copied().unwrap_or(0))
        };
        self.0.iter().map(used).sum()
    }
}

impl ProcessTree {
    /// The tree below `root`.
    pub(crate) fn new(root: u32) -> Self {
        Self { root }
    }

    /// The processes in it, root first.
    ///
    /// # Errors
    /// When the root is gone.
    pub(crate) fn processes(self) -> Result<Vec<u32>> {
        anyhow::ensure!(dir(self.root).exists(), "process {} has ended", self.root);
        let parents = parents()?;
        let mut found = vec![self.root];
        let mut seen: HashSet<u32> = found.iter().copied().collect();
        let mut next = 0;
        while let Some(&parent) = found.get(next) {
            let children = parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid);
            found.extend(children.filter(|pid| seen.insert(*pid)));
            next += 1;
        }
        Ok(found)
    }

    /// CPU time of every thread so far.
    ///
    /// # Errors
    /// When the root is gone.
    pub(crate) fn cpu(self) -> Result<CpuSample> {
        let read = |task: PathBuf| {
            let thread = task.file_name()?.to_str()?.parse().ok()?;
            let text = fs::read_to_string(task.join("schedstat")).ok()?;
            Some((thread, text.split_whitespace().next()?.parse().ok()?))
        };
        Ok(CpuSample(self.tasks()?.into_iter().filter_map(read).collect()))
    }

    /// Context switches of all threads so far: how often something woke the server.
    ///
    /// # Errors
    /// When the root is gone.
    pub(crate) fn context_switches(self) -> Result<u64> {
        let read = |task: PathBuf| {
            let text = fs::read_to_string(task.join("status")).ok()?;
            let fields = ["voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"];
            Some(fields.iter().filter_map(|name| field(&text, name)).sum::<u64>())
        };
        Ok(self.tasks()?.into_iter().filter_map(read).sum())
    }

    /// Memory, descriptors and threads now.
    ///
    /// # Errors
    /// When the root is gone.
    pub(crate) fn holdings(self) -> Result<Holdings> {
        let processes = self.processes()?;
        let mut all = Holdings::default();
        for &pid in &processes {
            all.resident_bytes += resident_bytes(pid, processes.len() > 1).unwrap_or(0);
            all.fd_count += count_entries(dir(pid).join("fd"));
            all.thread_count += count_entries(dir(pid).join("task"));
        }
        Ok(all)
    }

    /// Directories of all threads.
    fn tasks(self) -> Result<Vec<PathBuf>> {
        let mut tasks = Vec::new();
        for pid in self.processes()? {
            let Ok(entries) = fs::read_dir(dir(pid).join("task")) else { continue };
            tasks.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
        }
        Ok(tasks)
    }

    /// The ids of all threads.
    ///
    /// # Errors
    /// When the root is gone.
    pub(crate) fn threads(self) -> Result<Vec<u32>> {
        let id = |task: PathBuf| task.file_name()?.to_str()?.parse().ok();
        Ok(self.tasks()?.into_iter().filter_map(id).collect())
    }
}

/// Every process with its parent. A process that ends meanwhile is left out.
fn parents() -> Result<Vec<(u32, u32)>> {
    let entries = fs::read_dir("/proc").context("read /proc")?;
    let parent = |entry: fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // "pid (name) state ppid …"; the name may hold anything, parentheses too.
        let after_name = &stat[stat.rfind(')')? + 1..];
        Some((pid, after_name.split_whitespace().nth(1)?.parse().ok()?))
    };
    Ok(entries.filter_map(|entry| parent(entry.ok()?)).collect())
}

/// Resident memory, or the proportional share of it where several processes share pages.
fn resident_bytes(pid: u32, is_shared: bool) -> Option<u64> {
    if is_shared && let Ok(text) = fs::read_to_string(dir(pid).join("smaps_rollup")) {
        return Some(field(&text, "Pss")? * 1024);
    }
    let text = fs::read_to_string(dir(pid).join("status")).ok()?;
    Some(field(&text, "VmRSS")? * 1024)
}

/// The number in a line "name:   123 …".
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

fn count_entries(dir: PathBuf) -> u64 {
    fs::read_dir(dir).map_or(0, |entries| entries.count() as u64)
}

fn dir(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "nonvoluntary_ctxt_switches:\t7\nvoluntary_ctxt_switches:\t5\nVmRSS:\t 12 kB\n";
        assert_eq!(field(text, "voluntary_ctxt_switches"), Some(5));
        assert_eq!(field(text, "VmRSS"), Some(12));
        assert_eq!(field(text, "VmHWM"), None);
    }

    #[test]
    fn a_sample_counts_new_threads_whole() {
        let earlier = CpuSample([(1, 100), (2, 50)].into());
        let later = CpuSample([(1, 150), (3, 30)].into());
        assert_eq!(later.since(&earlier), 80);
    }

    #[test]
    fn our_own_work_is_seen() {
        let tree = ProcessTree::new(std::process::id());
        let before = tree.cpu().unwrap();
        // As much as it takes: others use the CPUs, too.
        let start = Instant::now();
        let mut used = 0;
        while used <= 20_000_000 && start.elapsed() < Duration::from_secs(120) {
            std::hint::spin_loop();
            used = tree.cpu().unwrap().since(&before);
        }
        assert!(used > 20_000_000, "{used} ns");
        assert!(tree.holdings().unwrap().resident_bytes > 1 << 20);
    }

    #[test]
    fn children_belong_to_the_tree() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let processes = ProcessTree::new(std::process::id()).processes().unwrap();
        let id = child.id();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(processes.contains(&id));
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(ProcessTree::new(child.id()).cpu().is_err());
    }
}
