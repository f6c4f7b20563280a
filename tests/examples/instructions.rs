//! Counts the server's instructions per request, with one mounted volume and with a thousand.
//!
//! `cargo build --bin sheave && cargo run -p sheave-tests --example instructions` needs valgrind.
//! Only of the ring: with plain threads, a connection has a backend and a loop of its own.
//!
//! Time is no measure on a machine that has other work; instructions in user space are. The server
//! runs one shard that never polls, and has gone to sleep when the next request comes, so that each
//! request costs the same turns. `SHEAVE_BIN` names the binary.
//!
//! Valgrind 3.19 takes io_uring_enter(2) for a call that does not block, and runs no other thread
//! meanwhile. So a thread here wakes the shard again and again while the others have work.
#![allow(clippy::print_stdout, reason = "a tool for a terminal")]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use sheave_tests::{PATIENCE, Scratch, cmd, opt, option_header, request_header, sheave};

const REQUESTS: u64 = 1000;
const BATCHES: usize = 3;
/// Requests before the count begins, so that what is made once is made.
const WARM_UP: u64 = 50;
const IDLE_VOLUMES: usize = 1000;
/// The part that idle volumes may add to what a request costs.
const EXTRA_MAX: f64 = 0.05;
const LEN: u32 = 4096;
/// How long the shard is left alone before a request, so that it always sleeps when one comes, and
/// takes as many turns for each.
const PAUSE: Duration = Duration::from_millis(2);
/// How often the shard is woken while other threads have work, and while callgrind has: what that
/// costs is counted.
const WAKE_EVERY: Duration = Duration::from_micros(100);
const WAKE_FOR_CONTROL_EVERY: Duration = Duration::from_millis(10);
const WAKES_PER_LOOK: usize = 500;

fn main() -> io::Result<()> {
    let scratch = Scratch::new();
    let image = scratch.path().join("a.img");
    fs::write(&image, vec![7; 1 << 20])?;
    let image = image.to_string_lossy();
    let mut is_flat = true;
    for (kind, volume) in [("memory", "memory:?size=1M"), ("file", &*image)] {
        let (alone, crowded) = (count(volume, 0)?, count(volume, IDLE_VOLUMES)?);
        for (op, one, many) in [("read", alone[0], crowded[0]), ("write", alone[1], crowded[1])] {
            let extra = many / one - 1.0;
            is_flat &= extra <= EXTRA_MAX;
            let percent = extra * 100.0;
            println!(
                "{kind:6} {op:5} 4 KiB: {one:6.0} instructions, {many:6.0} with {IDLE_VOLUMES} \
                 idle volumes ({percent:+.1} %)"
            );
        }
    }
    if is_flat { Ok(()) } else { Err(io::Error::other("idle volumes cost more than 5 %")) }
}

/// Instructions of a read and of a write on `volume` beside so many idle volumes.
fn count(volume: &str, idle: usize) -> io::Result<[f64; 2]> {
    let mut server = Server::start(volume, idle)?;
    let connect = |server: &Server| -> io::Result<Vec<UnixStream>> {
        let idle = (0..idle).map(|number| server.connect(&format!("idle-{number}")));
        idle.chain([server.connect("busy")]).collect()
    };
    let mut streams = server.awake(WAKE_EVERY, connect)?;
    let busy = streams.last_mut().expect("the busy one");
    let mut data = vec![5; LEN as usize];
    let mut reply = [0; 16];
    let read = server.per_request(|at| {
        busy.write_all(&request_header(0, cmd::READ, at, at, LEN))?;
        busy.read_exact(&mut reply)?;
        busy.read_exact(&mut data)
    })?;
    let write = server.per_request(|at| {
        busy.write_all(&[&request_header(0, cmd::WRITE, at, at, LEN), &data[..]].concat())?;
        busy.read_exact(&mut reply)
    })?;
    Ok([read, write])
}

/// A server whose instructions are counted.
struct Server {
    child: Child,
    socket: PathBuf,
    /// What callgrind writes to, with a number behind it.
    dumps: PathBuf,
    dumped: usize,
    _scratch: Scratch,
}

impl Server {
    fn start(volume: &str, idle: usize) -> io::Result<Self> {
        let scratch = Scratch::new();
        let [socket, dumps, config] = ["s", "dump", "toml"].map(|name| scratch.path().join(name));
        let export =
            |name: &str, volume| format!("[[export]]\nname = \"{name}\"\nvolume = \"{volume}\"\n");
        let idle = (0..idle).map(|number| export(&format!("idle-{number}"), "memory:?size=1M"));
        fs::write(&config, idle.chain([export("busy", volume)]).collect::<String>())?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "valgrind", "-q", "--tool=callgrind"])
            .args(["--fair-sched=yes", "--max-threads=2000"])
            .arg(format!("--callgrind-out-file={}", dumps.display()))
            .arg(sheave())
            .args(["serve", "--shards", "1", "--poll-us", "0", "--engine", "uring", "--config"])
            .arg(config)
            .arg("--socket")
            .arg(&socket)
            .env("SHEAVE_RUNTIME_DIR", scratch.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { child, socket, dumps, dumped: 0, _scratch: scratch })
    }

    /// Connects to an export in the oldest way, whose replies are simple.
    fn connect(&self, export: &str) -> io::Result<UnixStream> {
        let begun = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > PATIENCE => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read_exact(&mut [0; 18])?;
        let no_zeroes = 3_u32.to_be_bytes();
        let option = option_header(opt::EXPORT_NAME, export.len() as u32);
        stream.write_all(&[&no_zeroes[..], &option, export.as_bytes()].concat())?;
        stream.read_exact(&mut [0; 10])?;
        Ok(stream)
    }

    /// Runs `work`, which needs more threads of the server than its shard.
    fn awake<T>(&self, every: Duration, work: impl FnOnce(&Self) -> T) -> T {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    // It makes them one by one as it starts.
                    let mut eventfds = self.eventfds();
                    for _ in 0..WAKES_PER_LOOK {
                        if done.load(Relaxed) {
                            return;
                        }
                        for eventfd in &mut eventfds {
                            // A full one wakes as well.
                            let _ = eventfd.write(&1_u64.to_le_bytes());
                        }
                        thread::sleep(every);
                    }
                }
            });
            let result = work(self);
            done.store(true, Relaxed);
            result
        })
    }

    /// The eventfds of the server. One of them is its shard's.
    fn eventfds(&self) -> Vec<File> {
        let Ok(pidfd) = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()) else {
            return Vec::new();
        };
        let Ok(fds) = fs::read_dir(format!("/proc/{}/fd", self.child.id())) else {
            return Vec::new();
        };
        let is_eventfd = |path: &Path| {
            fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("eventfd"))
        };
        let fds = fds.flatten().filter(|entry| is_eventfd(&entry.path()));
        let numbers = fds.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
        let duplicates =
            numbers.filter_map(|fd| pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).ok());
        duplicates.map(File::from).collect()
    }

    /// Instructions per call of `request`, which is given an offset: the least of all batches,
    /// since a shard that is held up takes more turns.
    fn per_request(&mut self, mut request: impl FnMut(u64) -> io::Result<()>) -> io::Result<f64> {
        let mut run = |count| {
            (0..count).try_for_each(|number| {
                thread::sleep(PAUSE);
                request(number % 256 * u64::from(LEN))
            })
        };
        // The last connection may still be on its way to the shard.
        self.awake(WAKE_EVERY, |_| run(WARM_UP))?;
        let mut least = f64::INFINITY;
        for _ in 0..BATCHES {
            self.awake(WAKE_FOR_CONTROL_EVERY, |server| server.control("--zero"))?;
            run(REQUESTS)?;
            self.awake(WAKE_FOR_CONTROL_EVERY, |server| server.control("--dump"))?;
            self.dumped += 1;
            let dump = PathBuf::from(format!("{}.{}", self.dumps.display(), self.dumped));
            least = least.min(total_of(&dump)? as f64 / REQUESTS as f64);
        }
        Ok(least)
    }

    fn control(&self, what: &str) -> io::Result<()> {
        let output = Command::new("callgrind_control")
            .arg(what)
            .arg(self.child.id().to_string())
            .output()?;
        if output.status.success() {
            return Ok(());
        }
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may stand still, and has nothing to lose.
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }
}

/// The count in a dump, which callgrind writes soon.
fn total_of(dump: &Path) -> io::Result<u64> {
    let begun = Instant::now();
    loop {
        let text = fs::read_to_string(dump).unwrap_or_default();
        let total = text.lines().rev().find_map(|line| line.strip_prefix("totals: "));
        if let Some(total) = total.and_then(|total| total.trim().parse().ok()) {
            return Ok(total);
        }
        if begun.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("no total in {}", dump.display())));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
