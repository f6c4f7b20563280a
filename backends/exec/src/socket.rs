//! The socket of a program, without a name that other processes could use.

use std::env;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rustix::fs::{Mode, OFlags, open};

/// Numbers directories of this process.
static COUNT: AtomicU32 = AtomicU32::new(0);
/// The most directories of that name that other processes, perhaps killed, have left behind.
const TAKEN_MAX: u32 = 1000;

/// A listening socket without a name.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) listener: UnixListener,
    /// The socket's inode. A connection to its `/proc/self/fd/N` reaches the listener although the
    /// name is gone (Linux's net/unix/af_unix.c, unix_find_bsd).
    inode: OwnedFd,
}

impl Socket {
    /// Makes one in the first directory where that succeeds.
    pub(crate) fn new() -> io::Result<Self> {
        let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let places = [Some("/run".into()), runtime, Some(env::temp_dir()), Some("/dev/shm".into())];
        let mut failure = io::Error::from(ErrorKind::NotFound);
        for place in places.into_iter().flatten() {
            match Self::new_in(&place) {
                Ok(socket) => return Ok(socket),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn new_in(place: &Path) -> io::Result<Self> {
        let directory = make_directory(place)?;
        let name = directory.join("nbd");
        let made = UnixListener::bind(&name).and_then(|listener| {
            let inode = open(&name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            Ok(Self { listener, inode })
        });
        // If this fails, an empty directory remains.
        let _ = fs::remove_file(&name);
        let _ = fs::remove_dir(&directory);
        made
    }

    /// A path that connect(2) takes in this process while the socket exists.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.inode.as_raw_fd()).into()
    }
}

/// A directory that only this user can enter.
fn make_directory(place: &Path) -> io::Result<PathBuf> {
    let pid = std::process::id();
    for _ in 0..TAKEN_MAX {
        let count = COUNT.fetch_add(1, Relaxed);
        let directory = place.join(format!(".sheave-exec-{pid}-{count}"));
        match DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socket_without_a_name_takes_connections_of_this_process() {
        let dir = tempfile::tempdir().unwrap();
        let socket = Socket::new_in(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing for others to find");
        let mut client = UnixStream::connect(socket.path()).unwrap();
        let (mut server, _) = socket.listener.accept().unwrap();
        server.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, *b"hello");
    }
}
