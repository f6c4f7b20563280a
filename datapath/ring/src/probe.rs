//! What this kernel's io_uring can do, found out by trying.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

use crate::provided::Provided;

/// How completions are delivered, best first (io_uring_setup(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// `SINGLE_ISSUER|DEFER_TASKRUN` (Linux 6.1).
    DeferTaskrun,
    /// `COOP_TASKRUN` (Linux 5.19).
    CoopTaskrun,
}

/// The result of [`probe`].
#[derive(Clone, Debug)]
pub struct Probe {
    /// The best mode that works.
    pub mode: Support,
    /// Whether a table of registered files can be had, and what is taken out of it is closed.
    pub registered_files: bool,
}

/// Finds out whether, and how, io_uring can serve sockets and files here.
///
/// # Errors
/// Why it cannot: disabled by `kernel.io_uring_disabled` or seccomp (`EPERM`), no memory
/// (`ENOMEM`), or a kernel older than 5.19, which lacks provided buffer rings.
pub fn probe() -> io::Result<Probe> {
    let mode = match open(Support::DeferTaskrun, 8) {
        Ok(_) => Support::DeferTaskrun,
        Err(_) => Support::CoopTaskrun,
    };
    let uring = open(mode, 8)?;
    if !uring.params().is_feature_nodrop() || !uring.params().is_feature_ext_arg() {
        return Err(unsupported("io_uring without NODROP and EXT_ARG"));
    }
    let mut known = io_uring::Probe::new();
    uring.submitter().register_probe(&mut known)?;
    let needed = [
        (opcode::Recv::CODE, "RECV"),
        (opcode::RecvMsg::CODE, "RECVMSG"),
        (opcode::SendMsg::CODE, "SENDMSG"),
        (opcode::Read::CODE, "READ"),
        (opcode::Write::CODE, "WRITE"),
        (opcode::Writev::CODE, "WRITEV"),
        (opcode::Fsync::CODE, "FSYNC"),
        (opcode::Fallocate::CODE, "FALLOCATE"),
    ];
    if let Some((_, name)) = needed.iter().find(|(code, _)| !known.is_supported(*code)) {
        return Err(unsupported(&format!("io_uring without {name}")));
    }
    let registered_files = registered_files_close(&uring).unwrap_or(false);
    let provided = Provided::register(&uring, 1, 4096)?;
    // The kernel may write to the buffers for as long as the ring exists.
    drop(uring);
    drop(provided);
    Ok(Probe { mode, registered_files })
}

/// Whether a registered file is closed when it is taken out of the table. Before Linux 6.13 it
/// stays open until every request that began before has ended, which a receive on an idle
/// connection never does: descriptors would leak, and clients would wait for the end of their
/// connections.
fn registered_files_close(uring: &IoUring) -> io::Result<bool> {
    let (idle, _idle_peer) = UnixStream::pair()?;
    let (closing, mut peer) = UnixStream::pair()?;
    peer.set_nonblocking(true)?;
    let submitter = uring.submitter();
    submitter.register_files_sparse(2)?;
    submitter.register_files_update(0, &[idle.as_raw_fd(), closing.as_raw_fd()])?;
    let waiting = opcode::PollAdd::new(Fixed(0), libc::POLLIN as u32).build();
    // SAFETY: the entry points at no memory, and nothing else uses the ring. JUSTIFICATION: handing
    // entries to the kernel is what a ring does.
    unsafe { uring.submission_shared().push(&waiting) }.map_err(io::Error::other)?;
    submitter.submit()?;
    submitter.register_files_update(1, &[-1])?;
    drop(closing);
    Ok(matches!(peer.read(&mut [0]), Ok(0)))
}

pub(crate) fn open(mode: Support, entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_clamp().setup_submit_all().setup_cqsize(entries * 8).setup_taskrun_flag();
    match mode {
        Support::DeferTaskrun => builder.setup_single_issuer().setup_defer_taskrun(),
        Support::CoopTaskrun => builder.setup_coop_taskrun(),
    };
    builder.build(entries)
}

fn unsupported(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_taken_out_of_the_table_is_closed_where_the_kernel_can() {
        let Ok(uring) = open(Support::CoopTaskrun, 8) else { return };
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split('.').map_while(|number| number.parse::<u32>().ok());
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        // An older kernel may have got the change from its distributor.
        let closes = registered_files_close(&uring).unwrap();
        assert!(closes || version < (6, 13), "Linux {release}");
    }

    #[test]
    fn probing_twice_tells_the_same() {
        let modes = [probe(), probe()].map(|probe| probe.map(|probe| probe.mode).ok());
        assert_eq!(modes[0], modes[1]);
    }
}
