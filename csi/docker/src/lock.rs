//! One plugin at a time has the records: two would each write their own view of the references.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sheave_core::printable;
use sheave_node::{Error, Kind, Result};

/// Has no name of a record, which ends with `.json`.
const NAME: &str = "lock";
/// Held by one that takes the lock from a dead one.
const NAME_TAKING: &str = "lock.taking";
/// How long a plugin that is being replaced may take to end.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Held until it is dropped, or its process ends. What a process starts does not share it.
#[derive(Debug)]
pub(crate) struct RecordsLock {
    _file: File,
}

impl RecordsLock {
    /// Takes the lock of the records in this directory, and waits 10 s for another plugin to end.
    ///
    /// A killed plugin keeps its files as long as one of its threads waits in the kernel for
    /// storage that hangs. That thread ends without another step, so the lock is taken from it.
    ///
    /// # Errors
    /// [`Kind::Refused`] with the process that has it, and what the file system says.
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let begun = Instant::now();
        loop {
            let mut file = open(&path)?;
            if lock(&file, &path)? {
                if is_at(&file, &path) {
                    // For the message of another one only; there may be no room for it.
                    let _ = note_holder(&mut file);
                    return Ok(Self { _file: file });
                }
                // It was taken from a dead one meanwhile.
                continue;
            }
            if take_from_dead(dir, &file, &path)? {
                continue;
            }
            if begun.elapsed() >= LOCK_TIMEOUT {
                let why = format!(
                    "{}: another docker-plugin has these volumes, {}; end that one, or give this \
                     one a directory and a node name of its own (SHEAVE_STATE_DIR, --node-id)",
                    printable(dir),
                    match holder(&path) {
                        Some(pid) => format!("process {pid}"),
                        None => "in a process that is not known".to_owned(),
                    }
                );
                return Err(Error::new(Kind::Refused, why));
            }
            sleep(LOCK_POLL);
        }
    }
}

fn open(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    opened.map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::of_io(format!("lock {}", printable(path)), error)
}

/// Locks a file; false if another process has it.
fn lock(file: &File, path: &Path) -> Result<bool> {
    loop {
        return match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(Errno::INTR) => continue,
            Err(errno) => Err(failed(path, &errno.into())),
        };
    }
}

/// Removes the lock file of a process that is dead but for threads in the kernel: the next one has
/// a file of its own. True if that is done.
fn take_from_dead(dir: &Path, file: &File, path: &Path) -> Result<bool> {
    if !owner(file).is_some_and(is_dead) {
        return Ok(false);
    }
    // Else a second one that has seen the same would remove the file of the first.
    let alone = dir.join(NAME_TAKING);
    let taking = open(&alone)?;
    if !lock(&taking, &alone)? || !is_at(file, path) || !owner(file).is_some_and(is_dead) {
        return Ok(false);
    }
    fs::remove_file(path).map_err(|error| failed(path, &error))?;
    Ok(true)
}

/// The process that has a file locked, as the kernel lists it (proc_locks(5)): what is noted in the
/// file may be of one before.
fn owner(file: &File) -> Option<u64> {
    let file = file.metadata().ok()?;
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let mut owners =
        locks.lines().filter_map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [_, "FLOCK", _, _, pid, locked, ..] if locked == id => pid.parse().ok(),
            _ => None,
        });
    owners.next()
}

/// Whether a process has ended, and perhaps threads of it have not: they are killed, too.
fn is_dead(pid: u64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(opened), Ok(named)) => (opened.dev(), opened.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn note_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

/// The process that has noted itself.
fn holder(path: &Path) -> Option<u64> {
    sheave_core::parse_digits(fs::read_to_string(path).ok()?.trim())
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use super::*;

    #[test]
    fn a_second_one_waits_for_the_first_to_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = RecordsLock::take(dir.path()).expect("a free lock");
        thread::scope(|scope| {
            let second = scope.spawn(|| RecordsLock::take(dir.path()));
            sleep(LOCK_POLL);
            assert!(!second.is_finished());
            drop(first);
            second.join().expect("it ends").expect("a free lock");
        });
    }

    #[test]
    fn the_lock_of_a_process_that_cannot_end_is_taken_once() {
        let dir = tempfile::tempdir().expect("a directory");
        // It has ended but for a thread.
        let program = "import ctypes, fcntl, sys, threading, time\n\
                       file = open(sys.argv[1], 'a')\n\
                       fcntl.flock(file, fcntl.LOCK_EX)\n\
                       threading.Thread(target=time.sleep, args=[60]).start()\n\
                       ctypes.CDLL(None).pthread_exit(None)\n";
        let mut hangs = Command::new("python3");
        let mut hangs = hangs.args(["-c", program]).arg(dir.path().join(NAME)).spawn().expect("it");
        let begun = Instant::now();
        while !is_dead(hangs.id().into()) {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not end");
            sleep(LOCK_POLL);
        }
        let taken = thread::scope(|scope| {
            let take = || scope.spawn(|| RecordsLock::take(dir.path()));
            [take(), take()].map(|taking| taking.join().expect("no panic"))
        });
        assert_eq!(taken.iter().filter(|taken| taken.is_ok()).count(), 1, "{taken:?}");
        hangs.kill().expect("killed");
        hangs.wait().expect("it ends");
    }
}
