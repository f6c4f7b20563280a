//! What a comparison gave. This is what `--json` writes.

use std::collections::BTreeMap;

use serde::Serialize;

use super::product::{Product, Role};
use super::rows::{Against, Bound, Metric, Row, Target};
use crate::placement::Placement;
use crate::stats::{CurvePoint, Percentiles, Spread};

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Results {
    /// Where and how.
    pub(crate) about: About,
    /// The rows, per placement.
    pub(crate) rows: Vec<RowResult>,
    /// Everything that is not a row.
    pub(crate) checks: Vec<Check>,
    /// What fio's nbd engine reached, if it was asked.
    pub(crate) fio: Vec<FioResult>,
    /// What could not be run, and why.
    pub(crate) skipped: Vec<String>,
}

/// Where, when and how it was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct About {
    /// Day and time, UTC.
    pub(crate) date: String,
    /// The CPUs.
    pub(crate) cpu: String,
    /// Memory in bytes.
    pub(crate) memory_bytes: u64,
    /// The kernel.
    pub(crate) kernel: String,
    /// The file system of the images.
    pub(crate) images_on: String,
    /// The command.
    pub(crate) command: String,
    /// Runs per row and server.
    pub(crate) runs: usize,
    /// Seconds per run.
    pub(crate) seconds: f64,
    /// Names and versions of the servers.
    pub(crate) versions: BTreeMap<String, String>,
    /// Load average before it began: others at work make figures worthless.
    pub(crate) load_average: String,
}

/// One row at one placement.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RowResult {
    /// The row.
    pub(crate) row: Row,
    /// Where client and server ran.
    pub(crate) placement: Placement,
    /// What each server reached.
    pub(crate) cells: Vec<Cell>,
    /// What fio reached on the file, in requests per second.
    pub(crate) fio_ops_per_s: Option<Spread>,
    /// Which targets were reached.
    pub(crate) verdicts: Vec<Verdict>,
}

/// One server in one row.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    /// Which.
    pub(crate) product: Product,
    /// What it is to the comparison.
    pub(crate) role: Role,
    /// The command that started it.
    pub(crate) command: String,
    /// Requests per second.
    pub(crate) ops_per_s: Spread,
    /// Bytes per second.
    pub(crate) bytes_per_s: Spread,
    /// Median latency in microseconds.
    pub(crate) p50_us: Spread,
    /// 99th percentile in microseconds.
    pub(crate) p99_us: Spread,
    /// Percentiles of all runs together.
    pub(crate) latency: Percentiles,
    /// The server's CPU time per request in microseconds.
    pub(crate) cpu_us_per_op: Spread,
    /// The client's.
    pub(crate) client_cpu_us_per_op: Spread,
    /// Resident memory in bytes after the last run.
    pub(crate) resident_bytes: u64,
    /// The latency curve of all runs together.
    pub(crate) curve: Vec<CurvePoint>,
}

/// Whether a target was reached.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Verdict {
    /// The target.
    pub(crate) target: Target,
    /// What it was measured against, for people.
    pub(crate) against: String,
    /// The ratio of the medians.
    pub(crate) ratio: f64,
    /// Whether it is enough.
    pub(crate) reached: bool,
}

/// What fio's nbd engine reached.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct FioResult {
    /// On which server.
    pub(crate) product: Product,
    /// In which job.
    pub(crate) job: String,
    /// Reading or writing.
    pub(crate) way: &'static str,
    /// Requests per second.
    pub(crate) ops_per_s: f64,
    /// Bytes per second.
    pub(crate) bytes_per_s: f64,
    /// 99th percentile of latency in microseconds.
    pub(crate) p99_us: f64,
}

/// A single figure with its own bound.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Check {
    /// Short name, for `--rows`.
    pub(crate) id: String,
    /// What it is.
    pub(crate) title: String,
    /// Of which server.
    pub(crate) product: Product,
    /// What came out, with its unit.
    pub(crate) value: String,
    /// What was wanted; `None` of servers that are not ours to judge.
    pub(crate) wanted: Option<String>,
    /// Whether it is enough.
    pub(crate) reached: Option<bool>,
}

impl Results {
    /// Anything was measured at all.
    pub(crate) fn has_figures(&self) -> bool {
        let cells = self.rows.iter().any(|row| !row.cells.is_empty());
        cells || !self.checks.is_empty() || !self.fio.is_empty()
    }

    /// Targets that were reached.
    pub(crate) fn reached(&self) -> usize {
        self.outcomes().filter(|reached| *reached).count()
    }

    /// Targets that were missed.
    pub(crate) fn missed(&self) -> usize {
        self.outcomes().filter(|reached| !*reached).count()
    }

    fn outcomes(&self) -> impl Iterator<Item = bool> {
        let rows = self.rows.iter().flat_map(|row| &row.verdicts).map(|verdict| verdict.reached);
        rows.chain(self.checks.iter().filter_map(|check| check.reached))
    }
}

impl Cell {
    /// A figure's median.
    pub(crate) fn metric(&self, metric: Metric) -> f64 {
        match metric {
            Metric::Throughput => self.ops_per_s.median,
            Metric::P50 => self.p50_us.median,
            Metric::P99 => self.p99_us.median,
            Metric::Cpu => self.cpu_us_per_op.median,
        }
    }
}

impl RowResult {
    /// A server's figures.
    pub(crate) fn cell(&self, product: Product) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.product == product)
    }

    /// The peer that does best at a figure.
    pub(crate) fn best_peer(&self, metric: Metric) -> Option<&Cell> {
        let peers = self.cells.iter().filter(|cell| cell.role == Role::Peer);
        let by = |a: &&Cell, b: &&Cell| a.metric(metric).total_cmp(&b.metric(metric));
        if metric.is_better_high() { peers.max_by(by) } else { peers.min_by(by) }
    }
}

/// Judges every row, now that all of them are there.
pub(crate) fn judge(rows: &mut [RowResult]) {
    let verdicts: Vec<_> = rows.iter().map(|row| verdicts(row, rows)).collect();
    for (row, verdicts) in rows.iter_mut().zip(verdicts) {
        row.verdicts = verdicts;
    }
}

/// The targets that can be judged; those whose other side was not run are left out. They are meant
/// for servers that run where the scheduler puts them; the pinned placements explain, no more.
fn verdicts(result: &RowResult, all: &[RowResult]) -> Vec<Verdict> {
    if result.placement != Placement::Unpinned {
        return Vec::new();
    }
    let Some(ours) = result.cell(Product::Sheave) else { return Vec::new() };
    let judged = |target: &Target| {
        let (against, other) = other_side(target, result, all)?;
        let ratio = ours.metric(target.metric) / other;
        let reached = target.bound.holds(ratio);
        ratio.is_finite().then_some(Verdict { target: *target, against, ratio, reached })
    };
    result.row.targets.iter().filter_map(judged).collect()
}

/// Name and figure of what a target is measured against.
fn other_side(target: &Target, result: &RowResult, all: &[RowResult]) -> Option<(String, f64)> {
    let metric = target.metric;
    match target.against {
        Against::BestPeer => {
            let peer = result.best_peer(metric)?;
            Some((peer.product.name().to_owned(), peer.metric(metric)))
        }
        Against::Server(product) => {
            let figure = result.cell(product)?.metric(metric);
            Some((product.name().to_owned(), figure))
        }
        Against::Row(id) => {
            let same =
                |other: &&RowResult| other.row.id == id && other.placement == result.placement;
            let figure = all.iter().find(same)?.cell(Product::Sheave)?.metric(metric);
            Some((id.to_owned(), figure))
        }
        Against::Fio => Some(("fio".to_owned(), result.fio_ops_per_s?.median)),
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (sign, bound) = match self.target.bound {
            Bound::AtLeast(bound) => ('≥', bound),
            Bound::AtMost(bound) => ('≤', bound),
        };
        let (metric, against) = (self.target.metric.name(), &self.against);
        // Three digits either way: 0.804 is not 0.8.
        let digits = if self.ratio < 1.0 { 3 } else { 2 };
        write!(f, "{metric} {:.digits$} × {against} ({sign} {bound})", self.ratio)
    }
}

/// How far our server is from each floor in the row, for people.
pub(crate) fn floor_distance(result: &RowResult) -> Vec<String> {
    let Some(ours) = result.cell(Product::Sheave) else { return Vec::new() };
    let floors = result.cells.iter().filter(|cell| cell.role == Role::Floor);
    floors
        .map(|floor| {
            let ratio = |metric| ours.metric(metric) / floor.metric(metric);
            let (rate, p50) = (ratio(Metric::Throughput), ratio(Metric::P50));
            let cpu = ratio(Metric::Cpu);
            format!(
                "{rate:.2} × the rate of {}, {p50:.2} × its p50, {cpu:.2} × its CPU",
                floor.product.name()
            )
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod examples {
    use super::*;
    use crate::compare::rows;

    /// A server that does everything equally well.
    pub(crate) fn cell(product: Product, ops: f64, us: f64) -> Cell {
        let spread = |value: f64| Spread { median: value, min: value, max: value };
        Cell {
            product,
            role: product.role(),
            command: "serve --socket /s".to_owned(),
            ops_per_s: spread(ops),
            bytes_per_s: spread(ops * 4096.0),
            p50_us: spread(us),
            p99_us: spread(us),
            latency: Percentiles::default(),
            cpu_us_per_op: spread(us),
            client_cpu_us_per_op: spread(1.0),
            resident_bytes: 0,
            curve: vec![
                CurvePoint { quantile: 0.0, us },
                CurvePoint { quantile: 0.9, us: us * 2.0 },
            ],
        }
    }

    /// A row with some servers.
    pub(crate) fn result(id: &str, cells: Vec<Cell>) -> RowResult {
        let row = rows::all().into_iter().find(|row| row.id == id).expect("a row of that id");
        let placement = Placement::Unpinned;
        RowResult { row, placement, cells, fio_ops_per_s: None, verdicts: Vec::new() }
    }

    /// A small comparison.
    pub(crate) fn results() -> Results {
        let cells = || {
            vec![
                cell(Product::Sheave, 299.0, 3.0),
                cell(Product::Nbdkit, 100.0, 10.0),
                cell(Product::Echo, 900.0, 1.0),
            ]
        };
        let mut rows =
            vec![result("mem-4k-qd32-read", cells()), result("mem-4k-qd1-read", cells())];
        judge(&mut rows);
        let check = Check {
            id: "churn".to_owned(),
            title: "growth".to_owned(),
            product: Product::Sheave,
            value: "0".to_owned(),
            wanted: Some("0".to_owned()),
            reached: Some(true),
        };
        Results {
            about: About::default(),
            rows,
            checks: vec![check],
            fio: Vec::new(),
            skipped: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::examples::{cell, result};
    use super::*;

    #[test]
    fn each_figure_has_its_own_best_peer() {
        let cells = vec![
            cell(Product::Sheave, 300.0, 1.0),
            cell(Product::Nbdkit, 100.0, 10.0),
            cell(Product::QemuNbd, 50.0, 5.0),
            cell(Product::Echo, 900.0, 0.1),
        ];
        let row = result("file-4k-qd32-read", cells);
        assert_eq!(row.best_peer(Metric::Throughput).unwrap().product, Product::Nbdkit);
        assert_eq!(row.best_peer(Metric::Cpu).unwrap().product, Product::QemuNbd);
    }

    #[test]
    fn targets_are_judged_by_their_ratio() {
        let cells = vec![cell(Product::Sheave, 299.0, 3.0), cell(Product::Nbdkit, 100.0, 10.0)];
        let mut rows = [result("mem-4k-qd32-read", cells)];
        judge(&mut rows);
        // Without the bare ring server there is nothing to say about it.
        let reached: Vec<_> = rows[0].verdicts.iter().map(|verdict| verdict.reached).collect();
        assert_eq!(reached, [false, true, true]);
        assert_eq!(rows[0].verdicts[0].to_string(), "throughput 2.99 × nbdkit (≥ 3)");
    }

    #[test]
    fn pinned_placements_are_not_judged() {
        let cells = vec![cell(Product::Sheave, 9.0, 9.0), cell(Product::Nbdkit, 1.0, 1.0)];
        let mut rows = [result("mem-4k-qd32-read", cells)];
        rows[0].placement = Placement::Apart;
        judge(&mut rows);
        assert!(rows[0].verdicts.is_empty());
    }

    #[test]
    fn a_row_is_measured_against_another() {
        let mut rows = [
            result("mem-4k-c64-qd4-read", vec![cell(Product::Sheave, 95.0, 1.0)]),
            result("mem-4k-qd256-read", vec![cell(Product::Sheave, 100.0, 1.0)]),
        ];
        judge(&mut rows);
        assert_eq!(rows[0].verdicts.len(), 1);
        assert!(rows[0].verdicts[0].reached);
    }

    #[test]
    fn the_distance_to_a_floor_is_told() {
        let cells = vec![cell(Product::Sheave, 300.0, 3.0), cell(Product::Echo, 600.0, 2.0)];
        let told = floor_distance(&result("mem-4k-qd1-read", cells));
        assert_eq!(told, ["0.50 × the rate of echo, 1.50 × its p50, 1.50 × its CPU"]);
    }
}
