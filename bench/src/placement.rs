//! On which CPUs client and server run.

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

use crate::process::ProcessTree;

/// Passes over a server's threads until none is new.
const PASSES_MAX: usize = 8;

/// Where client and server run. Waking a thread on another, idle CPU costs tens of microseconds
/// on virtual machines, so this decides more than many a design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Placement {
    /// Wherever the scheduler puts them
    Unpinned,
    /// All on one CPU
    Together,
    /// The client on CPUs of its own
    Apart,
}

impl Placement {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Unpinned, Self::Together, Self::Apart];

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unpinned => "unpinned",
            Self::Together => "pinned together",
            Self::Apart => "pinned apart",
        }
    }
}

/// The CPUs that we were given at the start.
#[derive(Clone, Debug)]
pub(crate) struct Cpus(Vec<usize>);

impl Cpus {
    /// Those we may run on.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn ours() -> Result<Self> {
        let set = sched_getaffinity(None).context("sched_getaffinity")?;
        Ok(Self((0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Puts the calling thread, and those it will start, in the client's place, and all of a
    /// server's threads in the server's.
    ///
    /// # Errors
    /// When there are too few CPUs, or the server is gone.
    pub(crate) fn place(&self, placement: Placement, server: ProcessTree) -> Result<()> {
        let (client, server_cpus) = self.split(placement)?;
        let all = set(&server_cpus);
        let mut done = Vec::new();
        for _ in 0..PASSES_MAX {
            let new: Vec<_> =
                server.threads()?.into_iter().filter(|thread| !done.contains(thread)).collect();
            if new.is_empty() {
                break;
            }
            for thread in new {
                let id = i32::try_from(thread).ok().and_then(Pid::from_raw);
                // A thread that has ended needs no place.
                let _ = sched_setaffinity(Some(id.context("a thread id")?), &all);
                done.push(thread);
            }
        }
        sched_setaffinity(None, &set(&client)).context("sched_setaffinity")
    }

    /// Gives the calling thread all CPUs back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn release(&self) -> Result<()> {
        sched_setaffinity(None, &set(&self.0)).context("sched_setaffinity")
    }

    /// The client's CPUs and the server's.
    fn split(&self, placement: Placement) -> Result<(Vec<usize>, Vec<usize>)> {
        match placement {
            Placement::Unpinned => Ok((self.0.clone(), self.0.clone())),
            Placement::Together => Ok((vec![self.0[0]], vec![self.0[0]])),
            Placement::Apart => {
                ensure!(self.0.len() > 1, "placing client and server apart takes two CPUs");
                Ok((self.0[..1].to_vec(), self.0[1..].to_vec()))
            }
        }
    }
}

fn set(cpus: &[usize]) -> CpuSet {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu);
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apart_shares_no_cpu() {
        let (client, server) = Cpus(vec![0, 1, 5]).split(Placement::Apart).unwrap();
        assert!(client.iter().all(|cpu| !server.contains(cpu)));
        assert_eq!(client.len() + server.len(), 3);
        assert!(Cpus(vec![0]).split(Placement::Apart).is_err());
    }

    #[test]
    fn together_is_one_cpu() {
        let (client, server) = Cpus(vec![3, 4]).split(Placement::Together).unwrap();
        assert_eq!((client, server), (vec![3], vec![3]));
    }

    #[test]
    fn a_server_is_moved_and_we_get_our_cpus_back() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let cpus = Cpus::ours().unwrap();
        cpus.place(Placement::Together, ProcessTree::new(child.id())).unwrap();
        let of_child = sched_getaffinity(Some(pid)).unwrap();
        let of_us = sched_getaffinity(None).unwrap();
        cpus.release().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((of_child.count(), of_us.count()), (1, 1));
        assert_eq!(sched_getaffinity(None).unwrap().count() as usize, cpus.count());
    }
}
