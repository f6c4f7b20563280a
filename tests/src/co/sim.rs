//! The schedule: what is wanted, what is called, what goes wrong.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tonic::Status;

use super::calls::Answer;
use super::claim::{Claim, Known, Pod, Use};
use super::ops::Op;
use super::orchestrator::Orchestrator;
use super::rng::Rng;
use crate::{PATIENCE, note};

const MIB: i64 = 1 << 20;
/// Claims at a time.
const CLAIMS_MAX: usize = 5;
const PODS_MAX: usize = 3;
/// Calls under way at once.
const CALLS_MAX: usize = 5;
/// Longest wait for a repeated call, in steps. Kubernetes has seconds there.
const BACKOFF_MAX: u64 = 16;
/// What a failure shows of the steps before it.
const TRACE_MAX: usize = 200;
const PAUSE: Duration = Duration::from_millis(5);

/// A process that may be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// The plugin that serves Node.
    Node,
    /// The one that serves Controller.
    Controller,
    /// The daemon.
    Daemon,
}

/// The processes under test.
pub trait Processes {
    /// Those that may be killed.
    fn mortal(&self) -> &[Process];

    /// Kills one and starts the next, which answers when this returns.
    fn kill_and_start(&mut self, process: Process);
}

/// Where the plugin is, and what is done with it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Socket of the plugin that serves Controller.
    pub controller: PathBuf,
    /// Socket of the plugin that serves Node.
    pub node: PathBuf,
    /// The daemon's control socket.
    pub control: PathBuf,
    /// The node's id.
    pub node_id: String,
    /// For kubelet's directories; the plugin finds it under the same path.
    pub dir: PathBuf,
    /// Parameters of the storage class, such as `pool` and `front`.
    pub parameters: HashMap<String, String>,
    /// How claims are used, and their first sizes in MiB.
    pub uses: Vec<(Use, i64)>,
    /// Devices may be such that cannot grow while they are in use.
    pub grows_later: bool,
    /// How many times longer everything may take than on a machine: 1, or more in an emulated one.
    pub slowness: u32,
    /// Determines the schedule.
    pub seed: u64,
    /// How long it is.
    pub steps: u64,
}

impl Setup {
    /// A time on a machine, as it is here.
    pub(super) fn slowed(&self, time: Duration) -> Duration {
        time * self.slowness
    }
}

/// What has been done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Calls that were answered, and those of them whose outcome was uncertain.
    pub calls: u64,
    /// See `calls`.
    pub uncertain: u64,
    /// Claims from their creation to their deletion.
    pub claims: u64,
    /// Filesystems and devices that pods had.
    pub pods: u64,
    /// Processes that were killed.
    pub kills: u64,
    /// How long a pod's longest write took, flushed.
    pub longest_write: Duration,
}

struct Sim<'a> {
    orchestrator: Orchestrator,
    processes: &'a mut dyn Processes,
    rng: Rng,
    claims: Vec<Claim>,
    /// When a call may be repeated, and after how many steps the next time.
    backoff: HashMap<(String, Op), (u64, u64)>,
    step: u64,
    made: u64,
    report: Report,
    trace: Vec<String>,
}

/// Does what a seed says, and ends when nothing is left of it.
///
/// # Panics
/// When the plugin breaks a rule. The message has the seed.
pub fn run(setup: &Setup, processes: &mut dyn Processes) -> Report {
    let mut sim = Sim {
        orchestrator: Orchestrator::new(setup.clone()),
        processes,
        rng: Rng::new(setup.seed),
        claims: Vec::new(),
        backoff: HashMap::new(),
        step: 0,
        made: 0,
        report: Report::default(),
        trace: Vec::new(),
    };
    while sim.step < setup.steps {
        sim.change_wishes();
        sim.do_step(true);
    }
    sim.end();
    note(&format!("seed {}: {:?}\n", setup.seed, sim.report));
    sim.report
}

impl Drop for Sim<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let first = self.trace.len().saturating_sub(TRACE_MAX);
            let steps = self.trace[first..].join("\n");
            note(&format!(
                "{steps}\nseed {} failed at step {}\n",
                self.orchestrator.setup.seed, self.step
            ));
        }
    }
}

impl Sim<'_> {
    /// What people and schedulers do between two steps.
    fn change_wishes(&mut self) {
        match self.rng.below(100) {
            0..10 => self.make_claim(),
            10..30 => self.add_pod(),
            30..45 => self.delete_pod(),
            45..55 => self.delete_claim(),
            55..59 => self.grow_claim(),
            59..62 => {
                self.say("kubelet restarts".to_owned());
                let kubelet = &self.orchestrator.kubelet;
                self.claims.iter_mut().for_each(|claim| kubelet.reconstruct(claim));
            }
            _ => {}
        }
    }

    fn make_claim(&mut self) {
        if self.claims.len() >= CLAIMS_MAX {
            return;
        }
        self.made += 1;
        let (used, size) = self.orchestrator.setup.uses
            [self.rng.below(self.orchestrator.setup.uses.len() as u64) as usize];
        let name = format!("pvc-{:x}-{}", self.orchestrator.setup.seed, self.made);
        let for_one_pod = self.rng.chance(25);
        self.say(format!("claim {name} {used:?} of {size} MiB, one pod {for_one_pod}"));
        self.claims.push(Claim::new(name, used, for_one_pod, size * MIB));
        self.report.claims += 1;
    }

    /// One of the claims, if there are any.
    fn any(&mut self) -> Option<usize> {
        let count = self.claims.len() as u64;
        (count > 0).then(|| self.rng.below(count) as usize)
    }

    fn add_pod(&mut self) {
        let Some(at) = self.any() else { return };
        self.made += 1;
        let claim = &mut self.claims[at];
        // The scheduler lets one pod have a ReadWriteOncePod.
        let most = if claim.for_one_pod { 1 } else { PODS_MAX };
        if claim.deleted || claim.pods.len() >= most {
            return;
        }
        let uid = format!("pod-{}", self.made);
        let said = format!("{uid} wants {}", claim.name);
        claim.pods.push(Pod { uid, deleted: false, mount: Known::No, writer: None });
        self.report.pods += 1;
        self.say(said);
    }

    fn delete_pod(&mut self) {
        let Some(at) = self.any() else { return };
        let choice = self.rng.next() as usize;
        let claim = &mut self.claims[at];
        if claim.pods.is_empty() {
            return;
        }
        let pod = choice % claim.pods.len();
        let said = format!("{} of {} is deleted", claim.pods[pod].uid, claim.name);
        let longest = claim.end_pod(pod);
        self.report.longest_write = self.report.longest_write.max(longest);
        self.say(said);
    }

    fn delete_claim(&mut self) {
        let Some(at) = self.any() else { return };
        let claim = &mut self.claims[at];
        // The claim of a pod is protected until the pod is gone.
        if claim.pods.is_empty() && !claim.deleted {
            claim.deleted = true;
            let said = format!("{} is deleted", claim.name);
            self.say(said);
        }
    }

    fn grow_claim(&mut self) {
        let Some(at) = self.any() else { return };
        let claim = &mut self.claims[at];
        if claim.volume.is_some() && !claim.deleted && claim.may_grow() {
            claim.wanted += claim.wanted / 2;
            let said = format!("{} is to have {} bytes", claim.name, claim.wanted);
            self.say(said);
        }
    }

    /// Makes calls that are due, waits for their ends, and checks what is there.
    fn do_step(&mut self, with_faults: bool) {
        self.step += 1;
        self.claims.iter_mut().for_each(Claim::forget_unmounted);
        self.claims.retain(|claim| !claim.is_gone());
        let due = self.due();
        if due.is_empty() {
            return thread::sleep(PAUSE);
        }
        let mut under_way = Vec::new();
        for (at, op) in due {
            under_way.push((at, op.clone(), self.begin(at, &op, with_faults)));
        }
        let mortal = self.processes.mortal().to_vec();
        if with_faults && !mortal.is_empty() && self.rng.chance(12) {
            let process = mortal[self.rng.below(mortal.len() as u64) as usize];
            let after = Duration::from_millis(self.rng.below(60));
            thread::sleep(self.orchestrator.setup.slowed(after));
            self.say(format!("kill {process:?}"));
            self.processes.kill_and_start(process);
            self.report.kills += 1;
        }
        for (at, op, ends) in under_way {
            let mut answers: Vec<_> =
                ends.into_iter().map(|end| self.orchestrator.wait(end)).collect();
            // kubelet sees the first of two equal calls.
            let answer = answers.remove(0);
            self.learn(at, &op, answer);
        }
        self.check();
    }

    /// Calls that may be made now, in any order; each part has one for a claim.
    fn due(&mut self) -> Vec<(usize, Op)> {
        let mut due: Vec<_> = self
            .claims
            .iter()
            .enumerate()
            .flat_map(|(at, claim)| Op::ready(claim).into_iter().map(move |op| (at, op)))
            .collect();
        due.retain(|(at, op)| {
            let key = (self.claims[*at].name.clone(), op.clone());
            self.backoff.get(&key).is_none_or(|(from, _)| *from <= self.step)
        });
        self.rng.shuffle(&mut due);
        // Statistics can always be read.
        due.sort_by_key(|(_, op)| matches!(op, Op::Stats(_)));
        let mut busy = HashSet::new();
        due.retain(|(at, op)| busy.insert((*at, op.part())));
        due.truncate(CALLS_MAX);
        due
    }

    /// Begins a call: perhaps twice at once, as two leaders do, perhaps with a caller that leaves.
    fn begin(
        &mut self,
        at: usize,
        op: &Op,
        with_faults: bool,
    ) -> Vec<JoinHandle<Result<Answer, Status>>> {
        let fault = if with_faults { self.rng.below(100) } else { 99 };
        let limit = match fault {
            0..10 => Duration::from_millis(self.rng.below(30)),
            10..15 => Duration::from_millis(self.rng.below(400)),
            _ => PATIENCE,
        };
        let limit = self.orchestrator.setup.slowed(limit);
        let count = if (15..25).contains(&fault) { 2 } else { 1 };
        let said = match fault {
            0..15 => format!(", cut off after {limit:?}"),
            15..25 => ", twice".to_owned(),
            _ => String::new(),
        };
        let said = format!("{} {op:?}{said}", self.claims[at].name);
        self.say(said);
        let begin = |_| self.orchestrator.begin(&self.claims[at], op, limit);
        (0..count).map(begin).collect()
    }

    fn learn(&mut self, at: usize, op: &Op, answer: Result<Answer, Status>) {
        self.report.calls += 1;
        let said = match &answer {
            Ok(_) => "ok".to_owned(),
            Err(status) => format!("{:?} {}", status.code(), status.message()),
        };
        let name = self.claims[at].name.clone();
        self.say(format!("{name} {op:?}: {said}"));
        let key = (name, op.clone());
        if answer.is_ok() {
            self.backoff.remove(&key);
        } else {
            self.report.uncertain += 1;
            let (_, last) = self.backoff.get(&key).copied().unwrap_or_default();
            let next = (last * 2).clamp(1, BACKOFF_MAX);
            self.backoff.insert(key, (self.step + next, next));
        }
        op.learn(&mut self.claims[at], answer, &self.orchestrator.context());
    }

    #[track_caller]
    fn check(&mut self) {
        self.orchestrator.check(&mut self.claims);
    }

    /// Deletes all; it converges, and nothing is left.
    fn end(&mut self) {
        self.say("all is deleted".to_owned());
        for claim in &mut self.claims {
            for pod in 0..claim.pods.len() {
                let longest = claim.end_pod(pod);
                self.report.longest_write = self.report.longest_write.max(longest);
            }
            claim.deleted = true;
        }
        let (begun, patience) = (Instant::now(), self.orchestrator.setup.slowed(PATIENCE));
        while !self.claims.is_empty() {
            assert!(begun.elapsed() < patience, "it does not converge");
            self.do_step(false);
        }
        self.check();
        let found = self.orchestrator.find();
        assert!(found.devices.is_empty() && found.volumes.is_empty(), "something is left");
        check_empty(&self.orchestrator.setup.dir.join("plugins"));
    }

    fn say(&mut self, text: String) {
        self.trace.push(format!("{:4} {text}", self.step));
    }
}

/// Checks that a directory has nothing but directories.
#[track_caller]
fn check_empty(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        assert!(path.is_dir(), "{} is left", path.display());
        check_empty(&path);
    }
}
