//! One process is killed at each of its steps in each call of a claim's life. After each kill the
//! same call is repeated until it is done, and nothing is lost, doubled or left.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use super::claim::{Claim, Known, Pod, Use};
use super::ops::Op;
use super::orchestrator::Orchestrator;
use super::{Cluster, Process, Processes};
use crate::{PATIENCE, Trace, eventually, note};

const MIB: i64 = 1 << 20;
const PODS: [&str; 2] = ["pod-1", "pod-2"];

/// Steps of one kind in a call that are tried, evenly spread.
const EQUAL_MAX: usize = 8;

/// How long a killed process is away, if the call has no answer before: what uses a device waits
/// for its daemon in the kernel.
const AWAY: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(5);

/// What has been done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Killed {
    /// Calls in which the process was killed.
    pub kills: usize,
    /// The longest time from a kill until the call was done.
    pub longest: Duration,
}

/// A claim's life: it is made, used, made longer, used again, and deleted.
fn life() -> Vec<Op> {
    let pod = |at: usize| PODS[at].to_owned();
    vec![
        Op::Create,
        Op::Attach,
        Op::Stage,
        Op::Mount(pod(0)),
        Op::Stats(pod(0)),
        Op::Grow,
        Op::Unmount(pod(0)),
        Op::Unstage,
        Op::Stage,
        Op::Mount(pod(1)),
        Op::Unmount(pod(1)),
        Op::Unstage,
        Op::Detach,
        Op::Delete,
    ]
}

struct Run<'a> {
    cluster: &'a mut Cluster,
    process: Process,
    used: Use,
    size: i64,
    orchestrator: Orchestrator,
    /// A claim whose pod writes all the time.
    bystander: Vec<Claim>,
    /// Steps of each call of a life that have not been tried yet, with the number of each.
    steps: Vec<Vec<(String, usize)>>,
    lives: usize,
    killed: Killed,
}

/// Kills a process at every `stride`th of its steps.
///
/// # Panics
/// When something is lost, doubled or left, or the pod beside has an error.
pub fn kill_at_each_step(
    cluster: &mut Cluster,
    process: Process,
    used: (Use, i64),
    stride: usize,
) -> Killed {
    let orchestrator = Orchestrator::new(cluster.setup(&[used], 0, 0));
    let mut run = Run {
        cluster,
        process,
        used: used.0,
        size: used.1 * MIB,
        orchestrator,
        bystander: Vec::new(),
        steps: Vec::new(),
        lives: 0,
        killed: Killed::default(),
    };
    let mut bystander =
        Claim::new("bystander".to_owned(), Use::Filesystem("ext4"), false, 32 * MIB);
    for op in &life()[..4] {
        run.prepare(&mut bystander, op);
        run.finish(&mut bystander, op);
    }
    run.bystander.push(bystander);
    run.count();
    let all: usize = run.steps.iter().map(Vec::len).sum();
    let mut at = 0;
    for steps in &mut run.steps {
        // Of all calls together, so that none is left out.
        steps.retain(|_| {
            at += 1;
            at % stride == 0
        });
        steps.reverse();
    }
    while run.steps.iter().any(|steps| !steps.is_empty()) {
        run.live();
    }
    run.end();
    note(&format!("{process:?}: {all} steps, {:?}\n", run.killed));
    run.killed
}

impl Run<'_> {
    /// What people and schedulers do before a call.
    fn prepare(&mut self, claim: &mut Claim, op: &Op) {
        match op {
            // The pod is there before its volume is attached.
            Op::Attach | Op::Stage if claim.pods.is_empty() => {
                let uid = PODS[usize::from(*op == Op::Stage)].to_owned();
                claim.pods.push(Pod { uid, deleted: false, mount: Known::No, writer: None });
            }
            Op::Unmount(_) => {
                let _ = claim.end_pod(0);
            }
            Op::Grow if claim.may_grow() => claim.wanted += 16 * MIB,
            Op::Delete => claim.deleted = true,
            _ => {}
        }
    }

    /// Calls until it is done.
    #[track_caller]
    fn finish(&self, claim: &mut Claim, op: &Op) {
        assert!(eventually(|| self.orchestrator.call(claim, op)), "{op:?} is never done");
    }

    /// Calls end by themselves, within a time that the orchestrator checks.
    fn wait_until(&mut self, mut is_true: impl FnMut(&mut Self) -> bool) {
        while !is_true(self) {
            thread::sleep(POLL);
        }
    }

    fn new_claim(&mut self) -> Claim {
        self.lives += 1;
        Claim::new(format!("life-{}", self.lives), self.used, false, self.size)
    }

    /// Finds out what steps the process has in each call.
    fn count(&mut self) {
        let dir = self.cluster.node.node.kernel.scratch().path().to_owned();
        let mut claim = self.new_claim();
        for op in life() {
            self.prepare(&mut claim, &op);
            let trace = Trace::record(self.cluster.pid(self.process), &dir);
            let call = self.orchestrator.begin(&claim, &op, PATIENCE);
            self.wait_until(|_| call.is_finished());
            // What the pod does afterwards is no part of the call.
            let counts: BTreeMap<_, _> = trace.counts();
            if !self.orchestrator.end(&mut claim, &op, call) {
                self.finish(&mut claim, &op);
            }
            // Of messages there may be many, such as answers to the kernel.
            let each = |(name, count): (String, usize)| {
                let nths = (1..=count).step_by(count.div_ceil(EQUAL_MAX).max(1));
                nths.map(move |nth| (name.clone(), nth))
            };
            self.steps.push(counts.into_iter().flat_map(each).collect());
        }
    }

    /// A claim's life, with a kill in each call.
    fn live(&mut self) {
        let mut claim = self.new_claim();
        for (at, op) in life().iter().enumerate() {
            self.prepare(&mut claim, op);
            match self.steps[at].pop() {
                Some((step, nth)) => self.call_and_kill(&mut claim, op, &step, nth),
                None => self.finish(&mut claim, op),
            }
        }
    }

    fn call_and_kill(&mut self, claim: &mut Claim, op: &Op, step: &str, nth: usize) {
        let dir = self.cluster.node.node.kernel.scratch().path().to_owned();
        let trace = Trace::kill_at(self.cluster.pid(self.process), step, nth, &dir);
        let begun = Instant::now();
        let call = self.orchestrator.begin(claim, op, PATIENCE);
        self.wait_until(|run| call.is_finished() || run.cluster.has_ended(run.process));
        let since = Instant::now();
        self.wait_until(|_| call.is_finished() || since.elapsed() > AWAY);
        trace.end();
        self.killed.kills += usize::from(self.cluster.has_ended(self.process));
        // It has fewer steps now and then, such as messages that are sent together. Then it is
        // killed after the call. It may also be about to die.
        self.cluster.kill_and_start(self.process);
        // Only now, since learning reads and writes the volume.
        let mut is_done = self.orchestrator.end(claim, op, call);
        let what = format!("{:?} killed at {step} {nth} of {op:?}", self.process);
        let converged = eventually(|| {
            is_done = is_done || self.orchestrator.call(claim, op);
            is_done
        });
        let took = begun.elapsed();
        assert!(converged, "{what}: not done after {PATIENCE:?}");
        self.killed.longest = self.killed.longest.max(took);
        // Again, it is the same.
        let may_repeat = !matches!(op, Op::Unmount(_) | Op::Unstage | Op::Detach | Op::Delete);
        if may_repeat {
            self.finish(claim, op);
        }
        self.check(claim);
    }

    #[track_caller]
    fn check(&mut self, claim: &mut Claim) {
        let other = Claim::new(String::new(), Use::Block, false, 0);
        self.bystander.push(std::mem::replace(claim, other));
        self.orchestrator.check(&mut self.bystander);
        *claim = self.bystander.pop().expect("the claim");
    }

    /// The pod beside has had no error, and all that it has flushed is there.
    fn end(&mut self) {
        let mut claim = self.bystander.pop().expect("a claim");
        for op in life().into_iter().skip(6) {
            self.prepare(&mut claim, &op);
            self.finish(&mut claim, &op);
        }
        self.orchestrator.check(&mut []);
    }
}
