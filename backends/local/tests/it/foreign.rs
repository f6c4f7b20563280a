//! Other people's programs that have a file open.
//!
//! These tests run `qemu-nbd` and `qemu-img`; where those are missing they fail and say so.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sheave_core::ErrorKind;
use tempfile::TempDir;

use sheave_local::{FileOptions, FileVolume};

/// Longest wait for anything that must come, on a slow machine with other work.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server; killed on drop.
struct Server(Child);

impl Server {
    fn start(program: &str, args: &[&str], socket: &Path) -> Self {
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("this test needs {program} installed: {error}"));
        let server = Self(child);
        let deadline = Instant::now() + PATIENCE;
        // A server that sends its greeting has opened its file; its socket may exist before.
        while !greets(socket) {
            assert!(Instant::now() < deadline, "{program} does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }
}

fn greets(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let mut magic = [0; 8];
    stream.read_exact(&mut magic).is_ok() && magic == *b"NBDMAGIC"
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Setup {
    dir: TempDir,
    image: PathBuf,
    socket: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let (image, socket) = (dir.path().join("a.img"), dir.path().join("s"));
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        Self { dir, image, socket }
    }

    fn qemu(&self, args: &[&str]) -> Server {
        let (socket, image) = (self.socket.to_str().unwrap(), self.image.to_str().unwrap());
        let args = [args, &["-f", "raw", "-t", "-k", socket, image]].concat();
        Server::start("qemu-nbd", &args, &self.socket)
    }

    /// Opens a file that no other program holds. A process that another test is starting holds
    /// copies of our descriptors until its `exec`, and so a lock that we have released; therefore
    /// it tries again.
    fn open(&self, read_only: bool) -> sheave_core::Result<FileVolume> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            match self.try_open(read_only) {
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                opened => return opened,
            }
        }
    }

    fn try_open(&self, read_only: bool) -> sheave_core::Result<FileVolume> {
        FileVolume::open(&FileOptions { read_only, ..FileOptions::new(&self.image) })
    }

    fn refused(&self, read_only: bool, who: &str) {
        let give_up = Instant::now() + PATIENCE;
        let message = loop {
            let error = self.try_open(read_only).err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::Busy);
            let message = error.to_string();
            // As above, the first lock found may be our own.
            if message.contains(who) || Instant::now() > give_up {
                break message;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(message.contains(who) && message.contains("lock=false"), "{message}");
    }
}

#[test]
fn a_qemu_that_writes_is_respected() {
    let setup = Setup::new();
    let server = setup.qemu(&[]);
    let who = format!("qemu-nbd (pid {})", server.0.id());
    setup.refused(false, &who);
    setup.refused(true, &who);
    let forced = FileOptions { lock: false, ..FileOptions::new(&setup.image) };
    drop(FileVolume::open(&forced).unwrap());
    drop(server);
    drop(setup.open(false).unwrap());
}

#[test]
fn a_qemu_that_reads_allows_readers_only() {
    let setup = Setup::new();
    let server = setup.qemu(&["--read-only"]);
    drop(setup.open(true).unwrap());
    setup.refused(false, "qemu-nbd");
    drop(server);
}

#[test]
fn qemu_respects_a_volume_that_writes_and_reads_beside_one_that_reads() {
    let setup = Setup::new();
    let writer = setup.open(false).unwrap();
    // Backends come and go; the lock must not go with them.
    drop(sheave_core::Volume::backend(&writer).unwrap());
    // A pool opens and closes the image when it grows it. POSIX locks would end with that.
    drop(std::fs::File::open(&setup.image).unwrap());
    let convert = || {
        let copy = setup.dir.path().join("copy.img");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "raw"]).arg(&setup.image).arg(copy);
        command.stderr(Stdio::null()).status().expect("this test needs qemu-img installed")
    };
    assert!(!convert().success(), "qemu-img must find it locked");
    drop(writer);
    let reader = setup.open(true).unwrap();
    assert!(convert().success());
    drop(reader);
}

#[test]
fn a_server_that_locks_nothing_is_found_by_its_open_file() {
    let setup = Setup::new();
    let file = format!("driver=raw,file.driver=file,file.filename={}", setup.image.display());
    let socket = setup.socket.to_str().unwrap();
    let image_opts = format!("{file},file.locking=off");
    let args = ["-t", "-k", socket, "--image-opts", &image_opts];
    let server = Server::start("qemu-nbd", &args, &setup.socket);
    let who = format!("qemu-nbd (pid {}) has it open for writing", server.0.id());
    setup.refused(true, &who);
    setup.refused(false, &who);
    drop(server);
    drop(setup.open(false).unwrap());
}
