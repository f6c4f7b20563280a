//! The load generator against a server that others wrote.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sheave_proto::ReplyStyle;
use tempfile::TempDir;

use super::*;
use crate::compare::tls_files;

/// Longest wait for anything that must come, on a slow machine with other work.
const PATIENCE: Duration = Duration::from_secs(120);

/// An nbdkit that ends with the test.
struct Nbdkit {
    child: Child,
    dir: TempDir,
}

impl Nbdkit {
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(TempDir::new().unwrap(), arguments)
    }

    /// Behind TLS.
    fn start_tls(arguments: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        tls_files::make(&dir.path().join("tls")).unwrap();
        let tls = format!("--tls-certificates={}", dir.path().join("tls").display());
        Self::start_in(dir, &[&["--tls=require", &tls], arguments].concat())
    }

    fn start_in(dir: TempDir, arguments: &[&str]) -> Self {
        let child = Command::new("nbdkit")
            .args(["--foreground", "--unix"])
            .arg(dir.path().join("socket"))
            .args(arguments)
            .stderr(Stdio::null())
            .spawn()
            .expect("nbdkit is installed");
        let server = Self { child, dir };
        let deadline = Instant::now() + PATIENCE;
        // Its socket is there before it listens.
        while UnixStream::connect(server.socket()).is_err() {
            assert!(Instant::now() < deadline, "nbdkit does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        server
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn target(&self, style: ReplyStyle) -> Target {
        let url = format!("nbd+unix:///?socket={}", self.socket().display());
        Target::parse(&url, style).unwrap()
    }

    fn tls_target(&self, certificates: &Path) -> Target {
        let (socket, certificates) = (self.socket(), certificates.display());
        let url =
            format!("nbds+unix:///?socket={}&tls-certificates={certificates}", socket.display());
        Target::parse(&url, ReplyStyle::Simple).unwrap()
    }

    /// Mixed random requests, all verified.
    fn plan(&self) -> Plan {
        Plan {
            target: self.target(ReplyStyle::Simple),
            workload: Workload {
                read_percent: 50,
                order: Order::Random,
                block_size: 4096,
                queue_depth: 16,
                rate_per_connection: None,
                flush_every: None,
            },
            connections: 1,
            threads: 1,
            length: Length::Ops(5000),
            span: None,
            verify: true,
            seed: 1,
            server: None,
        }
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_sound_server_passes_over_several_connections() {
    let server = Nbdkit::start(&["memory", "8M"]);
    for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
        let plan = Plan { connections: 3, threads: 2, ..server.plan() };
        let outcome = run(&Plan { target: server.target(style), ..plan }).unwrap();
        let Recorder { reads, writes, flushes, errors, .. } = &outcome.recorder;
        assert_eq!(reads.len() + writes.len(), 5000);
        assert_eq!(flushes.len(), 3, "each connection flushes before it ends");
        assert!(errors.is_empty(), "{errors:?}");
        // Every block written was read back once more.
        assert!(outcome.recorder.checked_count > reads.len());
        assert_eq!(outcome.recorder.fault_count, 0, "{:?}", outcome.recorder.faults);
    }
}

#[test]
fn sequential_writes_cover_the_volume_once() {
    let server = Nbdkit::start(&["memory", "8M"]);
    let mut plan = server.plan();
    plan.workload.read_percent = 0;
    plan.workload.order = Order::Sequential;
    plan.workload.block_size = 64 << 10;
    plan.length = Length::Ops((8 << 20) / (64 << 10));
    let outcome = run(&plan).unwrap();
    assert_eq!(outcome.recorder.writes.len(), 128);
    assert_eq!(outcome.recorder.checked_count, 128);
    assert_eq!(outcome.recorder.fault_count, 0, "{:?}", outcome.recorder.faults);
}

#[test]
fn a_server_that_forgets_writes_is_found_out() {
    let server = Nbdkit::start(&["null", "8M"]);
    let outcome = run(&server.plan()).unwrap();
    assert!(outcome.recorder.fault_count > 0);
    assert!(outcome.recorder.faults[0].to_string().contains("no pattern"));
}

#[test]
fn errors_of_the_server_are_counted_and_do_not_end_the_load() {
    const EIO: u32 = 5;
    let server = Nbdkit::start(&["--filter=error", "memory", "8M", "error-pread-rate=100%"]);
    let outcome = run(&Plan { verify: false, ..server.plan() }).unwrap();
    assert_eq!(outcome.recorder.count(), 5000);
    assert_eq!(outcome.recorder.errors.get(&EIO), Some(&outcome.recorder.reads.len()));
}

#[test]
fn a_server_that_dies_is_an_error_and_not_a_hang() {
    let mut server = Nbdkit::start(&["--filter=delay", "memory", "8M", "delay-read=50ms"]);
    let plan = Plan {
        verify: false,
        length: Length::Time { warmup: Duration::ZERO, measure: PATIENCE * 5 },
        ..server.plan()
    };
    let start = Instant::now();
    let load = thread::spawn(move || run(&plan));
    thread::sleep(Duration::from_millis(200));
    server.child.kill().unwrap();
    assert!(load.join().unwrap().is_err());
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn a_timed_load_knows_what_the_server_used() {
    let server = Nbdkit::start(&["memory", "8M"]);
    let plan = Plan {
        verify: false,
        length: Length::Time {
            warmup: Duration::from_millis(50),
            measure: Duration::from_millis(300),
        },
        ..server.plan()
    };
    let outcome = run(&plan).unwrap();
    let us = outcome.server_cpu_us_per_op().expect("a unix socket tells the process");
    assert!(us > 0.1 && us < 1000.0, "{us}");
    assert!(outcome.ops_per_s() > 100.0);
    assert_eq!(outcome.server.unwrap(), ProcessTree::new(server.child.id()));
}

#[test]
fn a_paced_load_keeps_its_pace() {
    let server = Nbdkit::start(&["memory", "8M"]);
    let mut plan = server.plan();
    plan.verify = false;
    plan.workload.rate_per_connection = Some(500.0);
    plan.connections = 2;
    plan.length = Length::Ops(500);
    let begun = Instant::now();
    let count = run(&plan).unwrap().recorder.count();
    // Slower it may be: others use the machine too.
    assert!(begun.elapsed() >= Duration::from_millis(450), "500 requests at 1000/s");
    assert_eq!(count, 500);
}

#[test]
fn a_load_over_tls_is_verified_at_every_size() {
    let server = Nbdkit::start_tls(&["memory", "32M"]);
    let target = server.tls_target(&server.dir.path().join("tls"));
    for (block_size, connections, ops) in
        [(512, 1, 2000), (4096, 3, 3000), (48 << 10, 1, 400), (1 << 20, 2, 100)]
    {
        let mut plan = Plan { target: target.clone(), connections, ..server.plan() };
        plan.workload.block_size = block_size;
        plan.workload.queue_depth = 8;
        plan.length = Length::Ops(ops);
        let recorder = run(&plan).unwrap().recorder;
        assert_eq!(recorder.reads.len() + recorder.writes.len(), ops);
        assert!(recorder.checked_count > 0);
        assert_eq!(recorder.fault_count, 0, "{block_size}: {:?}", recorder.faults);
        // Without verification payloads are dropped on another path.
        let recorder = run(&Plan { verify: false, ..plan }).unwrap().recorder;
        assert_eq!((recorder.count(), recorder.errors.len()), (ops, 0));
    }
}

#[test]
fn a_server_of_another_authority_is_refused() {
    let server = Nbdkit::start_tls(&["memory", "1M"]);
    let stranger = TempDir::new().unwrap();
    tls_files::make(&stranger.path().join("tls")).unwrap();
    let refused = server.tls_target(&stranger.path().join("tls")).connect();
    let error = format!("{:#}", refused.unwrap_err());
    assert!(error.contains("TLS") && error.contains("certificate"), "{error}");
}

#[test]
fn a_server_without_tls_is_refused_if_tls_is_wanted() {
    let server = Nbdkit::start(&["memory", "1M"]);
    let dir = TempDir::new().unwrap();
    tls_files::make(&dir.path().join("tls")).unwrap();
    assert!(server.tls_target(&dir.path().join("tls")).connect().is_err());
}
