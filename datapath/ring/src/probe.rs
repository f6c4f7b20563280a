//! What this kernel's io_uring can do, found out by trying.

use std::io;

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
    /// Whether a table of registered files can be had.
    pub registered_files: bool,
}

/// Finds out whether, and how, io_uring can serve sockets and files here.
///
/// # Errors
/// Why it cannot: disabled by `kernel.io_uring_disabled` or seccomp (`EPERM`), no memory that may
/// be locked (`ENOMEM`), or a kernel older than 5.19, which lacks provided buffer rings.
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
    let registered_files = uring.submitter().register_files_sparse(8).is_ok();
    let provided = Provided::register(&uring, 1, 4096)?;
    // The kernel may write to the buffers for as long as the ring exists.
    drop(uring);
    drop(provided);
    Ok(Probe { mode, registered_files })
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
    #[test]
    fn probing_twice_tells_the_same() {
        let modes =
            [super::probe(), super::probe()].map(|probe| probe.map(|probe| probe.mode).ok());
        assert_eq!(modes[0], modes[1]);
    }
}
