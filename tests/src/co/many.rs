//! Many rounds with one volume, and many volumes at once: what a node has afterwards is what it had
//! before.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::claim::{Claim, Known, Pod, Use};
use super::ops::Op;
use super::orchestrator::Orchestrator;
use super::{Cluster, Process};
use crate::{PATIENCE, eventually};

const MIB: i64 = 1 << 20;
const POD: &str = "pod";
/// Rounds before anything is counted: pools of threads and buffers are filled by then.
const WARM_UP: usize = 8;

/// What a node has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Things {
    mounts: BTreeSet<String>,
    devices: BTreeSet<String>,
    /// Of the daemon and the plugin.
    descriptors: [usize; 2],
    states: usize,
}

/// How much memory a process has, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Of the daemon and the plugin, before all rounds.
    pub before_kib: [u64; 2],
    /// And after them.
    pub after_kib: [u64; 2],
}

impl Things {
    fn of(cluster: &Cluster) -> Self {
        let count = |dir: &str| fs::read_dir(dir).into_iter().flatten().count();
        let text = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let mounts = text.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned);
        let pids = [Process::Daemon, Process::Node].map(|process| cluster.pid(process));
        let states = cluster.node.node.file("node");
        Self {
            mounts: mounts.collect(),
            devices: loop_files(cluster),
            descriptors: pids.map(|pid| count(&format!("/proc/{pid}/fd"))),
            states: count(states.to_str().expect("UTF-8")),
        }
    }

    /// Another program of this machine may remove what it has mounted, also in this namespace
    /// (mount_namespaces(7)).
    fn forget_foreign_mounts(&self, had: &mut Self, cluster: &Cluster) {
        let ours = cluster.node.node.kernel.scratch().path();
        had.mounts.retain(|path| self.mounts.contains(path) || Path::new(path).starts_with(ours));
    }
}

/// What loop devices are made of that are ours: other programs have some, too.
fn loop_files(cluster: &Cluster) -> BTreeSet<String> {
    let dir = cluster.node.node.kernel.scratch().path().to_str().expect("UTF-8");
    let blocks = fs::read_dir("/sys/block").expect("block devices").flatten();
    let files = blocks.map(|block| fs::read_to_string(block.path().join("loop/backing_file")));
    files.flatten().filter(|file| file.starts_with(dir)).collect()
}

/// Stages, publishes, unpublishes and unstages a volume so many times.
///
/// # Panics
/// When a mount, device, descriptor or file is left, or data is lost.
pub fn cycle(cluster: &mut Cluster, used: (Use, i64), rounds: usize) -> Memory {
    let orchestrator = Orchestrator::new(cluster.setup(&[used], 0, 0));
    let mut claim = Claim::new("cycled".to_owned(), used.0, false, used.1 * MIB);
    let do_all = |claim: &mut Claim, ops: &[Op]| {
        for op in ops {
            assert!(eventually(|| orchestrator.call(claim, op)), "{op:?}");
        }
    };
    do_all(&mut claim, &[Op::Create, Op::Attach]);
    let round = |claim: &mut Claim, at: usize| {
        let uid = format!("pod-{at}");
        claim.pods.push(pod(&uid));
        do_all(claim, &[Op::Stage, Op::Mount(uid.clone())]);
        claim.end_pod(0);
        do_all(claim, &[Op::Unmount(uid), Op::Unstage]);
    };
    for at in 0..WARM_UP {
        round(&mut claim, at);
    }
    let (mut had, before_kib) = (Things::of(cluster), memory(cluster));
    for at in 0..rounds {
        round(&mut claim, WARM_UP + at);
    }
    let mut has = Things::of(cluster);
    // Connections and threads that end a little later.
    let _ = eventually(|| {
        has = Things::of(cluster);
        has.forget_foreign_mounts(&mut had, cluster);
        has == had
    });
    assert_eq!(has, had, "after {rounds} rounds");
    let after_kib = memory(cluster);
    claim.deleted = true;
    do_all(&mut claim, &[Op::Detach, Op::Delete]);
    Memory { before_kib, after_kib }
}

/// Stages so many volumes at once, uses them, and unstages them at once. Returns how long it took
/// until all pods had their volumes.
///
/// # Panics
/// When something is left or of another volume.
pub fn all_at_once(cluster: &mut Cluster, used: (Use, i64), count: usize) -> Duration {
    let orchestrator = Orchestrator::new(cluster.setup(&[used], 0, 0));
    let name = |index| format!("volume-{index}");
    let new = |index| Claim::new(name(index), used.0, false, used.1 * MIB);
    let mut claims: Vec<_> = (0..count).map(new).collect();
    let mount = || Op::Mount(POD.to_owned());
    each(&orchestrator, &mut claims, &Op::Create);
    claims.iter_mut().for_each(|claim| claim.pods.push(pod(POD)));
    each(&orchestrator, &mut claims, &Op::Attach);
    let begun = Instant::now();
    each(&orchestrator, &mut claims, &Op::Stage);
    each(&orchestrator, &mut claims, &mount());
    let took = begun.elapsed();
    orchestrator.check(&mut claims);
    claims.iter_mut().for_each(|claim| {
        let _ = claim.end_pod(0);
    });
    each(&orchestrator, &mut claims, &Op::Unmount(POD.to_owned()));
    each(&orchestrator, &mut claims, &Op::Unstage);
    each(&orchestrator, &mut claims, &Op::Detach);
    claims.iter_mut().for_each(|claim| claim.deleted = true);
    each(&orchestrator, &mut claims, &Op::Delete);
    orchestrator.check(&mut []);
    took
}

/// Makes a call for all claims at once, and again for those that are not done.
#[track_caller]
fn each(orchestrator: &Orchestrator, claims: &mut [Claim], op: &Op) {
    let mut left: Vec<_> = (0..claims.len()).collect();
    let done = eventually(|| {
        let begin = |at: &usize| orchestrator.begin(&claims[*at], op, PATIENCE);
        let calls: Vec<_> = left.iter().map(begin).collect();
        let answers: Vec<_> = calls.into_iter().map(|call| orchestrator.wait(call)).collect();
        let tried = std::mem::take(&mut left);
        for (at, answer) in tried.into_iter().zip(answers) {
            if answer.is_err() {
                left.push(at);
            }
            op.learn(&mut claims[at], answer, &orchestrator.context());
        }
        left.is_empty()
    });
    assert!(done, "{op:?}: {} are not done", left.len());
}

fn pod(uid: &str) -> Pod {
    Pod { uid: uid.to_owned(), deleted: false, mount: Known::No, writer: None }
}

fn memory(cluster: &Cluster) -> [u64; 2] {
    [Process::Daemon, Process::Node].map(|process| resident_kib(cluster.pid(process)))
}

/// The resident memory of a process (proc_pid_status(5)).
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.expect("VmRSS").parse().expect("a number")
}
