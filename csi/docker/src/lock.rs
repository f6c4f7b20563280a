//! One plugin at a time has the records: two would each write their own view of the references.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sheave_core::printable;
use sheave_node::{Error, Kind, Result};

/// Has no name of a record, which ends with `.json`.
const NAME: &str = "lock";
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
    /// # Errors
    /// [`Kind::Refused`] with the process that has it, and what the file system says.
    pub(crate) fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let fail = |error| Error::of_io(format!("lock {}", printable(&path)), &error);
        let opened = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let mut file = opened.map_err(fail)?;
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_TIMEOUT => sleep(LOCK_POLL),
                Err(Errno::WOULDBLOCK) => {
                    let why = format!(
                        "{}: another docker-plugin has these volumes, {}; end that one, or \
                         give this one a directory of its own (SHEAVE_STATE_DIR)",
                        printable(dir),
                        holder(&path)
                    );
                    return Err(Error::new(Kind::Refused, why));
                }
                Err(errno) => return Err(fail(errno.into())),
            }
        }
        // For the message of another one only; there may be no room for it.
        let _ = note_holder(&mut file);
        Ok(Self { _file: file })
    }
}

fn note_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

/// The process that has noted itself.
fn holder(path: &Path) -> String {
    let noted = fs::read_to_string(path).unwrap_or_default();
    match sheave_core::parse_digits(noted.trim()) {
        Some(pid) => format!("process {pid}"),
        None => "in a process that is not known".to_owned(),
    }
}

#[cfg(test)]
mod tests {
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
}
