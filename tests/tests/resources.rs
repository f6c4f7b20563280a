//! What a server costs while nothing happens, and that nothing grows.

use std::fs;
use std::thread;
use std::time::Duration;

use sheave_tests::{Bystander, Scratch, Serve, Server, Wire, both_engines, eventually, pattern};

/// Promised: at most 20 MiB resident when idle, at most 64 KiB for an idle connection.
const IDLE_KIB_MAX: u64 = 20 << 10;
const CONNECTION_KIB_MAX: u64 = 64;
/// The plain engine is for where there is no ring: each connection has threads of its own.
const CONNECTION_WITH_THREADS_KIB_MAX: u64 = 256;

both_engines! {
    fn an_idle_server_is_small_and_asleep(engine) {
        let server = Serve::new("memory:?size=1T").engine(engine).unix();
        let mut wires: Vec<_> = (0..8).map(|_| ready(&server)).collect();
        // Busy for a moment, so that whatever polls when busy has begun to.
        for round in 0..2000 {
            for wire in &mut wires {
                wire.read(round * 4096, 4096).expect("a reply").expect("data");
            }
        }
        let before = asleep(&server);
        let rss_kib = server.rss_kib();
        assert!(rss_kib <= IDLE_KIB_MAX, "{rss_kib} KiB when idle");
        thread::sleep(Duration::from_secs(2));
        let woken = switches(&server) - before;
        assert_eq!(woken, 0, "an idle server was woken");
    }

    fn idle_connections_are_cheap(engine) {
        const CONNECTIONS: u64 = 500;
        let mut server = Serve::new("memory:?size=16M").engine(engine).unix();
        let mut bystander = Bystander::new(&server);
        bystander.check(&mut server);
        let before = server.rss_kib();
        let mut wires: Vec<_> = (0..CONNECTIONS).map(|_| ready(&server)).collect();
        // Each has once had something in hand.
        for wire in &mut wires {
            assert_eq!(wire.write(0, &pattern(65536, 4)).expect("a reply"), 0);
            wire.read(0, 65536).expect("a reply").expect("data");
        }
        let each = || server.rss_kib().saturating_sub(before) / CONNECTIONS;
        let limit =
            if engine == "uring" { CONNECTION_KIB_MAX } else { CONNECTION_WITH_THREADS_KIB_MAX };
        assert!(eventually(|| each() <= limit), "{} KiB for an idle connection", each());
        bystander.check(&mut server);
    }

    fn ten_thousand_connections_leave_nothing_behind(engine) {
        let scratch = Scratch::new();
        let image = scratch.filled("disk.img", 8 << 20);
        let mut server = Serve::new(image).engine(engine).unix();
        let mut bystander = Bystander::new(&server);
        // What is kept for the next client may grow with the most clients at a time, so have them.
        drop((0..300).map(|_| ready(&server)).collect::<Vec<_>>());
        connect_and_leave(&server, 1000);
        bystander.check(&mut server);
        let (fds, rss_kib) = settled(&server);
        connect_and_leave(&server, 9000);
        bystander.check(&mut server);
        let (fds_after, rss_kib_after) = settled(&server);
        assert!(fds_after <= fds + 1, "{fds_after} descriptors, {fds} before");
        let grown = rss_kib_after.saturating_sub(rss_kib);
        assert!(grown < 2048, "grew by {grown} KiB");
    }
}

fn ready(server: &Server) -> Wire {
    Wire::ready(server).expect("a negotiated connection")
}

/// In all the ways in which clients leave.
fn connect_and_leave(server: &Server, times: u64) {
    for round in 0..times {
        let mut wire = Wire::connect(server).expect("connect");
        if round % 5 == 0 {
            continue;
        }
        wire.handshake().expect("greeting");
        if round % 5 == 1 {
            continue;
        }
        wire.go("").expect("go");
        match round % 5 {
            2 => drop(wire.read(0, 4096).expect("a reply")),
            3 => wire.request(sheave_tests::cmd::READ, 1, 0, 1 << 20).expect("send"),
            _ => wire.request(sheave_tests::cmd::DISC, 1, 0, 0).expect("send"),
        }
    }
}

/// Descriptors and memory after the last connection is gone.
fn settled(server: &Server) -> (usize, u64) {
    let fds = settles(Duration::from_millis(200), || server.fds());
    (fds, server.rss_kib())
}

/// How often its threads were woken until they slept.
fn asleep(server: &Server) -> u64 {
    settles(Duration::from_millis(500), || switches(server))
}

/// A count once it is the same after a while.
fn settles<T: PartialEq + Copy>(apart: Duration, count: impl Fn() -> T) -> T {
    let mut last = count();
    let settled = eventually(|| {
        thread::sleep(apart);
        let now = count();
        now == std::mem::replace(&mut last, now)
    });
    assert!(settled, "it goes on for ever");
    last
}

/// How often the server's threads have been put to sleep, so how often they were woken.
fn switches(server: &Server) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
    let count = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.expect("a task").path().join("status"));
        let status = status.expect("its status");
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches:"));
        let count = line.and_then(|line| line.split_whitespace().nth(1));
        count.and_then(|count| count.parse::<u64>().ok()).expect("a count")
    };
    tasks.map(count).sum()
}
