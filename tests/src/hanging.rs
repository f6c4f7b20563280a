//! A file system whose storage can stop answering, as a disk or a file server does.
//!
//! It is ext4 on a loop device, on a file that `nbdfuse` serves from a server that is stopped by a
//! signal. What the kernel has in memory is still found there.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::{Run, Scratch, eventually, sheave};

/// Bytes of the disk, which is sparse.
const SIZE: &str = "2G";

/// A disk with a mounted file system, in the mount namespace of the test. It takes root, loop
/// devices and `nbdfuse`. Drop it after all that has files of it open.
pub struct HangingDisk {
    scratch: Scratch,
    server: Child,
    nbdfuse: Child,
    device: PathBuf,
}

/// A disk that does not answer. Drop it before what waits for the disk.
pub struct Hang<'a>(&'a HangingDisk);

impl Default for HangingDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl HangingDisk {
    /// A disk that answers.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let scratch = Scratch::new();
        let path = |name: &str| scratch.path().join(name);
        Run::new("truncate").args("--size").arg(SIZE).arg(path("image")).ok();
        let server = start(Command::new(sheave()).arg("serve").arg(path("image")).args([
            "--engine",
            "threads",
            "--socket",
            path("s").to_str().expect("UTF-8"),
        ]));
        assert!(eventually(|| path("s").exists()), "no server");
        File::create(path("file")).expect("a mount point");
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse.arg("--pidfile").arg(path("pid")).arg(path("file"));
        let nbdfuse = start(nbdfuse.arg("--unix").arg(path("s")));
        assert!(eventually(|| path("pid").exists()), "nbdfuse does not serve");
        // Else the loop device would read from the page cache of the file.
        let device = Run::new("losetup").args("--direct-io=on --find --show").arg(path("file"));
        let device = PathBuf::from(device.ok().trim_end());
        Run::new("mkfs.ext4").args("-q").arg(&device).ok();
        fs::create_dir(path("disk")).expect("a mount point");
        let disk = Self { scratch, server, nbdfuse, device };
        disk.mount();
        disk
    }

    /// Where it is mounted.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.scratch.path().join("disk")
    }

    /// Has the kernel forget what it knows of it. No file of it may be open.
    ///
    /// # Panics
    /// When one is.
    pub fn forget(&self) {
        assert!(eventually(|| self.unmount(&[])), "it is in use");
        self.mount();
    }

    /// Has it answer no more, until what this returns is dropped: then it answers also what it was
    /// asked in the meantime.
    ///
    /// # Panics
    /// When its server is gone.
    #[must_use]
    pub fn hang(&self) -> Hang<'_> {
        self.signal("STOP");
        Hang(self)
    }

    fn mount(&self) {
        Run::new("mount").arg(&self.device).arg(self.dir()).ok();
    }

    fn unmount(&self, args: &[&str]) -> bool {
        let unmount = args.iter().fold(Run::new("umount"), |run, arg| run.arg(arg));
        unmount.arg(self.dir()).output().status.success()
    }

    fn signal(&self, signal: &str) {
        Run::new("kill").arg(format!("-{signal}")).arg(self.server.id().to_string()).ok();
    }
}

impl Drop for Hang<'_> {
    fn drop(&mut self) {
        self.0.signal("CONT");
    }
}

impl Drop for HangingDisk {
    fn drop(&mut self) {
        if !self.unmount(&[]) {
            self.unmount(&["--lazy"]);
        }
        let _ = Run::new("losetup").arg("--detach").arg(&self.device).output();
        let file = self.scratch.path().join("file");
        let ended = eventually(|| {
            let _ = Run::new("umount").arg(&file).output();
            matches!(self.nbdfuse.try_wait(), Ok(Some(_)))
        });
        if !ended {
            let _ = self.nbdfuse.kill();
            let _ = self.nbdfuse.wait();
        }
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Starts a program that ends with the test, whose output nothing waits for.
fn start(command: &mut Command) -> Child {
    let mut bound = Command::new("setpriv");
    bound.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    bound.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    bound.spawn().expect("setpriv (util-linux)")
}
