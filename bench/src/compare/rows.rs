//! What is compared.

use serde::Serialize;

use super::product::Volume;

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
}

/// All rows, in the order in which they are run: by volume, so that servers start once.
pub(crate) fn all() -> Vec<Row> {
    let mut rows = small(Volume::Memory);
    rows.extend(large(Volume::Memory));
    rows.extend(many());
    rows.extend(large(Volume::Tls));
    rows.extend(null());
    rows.extend(small(Volume::File));
    rows.extend(large(Volume::File));
    rows.extend(direct());
    rows
}

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

fn row(id: &'static str, title: &'static str, volume: Volume, is_read: bool) -> Row {
    Row { id, title, volume, is_read, block_size: 4 * KIB, queue_depth: 1, connections: 1 }
}

/// 4 KiB, one at a time and 32 at a time.
fn small(volume: Volume) -> Vec<Row> {
    let names = match volume {
        Volume::Memory => [
            ("mem-4k-qd1-read", "memory, 4 KiB, QD1, read"),
            ("mem-4k-qd1-write", "memory, 4 KiB, QD1, write"),
            ("mem-4k-qd32-read", "memory, 4 KiB, QD32, read"),
            ("mem-4k-qd32-write", "memory, 4 KiB, QD32, write"),
        ],
        _ => [
            ("file-4k-qd1-read", "cached file, 4 KiB, QD1, read"),
            ("file-4k-qd1-write", "cached file, 4 KiB, QD1, write"),
            ("file-4k-qd32-read", "cached file, 4 KiB, QD32, read"),
            ("file-4k-qd32-write", "cached file, 4 KiB, QD32, write"),
        ],
    };
    let kinds = [(true, 1), (false, 1), (true, 32), (false, 32)];
    let row = |((id, title), (is_read, queue_depth))| Row {
        queue_depth,
        ..row(id, title, volume, is_read)
    };
    names.into_iter().zip(kinds).map(row).collect()
}

/// 1 MiB, 8 at a time.
fn large(volume: Volume) -> [Row; 2] {
    let names = match volume {
        Volume::Memory => [
            ("mem-1m-qd8-read", "memory, 1 MiB, QD8, read"),
            ("mem-1m-qd8-write", "memory, 1 MiB, QD8, write"),
        ],
        Volume::Tls => [
            ("tls-1m-qd8-read", "TLS, 1 MiB, QD8, read"),
            ("tls-1m-qd8-write", "TLS, 1 MiB, QD8, write"),
        ],
        _ => [
            ("file-1m-qd8-read", "cached file, 1 MiB, QD8, read"),
            ("file-1m-qd8-write", "cached file, 1 MiB, QD8, write"),
        ],
    };
    read_and_write(volume, names, MIB, 8)
}

/// As many requests in flight, over one connection and over many.
fn many() -> [Row; 2] {
    let one = ("mem-4k-qd256-read", "memory, 4 KiB, 1 connection, QD256, read");
    let many = ("mem-4k-c64-qd4-read", "memory, 4 KiB, 64 × QD4, read");
    [
        Row { queue_depth: 256, ..row(one.0, one.1, Volume::Memory, true) },
        Row { connections: 64, queue_depth: 4, ..row(many.0, many.1, Volume::Memory, true) },
    ]
}

fn null() -> [Row; 2] {
    let names = [
        ("null-4k-qd32-read", "null, 4 KiB, QD32, read"),
        ("null-4k-qd32-write", "null, 4 KiB, QD32, write"),
    ];
    read_and_write(Volume::Null, names, 4 * KIB, 32)
}

fn direct() -> [Row; 2] {
    let names = [
        ("direct-4k-qd32-read", "O_DIRECT file, 4 KiB, QD32, read"),
        ("direct-4k-qd32-write", "O_DIRECT file, 4 KiB, QD32, write"),
    ];
    read_and_write(Volume::Direct, names, 4 * KIB, 32)
}

fn read_and_write(
    volume: Volume,
    [read, write]: [(&'static str, &'static str); 2],
    block_size: usize,
    queue_depth: usize,
) -> [Row; 2] {
    let row =
        |(id, title), is_read| Row { block_size, queue_depth, ..row(id, title, volume, is_read) };
    [row(read, true), row(write, false)]
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
    fn ids_are_unique() {
        let rows = all();
        let ids: BTreeSet<_> = rows.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), rows.len());
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
}
