//! The load generator: an NBD client that does nothing but ask.

mod connect;
mod job;
mod ledger;
mod pacer;
mod pattern;
mod picker;
mod recorder;
mod session;
mod stream;
mod tls_stream;
mod tx;
mod worker;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

pub(crate) use connect::{Connection, Target};
pub(crate) use job::Workload;
use job::{Job, Phase};
use ledger::Ledger;
use pattern::SECTOR_SIZE;
pub(crate) use picker::Order;
use picker::Picker;
pub(crate) use recorder::{Recorder, histogram};
use session::Session;

use crate::process::ProcessTree;
use crate::signals::Interrupt;

/// The deepest queue of a connection.
pub(crate) const QUEUE_DEPTH_MAX: usize = 4096;

/// How often a load of so many requests is asked whether it is done.
const OPS_NAP: Duration = Duration::from_micros(200);

/// How long a load goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Length {
    /// For a time, after a warm-up that does not count.
    Time {
        /// Before it counts.
        warmup: Duration,
        /// While it counts.
        measure: Duration,
    },
    /// That many requests, all of which count.
    Ops(u64),
}

/// A load and where to put it.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The server.
    pub(crate) target: Target,
    /// What to do to it.
    pub(crate) workload: Workload,
    /// Connections in all.
    pub(crate) connections: usize,
    /// Threads that share the connections.
    pub(crate) threads: usize,
    /// For how long.
    pub(crate) length: Length,
    /// Bytes from the start of the volume to use; all of it by default.
    pub(crate) span: Option<u64>,
    /// Write checked patterns and check every read.
    pub(crate) verify: bool,
    /// Makes two loads alike.
    pub(crate) seed: u64,
    /// The server's process; on unix sockets it is found without.
    pub(crate) server: Option<ProcessTree>,
}

/// What came of a load.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Latencies, errors, faults.
    pub(crate) recorder: Recorder,
    /// How long it counted.
    pub(crate) elapsed: Duration,
    /// The server's process, if it is known.
    pub(crate) server: Option<ProcessTree>,
    /// The server's CPU time in that time.
    pub(crate) server_cpu_ns: Option<u64>,
    /// Our own.
    pub(crate) client_cpu_ns: u64,
}

impl Outcome {
    /// Requests per second.
    pub(crate) fn ops_per_s(&self) -> f64 {
        self.recorder.count() as f64 / self.elapsed.as_secs_f64()
    }

    /// Bytes read and written per second.
    pub(crate) fn bytes_per_s(&self, block_size: usize) -> f64 {
        let count = self.recorder.reads.len() + self.recorder.writes.len();
        count as f64 * block_size as f64 / self.elapsed.as_secs_f64()
    }

    /// The server's CPU time per request in microseconds.
    pub(crate) fn server_cpu_us_per_op(&self) -> Option<f64> {
        self.server_cpu_ns.map(|ns| self.us_per_op(ns))
    }

    /// Our own.
    pub(crate) fn client_cpu_us_per_op(&self) -> f64 {
        self.us_per_op(self.client_cpu_ns)
    }

    fn us_per_op(&self, ns: u64) -> f64 {
        ns as f64 / 1e3 / self.recorder.count().max(1) as f64
    }
}

/// Runs a load to its end.
///
/// # Errors
/// When it does not fit the volume, or a connection fails. Errors that the server answers with,
/// and faults, are in the outcome.
pub(crate) fn run(plan: &Plan) -> Result<Outcome> {
    run_unless(plan, &Interrupt::default(), || Ok(()))
}

/// The same, but `interrupt` ends it early; what was written is not read back then. Calls
/// `connected` before it begins.
///
/// # Errors
/// As [`run`], or what `connected` says.
pub(crate) fn run_unless(
    plan: &Plan,
    interrupt: &Interrupt,
    connected: impl FnOnce() -> Result<()>,
) -> Result<Outcome> {
    ensure!(plan.connections > 0 && plan.threads > 0, "at least one connection and one thread");
    let connections = connect_all(plan)?;
    let export = &connections[0];
    check_fits(plan, export)?;
    let block_size = plan.workload.block_size as u64;
    let span = plan.span.unwrap_or(u64::MAX).min(export.size());
    let blocks = span / block_size;
    // Without shared caches a connection sees for certain only its own writes.
    let is_split =
        plan.workload.order == Order::Sequential || (plan.verify && !export.is_multi_conn());
    let parts = if is_split { plan.connections as u64 } else { 1 };
    ensure!(
        blocks >= plan.connections as u64,
        "{span} bytes are less than {} blocks of {block_size} bytes",
        plan.connections
    );
    let server = plan.server.or_else(|| export.server());
    let ledger = plan.verify.then(|| new_ledger(plan, blocks)).transpose()?;
    let job = Job::new(plan.workload.clone(), ledger.clone(), plan.seed);
    let sessions = sessions(plan, &job, connections, Parts { blocks, count: parts });
    connected()?;
    let mut outcome = run_sessions(plan, &job, sessions, server, interrupt)?;
    if let Some(ledger) = ledger.filter(|_| !interrupt.is_set()) {
        read_back(plan, ledger, &mut outcome, interrupt)?;
    }
    Ok(outcome)
}

fn connect_all(plan: &Plan) -> Result<Vec<Connection>> {
    (0..plan.connections).map(|_| plan.target.connect()).collect()
}

/// Whether the export can do what the load wants.
fn check_fits(plan: &Plan, export: &Connection) -> Result<()> {
    let Workload { block_size, read_percent, flush_every, .. } = plan.workload;
    ensure!(
        (1..=export.payload_max()).contains(&block_size),
        "the server's block sizes end at {} bytes",
        export.payload_max()
    );
    ensure!(read_percent == 100 || !export.is_read_only(), "the export is read-only");
    ensure!(
        plan.span.is_none_or(|span| span <= export.size()),
        "--span is larger than the volume, which has {} bytes",
        export.size()
    );
    ensure!(flush_every.is_none() || export.can_flush(), "the server has no flush");
    Ok(())
}

fn new_ledger(plan: &Plan, blocks: u64) -> Result<Arc<Ledger>> {
    ensure!(
        plan.workload.block_size.is_multiple_of(SECTOR_SIZE),
        "verifying needs a block size that is a multiple of {SECTOR_SIZE}"
    );
    ensure!(
        blocks <= ledger::BLOCKS_MAX,
        "verifying covers at most {} blocks; use a smaller span",
        ledger::BLOCKS_MAX
    );
    Ok(Arc::new(Ledger::new(usize::try_from(blocks)?)))
}

/// How the blocks of a volume are dealt out to connections.
#[derive(Clone, Copy)]
struct Parts {
    blocks: u64,
    count: u64,
}

/// Sessions with their share of the volume and of the requests.
fn sessions<'a>(
    plan: &Plan,
    job: &'a Job,
    connections: Vec<Connection>,
    parts: Parts,
) -> Vec<Session<'a>> {
    let count = connections.len() as u64;
    let session = |(index, connection): (usize, Connection)| {
        let index = index as u64;
        let part = index % parts.count;
        let first = (0..part).map(|earlier| share(parts.blocks, parts.count, earlier)).sum();
        let blocks = share(parts.blocks, parts.count, part);
        let seed = plan.seed.wrapping_add(index.wrapping_mul(0x5851_f42d_4c95_7f2d));
        let picker = Picker::new(plan.workload.order.clone(), first, blocks, seed);
        let ops = match plan.length {
            Length::Ops(ops) => Some(share(ops, count, index)),
            Length::Time { .. } => None,
        };
        Session::new(job, connection, picker, ops)
    };
    connections.into_iter().enumerate().map(session).collect()
}

/// The share of `index` when `total` is dealt out to `count`.
fn share(total: u64, count: u64, index: u64) -> u64 {
    total / count + u64::from(index < total % count)
}

fn run_sessions(
    plan: &Plan,
    job: &Job,
    mut sessions: Vec<Session<'_>>,
    server: Option<ProcessTree>,
    interrupt: &Interrupt,
) -> Result<Outcome> {
    let per_thread = sessions.len().div_ceil(plan.threads);
    if matches!(plan.length, Length::Ops(_)) {
        job.set_phase(Phase::Measure);
    }
    let ended = thread::scope(|scope| {
        let threads: Vec<_> = sessions
            .chunks_mut(per_thread)
            .map(|mine| {
                scope.spawn(move || {
                    let mut recorder = Recorder::new();
                    worker::drive(job, mine, &mut recorder).map(|()| recorder)
                })
            })
            .collect();
        let window = measure(plan.length, job, server, || {
            let ended = threads.iter().filter(|thread| thread.is_finished()).count();
            (ended > 0 || interrupt.is_set(), ended == threads.len() || interrupt.is_set())
        });
        // Without it the threads would go on for ever.
        job.set_phase(Phase::Stop);
        let mut recorder = Recorder::new();
        for thread in threads {
            recorder.merge(&thread.join().expect("a load thread does not panic")?);
        }
        let Window { elapsed, server_cpu_ns, client_cpu_ns } = window?;
        Ok(Outcome { recorder, elapsed, server, server_cpu_ns, client_cpu_ns })
    });
    sessions.iter_mut().for_each(Session::disconnect);
    ended
}

/// The time in which a load counted.
struct Window {
    elapsed: Duration,
    server_cpu_ns: Option<u64>,
    client_cpu_ns: u64,
}

/// Leads a load through its phases. `ended` tells whether any and whether all threads have,
/// or are to.
fn measure(
    length: Length,
    job: &Job,
    server: Option<ProcessTree>,
    ended: impl Fn() -> (bool, bool),
) -> Result<Window> {
    let server_cpu = || server.map(ProcessTree::cpu).transpose();
    if let Length::Time { warmup, .. } = length {
        sleep_unless(warmup, || ended().0);
    }
    let before = (server_cpu()?, our_cpu());
    let start = Instant::now();
    job.set_phase(Phase::Measure);
    match length {
        Length::Time { measure, .. } => sleep_unless(measure, || ended().0),
        Length::Ops(_) => {
            while !ended().1 {
                thread::sleep(OPS_NAP);
            }
        }
    }
    // The phase ends what counts, before anything else takes time.
    job.set_phase(Phase::Stop);
    let elapsed = start.elapsed();
    let after = (server_cpu()?, our_cpu());
    Ok(Window {
        elapsed,
        server_cpu_ns: after.0.zip(before.0).map(|(after, before)| after.since(&before)),
        client_cpu_ns: nanos(after.1.saturating_sub(before.1)),
    })
}

/// Sleeps, but not on when a thread has failed.
fn sleep_unless(time: Duration, is_over: impl Fn() -> bool) {
    let end = Instant::now() + time;
    while !is_over() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// CPU time of this process.
fn our_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads all that was written once more, over a new connection.
fn read_back(
    plan: &Plan,
    ledger: Arc<Ledger>,
    outcome: &mut Outcome,
    interrupt: &Interrupt,
) -> Result<()> {
    let written: Arc<[u64]> = ledger.written().map(|block| block as u64).collect();
    let Ok(ops @ 1..) = u64::try_from(written.len()) else { return Ok(()) };
    let workload = Workload {
        read_percent: 100,
        order: Order::Listed(written),
        rate_per_connection: None,
        flush_every: None,
        ..plan.workload.clone()
    };
    let plan = Plan { length: Length::Ops(ops), connections: 1, ..plan.clone() };
    let job = Job::new(workload.clone(), Some(ledger), plan.seed);
    let picker = Picker::new(workload.order, 0, ops, plan.seed);
    let session = Session::new(&job, plan.target.connect()?, picker, Some(ops));
    let again = run_sessions(&plan, &job, vec![session], None, interrupt)?;
    outcome.recorder.add_checks(&again.recorder);
    Ok(())
}

#[cfg(test)]
mod nbdkit_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_the_total() {
        for (total, count) in [(10, 3), (3, 10), (0, 2), (12, 4)] {
            let all: u64 = (0..count).map(|index| share(total, count, index)).sum();
            assert_eq!(all, total);
        }
    }
}
