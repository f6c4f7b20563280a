//! What this server is to reach beside others, judged by the figures that `sheave bench compare
//! --json` writes. docs/performance.md has what was reached.

use serde_json::Value;

use self::Against::{BestPeer, Fio, Row, Server};
use self::Bound::{AtLeast, AtMost};

const RATE: &str = "ops_per_s";
const P50: &str = "p50_us";
const P99: &str = "p99_us";
const CPU: &str = "cpu_us_per_op";

/// What a figure is measured against.
#[derive(Clone, Copy)]
enum Against {
    /// The peer that does best at this figure.
    BestPeer,
    /// Another server in the same row.
    Server(&'static str),
    /// The same server in another row.
    Row(&'static str),
    /// What fio reaches on the file itself.
    Fio,
}

/// How the ratio of the two must be.
#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// Rows, a figure of them, what it is measured against, and the ratio to be reached.
const ROWS: &[(&[&str], &str, Against, Bound)] = &[
    (&["mem-4k-qd1-read", "mem-4k-qd1-write"], P50, BestPeer, AtMost(0.8)),
    (&["file-4k-qd1-read", "file-4k-qd1-write"], P50, BestPeer, AtMost(0.8)),
    (&["mem-4k-qd32-read", "mem-4k-qd32-write"], RATE, BestPeer, AtLeast(3.0)),
    (&["mem-4k-qd32-read", "mem-4k-qd32-write"], CPU, BestPeer, AtMost(0.3)),
    (&["mem-4k-qd32-read", "mem-4k-qd32-write"], P99, BestPeer, AtMost(0.6)),
    (&["mem-4k-qd32-read", "mem-4k-qd32-write"], CPU, Server("ring"), AtMost(1.3)),
    (&["file-4k-qd32-read", "file-4k-qd32-write"], RATE, BestPeer, AtLeast(2.0)),
    (&["file-4k-qd32-read", "file-4k-qd32-write"], CPU, BestPeer, AtMost(0.5)),
    (&["mem-1m-qd8-read"], RATE, BestPeer, AtLeast(1.4)),
    (&["mem-1m-qd8-write"], RATE, BestPeer, AtLeast(1.8)),
    (&["mem-1m-qd8-read", "mem-1m-qd8-write"], CPU, BestPeer, AtMost(0.65)),
    (&["file-1m-qd8-read", "file-1m-qd8-write"], RATE, BestPeer, AtLeast(1.2)),
    (&["file-1m-qd8-read", "file-1m-qd8-write"], CPU, BestPeer, AtMost(0.8)),
    (&["mem-4k-c64-qd4-read"], RATE, Row("mem-4k-qd256-read"), AtLeast(0.9)),
    (&["tls-1m-qd8-read"], RATE, Row("mem-1m-qd8-read"), AtLeast(0.5)),
    (&["tls-1m-qd8-write"], RATE, Row("mem-1m-qd8-write"), AtLeast(0.5)),
    (&["tls-1m-qd8-read", "tls-1m-qd8-write"], RATE, BestPeer, AtLeast(1.0)),
    (&["direct-4k-qd32-read", "direct-4k-qd32-write"], RATE, Fio, AtLeast(0.8)),
];

/// Checks, a figure of them, and the most that it may be.
const CHECKS: &[(&str, &str, f64)] = &[
    ("idle-memory", "bytes", (20 << 20) as f64),
    ("idle-connections", "bytes", (64 << 10) as f64),
    ("idle-woken", "switches", 0.0),
    // What polling may cost where there is little to do.
    ("paced-1000", "ratio", 1.1),
    // What the allocator may keep without a leak.
    ("churn", "bytes", (1 << 20) as f64),
    ("churn", "descriptors", 0.0),
    ("churn", "threads", 0.0),
];

/// Whether a target was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The target and the figure.
    pub what: String,
    /// Whether the figure is good enough.
    pub reached: bool,
}

/// Judges a comparison. Targets whose other side was not run are left out, and so are pinned
/// placements, which explain figures and no more.
#[must_use]
pub fn judge(results: &Value) -> Vec<Verdict> {
    let unpinned: Vec<&Value> =
        list(&results["rows"]).filter(|row| row["placement"] == "unpinned").collect();
    let rows = ROWS.iter().flat_map(|&(ids, figure, against, bound)| {
        let unpinned = &unpinned;
        ids.iter().filter_map(move |id| judge_row(unpinned, id, figure, against, bound))
    });
    let checks = CHECKS.iter().filter_map(|&(id, figure, most)| {
        let check =
            list(&results["checks"]).find(|it| it["id"] == id && it["product"] == "sheave")?;
        let found = check["figures"][figure].as_f64()?;
        let what = format!("{id}: {found} {figure} (at most {most})");
        Some(Verdict { what, reached: found <= most })
    });
    rows.chain(checks).collect()
}

fn judge_row(
    rows: &[&Value],
    id: &str,
    figure: &str,
    against: Against,
    bound: Bound,
) -> Option<Verdict> {
    let row = of_id(rows, id)?;
    let (name, other) = match against {
        BestPeer => best_peer(row, figure)?,
        Server(product) => (product, median(cell(row, product)?, figure)?),
        Row(other) => (other, median(cell(of_id(rows, other)?, "sheave")?, figure)?),
        Fio => ("fio", row["fio_ops_per_s"]["median"].as_f64()?),
    };
    let ratio = median(cell(row, "sheave")?, figure)? / other;
    let (reached, sign, wanted) = match bound {
        AtLeast(least) => (ratio >= least, '≥', least),
        AtMost(most) => (ratio <= most, '≤', most),
    };
    // Three digits either way: 0.804 is not 0.8.
    let digits = if ratio < 1.0 { 3 } else { 2 };
    let what = format!("{id}: {figure} {ratio:.digits$} × {name} ({sign} {wanted})");
    ratio.is_finite().then_some(Verdict { what, reached })
}

fn best_peer<'a>(row: &'a Value, figure: &str) -> Option<(&'a str, f64)> {
    let peers = list(&row["cells"]).filter(|cell| cell["role"] == "peer");
    let figures = peers.filter_map(|peer| Some((peer["product"].as_str()?, median(peer, figure)?)));
    let by = |a: &(&str, f64), b: &(&str, f64)| a.1.total_cmp(&b.1);
    if figure == RATE { figures.max_by(by) } else { figures.min_by(by) }
}

fn of_id<'a>(rows: &[&'a Value], id: &str) -> Option<&'a Value> {
    rows.iter().copied().find(|row| row["row"]["id"] == id)
}

fn cell<'a>(row: &'a Value, product: &str) -> Option<&'a Value> {
    list(&row["cells"]).find(|cell| cell["product"] == product)
}

fn median(cell: &Value, figure: &str) -> Option<f64> {
    cell[figure]["median"].as_f64()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cell(product: &str, role: &str, rate: f64, us: f64) -> Value {
        let us = json!({ "median": us });
        json!({
            "product": product, "role": role, "ops_per_s": { "median": rate },
            "p50_us": us, "p99_us": us, "cpu_us_per_op": us,
        })
    }

    fn row(id: &str, placement: &str, cells: &[Value]) -> Value {
        json!({ "row": { "id": id }, "placement": placement, "cells": cells })
    }

    fn outcomes(rows: &[Value]) -> Vec<bool> {
        judge(&json!({ "rows": rows })).iter().map(|verdict| verdict.reached).collect()
    }

    #[test]
    fn targets_are_judged_by_their_ratio() {
        let cells = [
            cell("sheave", "subject", 299.0, 3.0),
            cell("nbdkit", "peer", 100.0, 30.0),
            cell("qemu-nbd", "peer", 50.0, 10.0),
            cell("echo", "floor", 900.0, 0.1),
        ];
        let rows = [row("mem-4k-qd32-read", "unpinned", &cells)];
        // Without the bare ring server there is nothing to say about it.
        assert_eq!(outcomes(&rows), [false, true, true], "the best peer differs by figure");
        let verdicts = judge(&json!({ "rows": rows }));
        assert_eq!(verdicts[0].what, "mem-4k-qd32-read: ops_per_s 2.99 × nbdkit (≥ 3)");
        assert_eq!(verdicts[1].what, "mem-4k-qd32-read: cpu_us_per_op 0.300 × qemu-nbd (≤ 0.3)");
    }

    #[test]
    fn pinned_placements_are_not_judged() {
        let cells = [cell("sheave", "subject", 9.0, 9.0), cell("nbdkit", "peer", 1.0, 1.0)];
        assert!(outcomes(&[row("mem-4k-qd32-read", "apart", &cells)]).is_empty());
    }

    #[test]
    fn a_row_is_measured_against_another() {
        let ours = |rate| [cell("sheave", "subject", rate, 1.0)];
        let rows = [
            row("mem-4k-c64-qd4-read", "unpinned", &ours(90.0)),
            row("mem-4k-qd256-read", "unpinned", &ours(100.0)),
        ];
        assert_eq!(outcomes(&rows), [true], "it holds at the edge");
    }

    #[test]
    fn only_our_checks_are_judged() {
        let check = |product: &str, bytes: u64| {
            let figures = json!({ "bytes": bytes, "descriptors": 0, "threads": 1 });
            json!({ "id": "churn", "product": product, "figures": figures })
        };
        let results = json!({ "checks": [check("nbdkit", 2 << 20), check("sheave", 1 << 20)] });
        let reached: Vec<_> = judge(&results).iter().map(|verdict| verdict.reached).collect();
        assert_eq!(reached, [true, true, false]);
    }
}
