//! Whether others have a file open for writing, as the kernel counts them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// Chooses the signal of a file (include/uapi/asm-generic/fcntl.h).
const F_SETSIG: i32 = 10;

/// Whether the kernel counts no open file description for writing beside this one, of any process
/// of this machine, hidden ones included. It lets a lease be taken only then (fcntl(2),
/// "Leases"; fs/locks.c, `check_conflicting_open`). The lease is given back at once.
///
/// # Errors
/// `EAGAIN` when there is another one, or may be; others where there are no leases: the file is
/// another user's, or not regular, or on a network.
pub fn check_only_writer(file: &File, is_writer: bool) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // A lease for reading needs that there is no writer; one for writing leaves its own description
    // out.
    let kind = if is_writer { libc::F_WRLCK } else { libc::F_RDLCK };
    // A program that opens the file while there is a lease waits until it is given back, and the
    // kernel signals this process. By default that is SIGIO, which would end it; SIGURG is ignored.
    call(|| {
        // SAFETY: takes numbers only; the descriptor is open while `file` lives.
        // JUSTIFICATION: no crate that is safe has this call.
        unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) }
    })?;
    for lease in [kind, libc::F_UNLCK] {
        // SAFETY: as above.
        // JUSTIFICATION: as above.
        call(|| unsafe { libc::fcntl(fd, libc::F_SETLEASE, lease) })?;
    }
    Ok(())
}

fn call(call: impl FnOnce() -> i32) -> io::Result<()> {
    if call() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn another_writer_is_counted_until_it_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = |write| OpenOptions::new().read(true).write(write).open(file.path()).unwrap();
        check_only_writer(file.as_file(), true).unwrap();
        let other = open(true);
        let refused = check_only_writer(file.as_file(), true).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop(other);
        check_only_writer(file.as_file(), true).unwrap();
        let reader = open(false);
        let refused = check_only_writer(&reader, false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        let other = open(false);
        drop(file);
        check_only_writer(&reader, false).unwrap();
        check_only_writer(&other, false).unwrap();
    }
}
