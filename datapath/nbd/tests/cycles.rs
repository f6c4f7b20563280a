//! Ten thousand clients, one after the other, leave nothing behind. The test runs alone in its
//! process, whose descriptors, threads and memory it counts.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, unused_imports, unused_macros, reason = "shared with the other tests")]
#[path = "it/support/mod.rs"]
mod support;

use std::fs;

use sheave_proto::ReplyStyle;
use sheave_proto::wire::command;
use sheave_shard::EngineChoice;

use support::{Client, Link, Running, Setup, wait_until};

/// Clients of one round.
const CYCLES: u64 = 5_000;
/// A leak grows in every round. Resources that are kept for the next client, such as buffers, heap
/// and descriptions of a file, grow only when more clients overlap than ever before.
const ROUNDS_MAX: u64 = 10;
/// Detects a leak of 26 bytes per client.
const GROWTH_KIB_MAX: u64 = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    rss_kib: u64,
}

#[test]
fn clients_leave_nothing_behind() {
    let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    image.as_file().set_len(8 << 20).unwrap();
    let image = image.path().to_str().unwrap();
    for engine in [EngineChoice::Auto, EngineChoice::Threads] {
        for volume in [image, "memory:?size=8M"] {
            let server = Setup::new(engine, volume).start();
            cycle(&server, CYCLES);
            let mut seen = vec![settled(&server)];
            let quiet = (0..ROUNDS_MAX).any(|_| {
                cycle(&server, CYCLES);
                seen.push(settled(&server));
                let [.., before, after] = &seen[..] else { unreachable!() };
                after.descriptors <= before.descriptors
                    && after.threads <= before.threads
                    && after.rss_kib <= before.rss_kib + GROWTH_KIB_MAX
            });
            assert!(quiet, "{engine:?} {volume}: each round has left something: {seen:#?}");
        }
    }
}

/// Connects and leaves, in all the ways in which clients do.
fn cycle(server: &Running, times: u64) {
    for round in 0..times {
        let mut link =
            if round % 3 == 0 { Link::tcp(server.address) } else { Link::unix(&server.socket) };
        match round % 7 {
            0 => continue,
            1 => {
                link.receive(18).unwrap();
                link.queue(&[0, 0, 0, 3, b'I', b'H']);
                link.flush().unwrap();
                continue;
            }
            _ => {}
        }
        let mut client = Client::with(link, ReplyStyle::Structured);
        match round % 7 {
            2 => drop(client.bytes(0, 4096)),
            3 => drop(client.read(0, 1 << 20)),
            4 => {
                let mut write = client.header(command::WRITE, 0, 0, 100_000);
                write.resize(50_000, 1);
                client.link.queue(&write);
            }
            5 => {
                client.put(0, &[1; 70_000]);
                client.ask(command::DISC, 0, 0, 0);
            }
            _ => {
                client.read(0, 1 << 20);
                client.link.push(std::time::Duration::ZERO);
                client.link.reset();
                continue;
            }
        }
        let _ = client.link.flush();
    }
}

/// The resources of the process once the server has noticed that all clients are gone.
fn settled(server: &Running) -> Held {
    wait_until("all clients are gone", || server.connections() == 0);
    let mut last = held();
    wait_until("nothing changes any more", || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let now = held();
        now == std::mem::replace(&mut last, now)
    });
    last
}

fn held() -> Held {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    Held {
        descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
        threads: fs::read_dir("/proc/self/task").unwrap().count(),
        rss_kib: pages * 4,
    }
}
