//! Running a row: the servers take turns within each repetition, so that whatever happens on the
//! machine meanwhile happens to all of them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use super::fio;
use super::product::{Product, Volume};
use super::results::{Cell, RowResult};
use super::rows::Row;
use super::server::Server;
use crate::load::{self, Length, Order, Outcome, Plan, Workload, histogram};
use crate::placement::{Cpus, Placement};
use crate::stats::{Percentiles, Spread, curve};

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Repetitions.
    pub(crate) runs: usize,
    /// Before a run counts.
    pub(crate) warmup: Duration,
    /// While it counts.
    pub(crate) measure: Duration,
    /// Threads of the client.
    pub(crate) threads: usize,
}

/// The runs of one server in one row.
struct Runs {
    latencies: Histogram<u64>,
    ops_per_s: Vec<f64>,
    bytes_per_s: Vec<f64>,
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    cpu_us_per_op: Vec<f64>,
    client_cpu_us_per_op: Vec<f64>,
    /// Why there are no more of them.
    failure: Option<String>,
}

/// Runs a row on every server. Servers that fail are left out and named in `skipped`.
///
/// # Errors
/// When the CPUs cannot be set.
pub(crate) fn row(
    row: &Row,
    placement: Placement,
    servers: &[Server],
    effort: Effort,
    cpus: &Cpus,
    skipped: &mut Vec<String>,
) -> Result<RowResult> {
    let mut runs: Vec<Runs> = servers.iter().map(|_| Runs::new()).collect();
    let mut fio_ops_per_s = Vec::new();
    for repetition in 0..effort.runs {
        for turn in 0..servers.len() {
            // Another one begins each time: being first may be an advantage.
            let index = (turn + repetition) % servers.len();
            if runs[index].failure.is_none() {
                let ended = one_run(row, placement, &servers[index], effort, cpus);
                runs[index].add(row, ended);
            }
        }
        if row.volume == Volume::Direct
            && let Some(ops) = fio_run(row, servers, effort, skipped)
        {
            fio_ops_per_s.push(ops);
        }
    }
    cpus.release()?;
    let mut cells = Vec::new();
    for (server, runs) in servers.iter().zip(runs) {
        let name = server.product.name();
        match &runs.failure {
            Some(why) => skipped.push(format!("{name} in {}: {why}", row.id)),
            None => cells.push(runs.cell(server).with_context(|| format!("{name}: {}", row.id))?),
        }
    }
    let fio_ops_per_s = Spread::of(fio_ops_per_s);
    Ok(RowResult { row: row.clone(), placement, cells, fio_ops_per_s })
}

/// How long a server may take for its first answer.
const PATIENT: Duration = Duration::from_secs(5);

fn one_run(
    row: &Row,
    placement: Placement,
    server: &Server,
    effort: Effort,
    cpus: &Cpus,
) -> Result<Outcome> {
    cpus.place(placement, server.process())?;
    let mut plan = Plan {
        target: server.target.clone(),
        workload: Workload {
            read_percent: if row.is_read { 100 } else { 0 },
            order: Order::Random,
            block_size: row.block_size,
            queue_depth: row.queue_depth,
            rate_per_connection: None,
            flush_every: None,
        },
        connections: row.connections,
        threads: effort.threads.min(row.connections),
        length: Length::Time { warmup: effort.warmup, measure: effort.measure },
        span: None,
        verify: false,
        seed: 1,
        server: Some(server.process()),
    };
    let mut outcome = load::run(&plan)?;
    if outcome.recorder.count() == 0 {
        // A short look at a slow server on a busy machine: it gets the time for an answer.
        plan.length = Length::Time { warmup: effort.warmup, measure: PATIENT };
        outcome = load::run(&plan)?;
    }
    if let Some(image) = &server.image {
        image.settle()?;
    }
    let errors = &outcome.recorder.errors;
    ensure!(errors.is_empty(), "the server answered with errors: {errors:?}");
    ensure!(outcome.recorder.count() > 0, "no request was answered in time");
    Ok(outcome)
}

/// fio on the file that our server serves, which has nothing to do meanwhile.
fn fio_run(
    row: &Row,
    servers: &[Server],
    effort: Effort,
    skipped: &mut Vec<String>,
) -> Option<f64> {
    let ours = servers.iter().find(|server| server.product == Product::Sheave)?;
    let image = ours.image.as_ref()?;
    fio::direct(image.path(), row, effort.measure)
        .inspect_err(|error| skipped.push(format!("fio in {}: {error:#}", row.id)))
        .ok()
}

impl Runs {
    fn new() -> Self {
        Self {
            latencies: histogram(),
            ops_per_s: Vec::new(),
            bytes_per_s: Vec::new(),
            p50_us: Vec::new(),
            p99_us: Vec::new(),
            cpu_us_per_op: Vec::new(),
            client_cpu_us_per_op: Vec::new(),
            failure: None,
        }
    }

    fn add(&mut self, row: &Row, ended: Result<Outcome>) {
        let outcome = match ended {
            Ok(outcome) => outcome,
            Err(error) => {
                self.failure = Some(format!("{error:#}"));
                return;
            }
        };
        let all = outcome.recorder.all();
        let Percentiles { p50_us, p99_us, .. } = Percentiles::of(&all);
        self.ops_per_s.push(outcome.ops_per_s());
        self.bytes_per_s.push(outcome.bytes_per_s(row.block_size));
        self.p50_us.push(p50_us);
        self.p99_us.push(p99_us);
        self.cpu_us_per_op.push(outcome.server_cpu_us_per_op().unwrap_or(f64::NAN));
        self.client_cpu_us_per_op.push(outcome.client_cpu_us_per_op());
        self.latencies.add(&all).expect("all histograms have the same bounds");
    }

    fn cell(self, server: &Server) -> Result<Cell> {
        let spread = |values| Spread::of(values).context("no run has ended");
        Ok(Cell {
            product: server.product,
            role: server.product.role(),
            command: server.command.clone(),
            ops_per_s: spread(self.ops_per_s)?,
            bytes_per_s: spread(self.bytes_per_s)?,
            p50_us: spread(self.p50_us)?,
            p99_us: spread(self.p99_us)?,
            latency: Percentiles::of(&self.latencies),
            cpu_us_per_op: spread(self.cpu_us_per_op)?,
            client_cpu_us_per_op: spread(self.client_cpu_us_per_op)?,
            resident_bytes: server.process().holdings()?.resident_bytes,
            curve: curve(&self.latencies),
        })
    }
}
