//! Locks of a journal's files, and where they must not be.
//!
//! A lock belongs to an open file description (fcntl(2), `F_OFD_SETLK`). The lock file is locked
//! for as long as the journal is open. Besides, each segment has a locked byte behind all others:
//! writes that a killed process has left in its ring still hold the description, and so this lock,
//! until the last of them is done. A successor that replays before would miss them, or be
//! overwritten by them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, c_short, flock};
use rustix::fs::fstatfs;
use sheave_core::{Error, ErrorKind, Result, printable};

/// The byte behind all others.
const GUARD: i64 = 1 << 62;
/// Between fork and exec a child still has the files of its parent, and I/O of a dead process
/// completes within milliseconds, unless its disk is slow.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);
/// File systems that nodes share, or whose server may lose a write that it has acknowledged
/// (statfs(2)): NFS, SMB (three), CephFS, AFS, 9P, GFS2, OCFS2.
const NETWORK: [u32; 9] = [
    0x6969,
    0x517b,
    0xff53_4d42,
    0xfe53_4d42,
    0x00c3_6400,
    0x5346_414f,
    0x0102_1997,
    0x0116_1970,
    0x7461_636f,
];

/// Refuses a directory that is not on a disk of this node.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for it, and errors of the file system.
pub(super) fn check_local(dir: &Path) -> Result<()> {
    let failed = |error| Error::from_io("open", printable(&dir).to_string(), error);
    let file = File::open(dir).map_err(failed)?;
    let stat = fstatfs(&file).map_err(|errno| failed(errno.into()))?;
    if NETWORK.contains(&(stat.f_type as u32)) {
        let why = format!(
            "{}: is on a network file system, and a journal must be on a disk of this node; name \
             another directory by cache-dir",
            printable(&dir)
        );
        return Err(Error::new(ErrorKind::Unsupported, "open", why));
    }
    Ok(())
}

/// Locks a journal for as long as the answer is open.
///
/// # Errors
/// [`ErrorKind::Busy`] when it is locked already, and errors of the file system.
pub(super) fn lock(path: &Path) -> Result<File> {
    let failed = |error| Error::from_io("open", printable(&path).to_string(), error);
    let mut options = OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = file.map_err(failed)?;
    let begun = Instant::now();
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&range(F_WRLCK, 0, 1))) {
            Ok(_) => return Ok(file),
            Err(Errno::EAGAIN | Errno::EACCES) if begun.elapsed() < LOCK_TIMEOUT => sleep(POLL),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                let why = format!(
                    "{}: the volume is open on this node; stop that program, or use its export",
                    printable(&path)
                );
                return Err(Error::new(ErrorKind::Busy, "open", why));
            }
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// Locks the byte behind all others for this description of a segment.
///
/// # Errors
/// Errors of the file system.
pub(super) fn guard(file: &File, path: &Path) -> Result<()> {
    let locked = fcntl(file, FcntlArg::F_OFD_SETLK(&range(F_RDLCK, GUARD, 1)));
    locked.map_err(|errno| Error::from_io("lock", printable(&path).to_string(), errno.into()))?;
    Ok(())
}

/// Waits until no description of a segment is guarded.
///
/// # Errors
/// [`ErrorKind::Busy`] when that takes too long.
pub(super) fn wait_for_guards(file: &File, path: &Path) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut found = range(F_WRLCK, GUARD, 1);
        let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut found));
        asked
            .map_err(|errno| Error::from_io("lock", printable(&path).to_string(), errno.into()))?;
        if c_int::from(found.l_type) == F_UNLCK {
            return Ok(());
        }
        if begun.elapsed() > LOCK_TIMEOUT {
            let why = format!(
                "{}: what the process that had the volume wrote is still on its way to the disk; \
                 try again later, or look at the disk",
                printable(&path)
            );
            return Err(Error::new(ErrorKind::Busy, "open", why));
        }
        sleep(POLL);
    }
}

fn range(kind: c_int, start: i64, len: i64) -> flock {
    let whence = SEEK_SET as c_short;
    flock { l_type: kind as c_short, l_whence: whence, l_start: start, l_len: len, l_pid: 0 }
}
