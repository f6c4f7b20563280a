//! What a comparison gave. This is what `--json` writes.

use std::collections::BTreeMap;

use serde::Serialize;

use super::product::{Product, Role};
use super::rows::Row;
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

/// What is no row.
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
    /// The same for programs.
    pub(crate) figures: BTreeMap<&'static str, f64>,
}

impl Results {
    /// Anything was measured at all.
    pub(crate) fn has_figures(&self) -> bool {
        let cells = self.rows.iter().any(|row| !row.cells.is_empty());
        cells || !self.checks.is_empty() || !self.fio.is_empty()
    }
}

impl RowResult {
    /// A server's figures.
    pub(crate) fn cell(&self, product: Product) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.product == product)
    }

    /// The fastest peer.
    pub(crate) fn best_peer(&self) -> Option<&Cell> {
        let peers = self.cells.iter().filter(|cell| cell.role == Role::Peer);
        peers.max_by(|a, b| a.ops_per_s.median.total_cmp(&b.ops_per_s.median))
    }
}

/// How far our server is from each floor in the row, for people.
pub(crate) fn floor_distance(result: &RowResult) -> Vec<String> {
    let Some(ours) = result.cell(Product::Sheave) else { return Vec::new() };
    let floors = result.cells.iter().filter(|cell| cell.role == Role::Floor);
    floors
        .map(|floor| {
            let ratio = |figure: fn(&Cell) -> Spread| figure(ours).median / figure(floor).median;
            let rate = ratio(|cell| cell.ops_per_s);
            let (p50, cpu) = (ratio(|cell| cell.p50_us), ratio(|cell| cell.cpu_us_per_op));
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
        RowResult { row, placement, cells, fio_ops_per_s: None }
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
        let rows = vec![result("mem-4k-qd32-read", cells()), result("mem-4k-qd1-read", cells())];
        let check = Check {
            id: "churn".to_owned(),
            title: "growth".to_owned(),
            product: Product::Sheave,
            value: "0".to_owned(),
            figures: BTreeMap::new(),
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
    fn the_best_peer_is_the_fastest_and_no_floor() {
        let cells = vec![
            cell(Product::Sheave, 300.0, 1.0),
            cell(Product::QemuNbd, 50.0, 5.0),
            cell(Product::Nbdkit, 100.0, 10.0),
            cell(Product::Echo, 900.0, 0.1),
        ];
        let row = result("file-4k-qd32-read", cells);
        assert_eq!(row.best_peer().unwrap().product, Product::Nbdkit);
    }

    #[test]
    fn the_distance_to_a_floor_is_told() {
        let cells = vec![cell(Product::Sheave, 300.0, 3.0), cell(Product::Echo, 600.0, 2.0)];
        let told = floor_distance(&result("mem-4k-qd1-read", cells));
        assert_eq!(told, ["0.50 × the rate of echo, 1.50 × its p50, 1.50 × its CPU"]);
    }
}
