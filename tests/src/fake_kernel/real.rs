//! Devices that the real kernel has, too: a loop device, on a file that `nbdfuse` serves, on the
//! device of the stand-in. They can be mounted, and all their I/O goes through the daemon.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::{Run, eventually, python};

/// The size of the file below a block device: the device itself has the size that it has for now.
pub(super) const FILE_SIZE: u64 = 1 << 60;

/// A block device. It ends when it is dropped.
pub(super) struct RealDevice {
    /// Where programs find it: a link.
    path: PathBuf,
    file: PathBuf,
    device: PathBuf,
    nbdfuse: Child,
    /// Dropped when nbdfuse has ended.
    _keeper: Sender<()>,
}

impl RealDevice {
    /// Makes one of what is served at a socket.
    pub(super) fn new(path: &Path, socket: &Path, size: u64) -> Self {
        let file = socket.with_extension("file");
        let pid = socket.with_extension("pid");
        File::create(&file).expect("a mount point");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "nbdfuse", "--pidfile"]);
        command.arg(&pid).arg(&file).arg("--unix").arg(socket);
        // A test waits for the end of what its processes write.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let (nbdfuse, _keeper) = spawn_kept(command);
        assert!(eventually(|| pid.exists()), "nbdfuse does not serve {}", file.display());
        fs::remove_file(pid).expect("removed");
        let limit = format!("--sizelimit={size}");
        let device = Run::new("losetup").args("--find --show").arg(limit).arg(&file).ok();
        let device = PathBuf::from(device.trim_end());
        let _ = fs::remove_file(path);
        symlink(&device, path).expect("a link");
        Self { path: path.to_owned(), file, device, nbdfuse, _keeper }
    }

    /// What sets its size in the real kernel.
    pub(super) fn grow(&self, size: u64) -> Run {
        python("grow_loop.py").arg(&self.device).arg(size.to_string())
    }

    /// Has all I/O fail from now on.
    pub(super) fn fail(&mut self) {
        let _ = self.nbdfuse.kill();
    }

    /// Opens it exclusively: as long as that is open, it cannot be mounted.
    pub(super) fn claim(&self) -> Result<File, Errno> {
        let alone = OFlags::EXCL.bits().cast_signed();
        let opened = OpenOptions::new().read(true).custom_flags(alone).open(&self.device);
        opened.map_err(|_| Errno::BUSY)
    }

    /// Detaches loop devices on this device, such as kubelet's for a raw volume. Each keeps it open
    /// after the node has ended.
    fn detach_users(&self) {
        let listed = Run::new("losetup").args("--noheadings --output NAME --associated");
        let listed = listed.arg(&self.device).output().stdout;
        for user in listed.split_whitespace() {
            let _ = Run::new("losetup").arg("--detach").arg(user).output();
        }
    }
}

/// Starts a program from a thread that lives until the sender is dropped. If a signal ends this
/// process before, the program is killed: else the process would wait for I/O on its own device,
/// which nothing serves any more.
fn spawn_kept(mut command: Command) -> (Child, Sender<()>) {
    let (tell, told) = channel();
    let (keeper, kept) = channel::<()>();
    thread::spawn(move || {
        let _ = tell.send(command.spawn());
        let _ = kept.recv();
    });
    let spawned = told.recv().expect("the thread answers");
    (spawned.expect("setpriv (util-linux), nbdfuse (libnbd-bin)"), keeper)
}

impl Drop for RealDevice {
    fn drop(&mut self) {
        if fs::read_link(&self.path).is_ok_and(|device| device == self.device) {
            let _ = fs::remove_file(&self.path);
        }
        self.detach_users();
        let _ = Run::new("losetup").arg("--detach").arg(&self.device).output();
        // The kernel detaches it when its last user, such as a probe, has closed it; until then
        // the file is busy.
        let ended = eventually(|| {
            let _ = Run::new("umount").arg(&self.file).output();
            matches!(self.nbdfuse.try_wait(), Ok(Some(_)))
        });
        if !ended {
            let _ = self.nbdfuse.kill();
        }
        let _ = self.nbdfuse.wait();
        // Left by one that was killed.
        let _ = Run::new("umount").arg("--lazy").arg(&self.file).output();
        let _ = fs::remove_file(&self.file);
    }
}
