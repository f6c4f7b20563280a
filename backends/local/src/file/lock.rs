//! Locks of files against use by two programs. There are five means, because programs differ in how
//! they show their use:
//!
//! 1. a table of the files that this process has open, also for file systems without locks;
//! 2. `flock`, between processes of ours: shared for readers, exclusive for a writer. On NFS it is
//!    a lock of one byte, which holds between nodes;
//! 3. a lock on all bytes of a writer's file, which collides with the byte locks of qemu and of
//!    programs with POSIX locks. It belongs to the open file description (fcntl(2), F_OFD_SETLK): a
//!    POSIX lock would end as soon as any other descriptor of the file is closed in this process;
//! 4. a search for processes that have it open for writing ([`super::holders`]), for programs that
//!    lock nothing. It reads about all open files of the machine, so the kernel is asked first
//!    whether there is another writer at all;
//! 5. a lock on a byte behind all others ([`GUARD`]) of every description that is written through.
//!    The other locks end with their process, while its direct I/O may still be in flight and
//!    overwrite later data. This one ends with the last request.

use std::fs::{File, Metadata, TryLockError};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, c_short, flock};
use rustix::fs::fstatfs;
use sheave_core::{Error, ErrorKind, Result, printable};
use sheave_ring::check_only_writer;

use super::batch;
use super::forks::{Kind, Turn};
use super::holders::{self, Holder};

/// What to do about a file that is in use.
const ADVICE: &str = "stop it, or add lock=false if you know that it does not write";
/// NFS (statfs(2)).
const NFS: u32 = 0x6969;
/// SMB. It turns `flock` into a POSIX lock, which would collide with our own.
const SMB: [u32; 2] = [0xff53_4d42, 0xfe53_4d42];
/// Where nodes may share files, and locks of files work: NFS and CephFS.
const SHARED_FILE_SYSTEMS: [u32; 2] = [NFS, 0x00c3_6400];

/// The byte behind all others, which is locked for as long as there may be I/O in flight.
const GUARD: i64 = 1 << 62;
/// The byte that stands for the file on NFS.
const WHOLE: i64 = GUARD + 1;
/// I/O that a dead process leaves behind completes within milliseconds, unless its disk is slow.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(1);

/// What the other program does.
pub(super) const WRITES: &str = "has it open for writing";

/// The longest time between fork and exec of a child, which closes the files that it inherited.
pub(super) const EXEC_TIMEOUT: Duration = Duration::from_millis(200);
/// The same on a machine that has much to do, if no other program is seen to have the file.
const CHILD_TIMEOUT: Duration = Duration::from_secs(2);
pub(super) const EXEC_POLL: Duration = Duration::from_millis(10);

/// Identifies a file under all its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) dev: u64,
    pub(super) ino: u64,
    /// The device behind a device file, which may have several names.
    pub(super) rdev: Option<u64>,
}

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        let is_device = metadata.file_type().is_block_device();
        let rdev = is_device.then(|| metadata.rdev());
        Self { dev: metadata.dev(), ino: metadata.ino(), rdev }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self.rdev, other.rdev) {
            (None, None) => self == other,
            (mine, theirs) => mine == theirs,
        }
    }
}

/// An entry in the table of files that this process has open; removed on drop.
pub(super) struct OpenEntry {
    identity: Identity,
    read_only: bool,
}

static OPEN_FILES: Mutex<Vec<(Identity, bool)>> = Mutex::new(Vec::new());

impl OpenEntry {
    /// Enters a file: any number of readers, or one writer.
    pub(super) fn new(identity: &Identity, name: &str, read_only: bool) -> Result<Self> {
        let mut open_files = open_files();
        let collides = open_files
            .iter()
            .any(|(other, reads)| identity.is_same(other) && !(read_only && *reads));
        if collides {
            let why = format!(
                "{name}: this process has it open already; a file is one volume, unless all that \
                 have it are read-only"
            );
            return Err(Error::new(ErrorKind::Busy, "open", why));
        }
        open_files.push((*identity, read_only));
        Ok(Self { identity: *identity, read_only })
    }
}

impl Drop for OpenEntry {
    fn drop(&mut self) {
        let mut open_files = open_files();
        let own = open_files.iter().position(|entry| *entry == (self.identity, self.read_only));
        if let Some(own) = own {
            open_files.swap_remove(own);
        }
    }
}

fn open_files() -> MutexGuard<'static, Vec<(Identity, bool)>> {
    // Entries are added and removed whole.
    OPEN_FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks an open file against other processes, or names the process that holds it.
pub(super) fn lock(file: &File, identity: &Identity, path: &Path, read_only: bool) -> Result<()> {
    lock_others_out(file, identity, path, read_only)?;
    let begun = Instant::now();
    while !read_only && is_guarded(file) {
        if begun.elapsed() > IN_FLIGHT_TIMEOUT {
            let what = "has ended, and what it wrote is still on its way to the disk";
            return Err(refusal(path, "the process that had it", what));
        }
        sleep(EXEC_POLL);
    }
    Ok(())
}

/// Locks the byte behind all others for this description, which I/O in flight keeps open. On a file
/// system that nodes share, it also ends the writing of this node if the server takes its locks.
///
/// # Errors
/// Where nodes share files, and it cannot be had.
pub(super) fn guard(file: &File, path: &Path) -> Result<()> {
    if is_on(file, &SMB) {
        return Ok(());
    }
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range(F_RDLCK, GUARD, 1))) {
        Err(errno) if is_on(file, &SHARED_FILE_SYSTEMS) => Err(no_locks(path, errno.into())),
        // Without such locks (an old kernel) there is no guard.
        _ => Ok(()),
    }
}

/// Whether another description with this lock is still open.
fn is_guarded(file: &File) -> bool {
    let mut found = range(F_WRLCK, GUARD, 1);
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut found));
    asked.is_ok() && c_int::from(found.l_type) != F_UNLCK
}

fn range(kind: c_int, start: i64, len: i64) -> flock {
    let whence = SEEK_SET as c_short;
    flock { l_type: kind as c_short, l_whence: whence, l_start: start, l_len: len, l_pid: 0 }
}

/// Why a file cannot be locked.
enum Refused {
    /// Another description has a lock.
    Locked,
    Because(Error),
}

fn lock_others_out(file: &File, identity: &Identity, path: &Path, read_only: bool) -> Result<()> {
    let (_turn, begun) = (Turn::take(Kind::Lock), Instant::now());
    loop {
        let Err(refused) = try_lock(file, identity, path, read_only) else { return Ok(()) };
        // By a child that has just begun to be another program, perhaps.
        if begun.elapsed() < EXEC_TIMEOUT {
            sleep(EXEC_POLL);
            continue;
        }
        let holders = holders_of(identity);
        // A child that has let go of it by now is not found any more.
        let may_pass = holders.iter().all(Holder::is_child) && begun.elapsed() < CHILD_TIMEOUT;
        match refused {
            _ if may_pass => {}
            Refused::Locked => return Err(refusal(path, &first(&holders), "has locked it")),
            Refused::Because(error) => return Err(error),
        }
    }
}

fn try_lock(file: &File, identity: &Identity, path: &Path, read_only: bool) -> Result<(), Refused> {
    match lock_whole(file, read_only) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Refused::Locked),
        Err(TryLockError::Error(error)) if is_on(file, &SHARED_FILE_SYSTEMS) => {
            return Err(Refused::Because(no_locks(path, error)));
        }
        // The file system has no locks: only the search for holders is left.
        Err(TryLockError::Error(_)) => {}
    }
    if !read_only && !is_on(file, &[NFS]) && !is_on(file, &SMB) {
        // Any other error means that this file system has no locks.
        let locked = fcntl(file, FcntlArg::F_OFD_SETLK(&range(F_WRLCK, 0, GUARD)));
        if matches!(locked, Err(Errno::EAGAIN | Errno::EACCES)) {
            return Err(Refused::Locked);
        }
    }
    // What the kernel counts has no search to wait for. Where it counts nothing, or another one,
    // the search finds out which.
    if check_only_writer(file, !read_only).is_ok() || batch::defer(identity, path) {
        return Ok(());
    }
    match writer(&[*identity]) {
        Some((_, holder)) => Err(Refused::Because(refusal(path, &holder, WRITES))),
        None => Ok(()),
    }
}

/// Locks a file by `flock`, or on NFS by one byte. There `flock` is a lock on all bytes, which
/// would collide with the guards, and the server shows a lock of one byte to programs with `flock`,
/// too.
fn lock_whole(file: &File, read_only: bool) -> Result<(), TryLockError> {
    if !is_on(file, &[NFS]) {
        return if read_only { file.try_lock_shared() } else { file.try_lock() };
    }
    let kind = if read_only { F_RDLCK } else { F_WRLCK };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, WHOLE, 1))) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(TryLockError::WouldBlock),
        Err(errno) => Err(TryLockError::Error(errno.into())),
    }
}

fn no_locks(path: &Path, error: std::io::Error) -> Error {
    let why = format!(
        "{}: nodes may share its file system, and it cannot be locked there; look at its server, \
         or add lock=false if nothing else uses it",
        printable(&path)
    );
    Error::new(ErrorKind::Io, "open", why).because(error)
}

/// A program that has one of the files open for writing, and the index of the file.
pub(super) fn writer(files: &[Identity]) -> Option<(usize, String)> {
    if let Some(index) = holders::qemu_writes(&holders::locks(), files) {
        return Some((index, any_holder(&files[index])));
    }
    let found = holders::find_all(files).into_iter().find(|(_, holder)| holder.writes);
    found.map(|(index, holder)| (index, holder.to_string())).or_else(|| holders::loop_device(files))
}

/// Whether a file is on a file system with one of these magic numbers (statfs(2)).
pub(super) fn is_on(file: &File, magics: &[u32]) -> bool {
    // They have 32 bits, whatever the type of the field.
    fstatfs(file).is_ok_and(|stat| magics.contains(&(stat.f_type as u32)))
}

fn any_holder(identity: &Identity) -> String {
    first(&holders_of(identity))
}

/// The programs that have a file open. One that writes is the likelier owner of a lock.
fn holders_of(identity: &Identity) -> Vec<Holder> {
    let mut holders = holders::find(identity);
    holders.sort_by_key(|holder| !holder.writes);
    holders
}

fn first(holders: &[Holder]) -> String {
    holders.first().map_or_else(|| "another program".to_owned(), Holder::to_string)
}

pub(super) fn refusal(path: &Path, holder: &str, what: &str) -> Error {
    let why = format!("{}: {holder} {what}; {ADVICE}", printable(&path));
    Error::new(ErrorKind::Busy, "open", why)
}
