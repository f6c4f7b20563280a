//! What is compared, and what is to be reached.

use serde::Serialize;

use super::product::{Product, Volume};

/// A figure of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Metric {
    /// Requests per second.
    Throughput,
    /// Median latency.
    P50,
    /// 99th percentile of latency.
    P99,
    /// The server's CPU time per request.
    Cpu,
}

/// What a figure is measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Against {
    /// The peer that does best at this figure.
    BestPeer,
    /// Another server in the same row.
    Server(Product),
    /// The same server in another row.
    Row(&'static str),
    /// What fio reaches on the file itself.
    Fio,
}

/// How the ratio of the two must be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Bound {
    /// Not less.
    AtLeast(f64),
    /// Not more.
    AtMost(f64),
}

/// Something to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Target {
    /// Which figure.
    pub(crate) metric: Metric,
    /// Against what.
    pub(crate) against: Against,
    /// How much.
    pub(crate) bound: Bound,
}

/// One load, put on every server that can take it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    /// Short name, for `--rows`.
    pub(crate) id: &'static str,
    /// What it is, for people.
    pub(crate) title: &'static str,
    /// On which volume.
    pub(crate) volume: Volume,
    /// Reads or writes.
    pub(crate) is_read: bool,
    /// Bytes per request.
    pub(crate) block_size: usize,
    /// Requests in flight per connection.
    pub(crate) queue_depth: usize,
    /// Connections.
    pub(crate) connections: usize,
    /// What is to be reached.
    pub(crate) targets: Vec<Target>,
}

impl Bound {
    /// Whether `ratio` keeps to it.
    pub(crate) fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(least) => ratio >= least,
            Self::AtMost(most) => ratio <= most,
        }
    }
}

impl Metric {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::Cpu => "CPU per request",
        }
    }

    /// Whether more of it is better.
    pub(crate) fn is_better_high(self) -> bool {
        self == Self::Throughput
    }
}

/// All rows, in the order in which they are run: by volume, so that servers start once.
pub(crate) fn all() -> Vec<Row> {
    let mut rows = small(Volume::Memory);
    rows.extend(large(Volume::Memory));
    rows.extend(many());
    rows.extend(tls());
    rows.extend(null());
    rows.extend(small(Volume::File));
    rows.extend(large(Volume::File));
    rows.extend(direct());
    rows
}

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

fn row(id: &'static str, title: &'static str, volume: Volume, is_read: bool) -> Row {
    Row {
        id,
        title,
        volume,
        is_read,
        block_size: 4 * KIB,
        queue_depth: 1,
        connections: 1,
        targets: Vec::new(),
    }
}

fn least(metric: Metric, least: f64, against: Against) -> Target {
    Target { metric, against, bound: Bound::AtLeast(least) }
}

fn most(metric: Metric, most: f64, against: Against) -> Target {
    Target { metric, against, bound: Bound::AtMost(most) }
}

/// 4 KiB, one at a time and 32 at a time.
fn small(volume: Volume) -> Vec<Row> {
    use Against::{BestPeer, Server};
    let one = vec![most(Metric::P50, 0.8, BestPeer)];
    let (names, many) = match volume {
        Volume::Memory => (
            [
                ("mem-4k-qd1-read", "memory, 4 KiB, QD1, read"),
                ("mem-4k-qd1-write", "memory, 4 KiB, QD1, write"),
                ("mem-4k-qd32-read", "memory, 4 KiB, QD32, read"),
                ("mem-4k-qd32-write", "memory, 4 KiB, QD32, write"),
            ],
            vec![
                least(Metric::Throughput, 3.0, BestPeer),
                most(Metric::Cpu, 0.3, BestPeer),
                most(Metric::P99, 0.6, BestPeer),
                most(Metric::Cpu, 1.3, Server(Product::Ring)),
            ],
        ),
        _ => (
            [
                ("file-4k-qd1-read", "cached file, 4 KiB, QD1, read"),
                ("file-4k-qd1-write", "cached file, 4 KiB, QD1, write"),
                ("file-4k-qd32-read", "cached file, 4 KiB, QD32, read"),
                ("file-4k-qd32-write", "cached file, 4 KiB, QD32, write"),
            ],
            vec![least(Metric::Throughput, 2.0, BestPeer), most(Metric::Cpu, 0.5, BestPeer)],
        ),
    };
    let kinds = [(true, 1, &one), (false, 1, &one), (true, 32, &many), (false, 32, &many)];
    names
        .into_iter()
        .zip(kinds)
        .map(|((id, title), (is_read, queue_depth, targets))| Row {
            queue_depth,
            targets: targets.clone(),
            ..row(id, title, volume, is_read)
        })
        .collect()
}

/// 1 MiB, 8 at a time.
fn large(volume: Volume) -> Vec<Row> {
    let (names, [read, write], cpu) = match volume {
        Volume::Memory => (
            [
                ("mem-1m-qd8-read", "memory, 1 MiB, QD8, read"),
                ("mem-1m-qd8-write", "memory, 1 MiB, QD8, write"),
            ],
            [1.4, 1.8],
            0.65,
        ),
        _ => (
            [
                ("file-1m-qd8-read", "cached file, 1 MiB, QD8, read"),
                ("file-1m-qd8-write", "cached file, 1 MiB, QD8, write"),
            ],
            [1.2, 1.2],
            0.8,
        ),
    };
    names
        .into_iter()
        .zip([(true, read), (false, write)])
        .map(|((id, title), (is_read, ratio))| Row {
            block_size: MIB,
            queue_depth: 8,
            targets: vec![
                least(Metric::Throughput, ratio, Against::BestPeer),
                most(Metric::Cpu, cpu, Against::BestPeer),
            ],
            ..row(id, title, volume, is_read)
        })
        .collect()
}

/// As many requests in flight, over one connection and over many.
fn many() -> Vec<Row> {
    let one = Row {
        queue_depth: 256,
        ..row(ONE_CONNECTION, "memory, 4 KiB, 1 connection, QD256, read", Volume::Memory, true)
    };
    let targets = vec![least(Metric::Throughput, 0.9, Against::Row(ONE_CONNECTION))];
    let many = row("mem-4k-c64-qd4-read", "memory, 4 KiB, 64 × QD4, read", Volume::Memory, true);
    vec![one, Row { connections: 64, queue_depth: 4, targets, ..many }]
}

const ONE_CONNECTION: &str = "mem-4k-qd256-read";

fn tls() -> Vec<Row> {
    let kinds = [
        ("tls-1m-qd8-read", "TLS, 1 MiB, QD8, read", true, "mem-1m-qd8-read"),
        ("tls-1m-qd8-write", "TLS, 1 MiB, QD8, write", false, "mem-1m-qd8-write"),
    ];
    kinds
        .into_iter()
        .map(|(id, title, is_read, plain)| Row {
            block_size: MIB,
            queue_depth: 8,
            targets: vec![
                least(Metric::Throughput, 0.5, Against::Row(plain)),
                least(Metric::Throughput, 1.0, Against::BestPeer),
            ],
            ..row(id, title, Volume::Tls, is_read)
        })
        .collect()
}

fn null() -> Vec<Row> {
    let kinds = [
        ("null-4k-qd32-read", "null, 4 KiB, QD32, read", true),
        ("null-4k-qd32-write", "null, 4 KiB, QD32, write", false),
    ];
    kinds
        .into_iter()
        .map(|(id, title, is_read)| Row {
            queue_depth: 32,
            ..row(id, title, Volume::Null, is_read)
        })
        .collect()
}

fn direct() -> Vec<Row> {
    let kinds = [
        ("direct-4k-qd32-read", "O_DIRECT file, 4 KiB, QD32, read", true),
        ("direct-4k-qd32-write", "O_DIRECT file, 4 KiB, QD32, write", false),
    ];
    kinds
        .into_iter()
        .map(|(id, title, is_read)| Row {
            queue_depth: 32,
            targets: vec![least(Metric::Throughput, 0.8, Against::Fio)],
            ..row(id, title, Volume::Direct, is_read)
        })
        .collect()
}

/// Whether `name` matches `pattern`, in which `*` stands for anything.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(before) else { return false };
    (0..=rest.len()).any(|at| rest.is_char_boundary(at) && matches(after, &rest[at..]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_are_unique_and_references_exist() {
        let rows = all();
        let ids: BTreeSet<_> = rows.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), rows.len());
        for target in rows.iter().flat_map(|row| &row.targets) {
            if let Against::Row(id) = target.against {
                assert!(ids.contains(id), "{id}");
            }
        }
    }

    #[test]
    fn rows_of_a_volume_are_neighbours() {
        let mut volumes: Vec<_> = all().iter().map(|row| row.volume).collect();
        volumes.dedup();
        let distinct: BTreeSet<_> = volumes.iter().copied().collect();
        assert_eq!(distinct.len(), volumes.len());
    }

    #[test]
    fn patterns_match_like_file_names() {
        assert!(matches("*", "anything") && matches("mem-*-read", "mem-4k-qd1-read"));
        assert!(matches("*qd32*", "file-4k-qd32-write") && matches("a", "a"));
        assert!(
            !matches("mem-*", "file-4k") && !matches("*read", "mem-write") && !matches("", "a")
        );
    }

    #[test]
    fn bounds_hold_at_the_edge() {
        assert!(Bound::AtLeast(3.0).holds(3.0) && !Bound::AtLeast(3.0).holds(2.99));
        assert!(Bound::AtMost(0.3).holds(0.3) && !Bound::AtMost(0.3).holds(0.31));
    }
}
