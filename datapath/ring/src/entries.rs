//! Requests of backends as entries of a ring.

use std::os::fd::{AsRawFd, RawFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{opcode, squeue};
use sheave_core::{Buf, IoRequest};

use crate::iovec::{IoVecs, address};
use crate::plain::mode_bits;

pub(crate) fn file_entry(request: &IoRequest, vectors: &mut IoVecs) -> squeue::Entry {
    match request {
        IoRequest::Read { file, at, into } => {
            let len = len_u32(into.len());
            match into.registered_index() {
                Some(index) => {
                    opcode::ReadFixed::new(fd(file), within(into), len, index).offset(*at).build()
                }
                None => opcode::Read::new(fd(file), address(into), len).offset(*at).build(),
            }
        }
        IoRequest::Write { file, at, from, dsync } => {
            let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
            if let Some(buf) = from.registered()
                && let Some(index) = buf.registered_index()
            {
                let (first, len) = (within(buf).cast_const(), len_u32(buf.len()));
                let write = opcode::WriteFixed::new(fd(file), first, len, index);
                return write.offset(*at).rw_flags(flags).build();
            }
            vectors.set_payload(from, 0);
            match vectors.0[..] {
                [one] => {
                    let len = len_u32(one.iov_len);
                    let from = one.iov_base.cast_const().cast();
                    opcode::Write::new(fd(file), from, len).offset(*at).rw_flags(flags).build()
                }
                ref many => opcode::Writev::new(fd(file), many.as_ptr(), many.len() as u32)
                    .offset(*at)
                    .rw_flags(flags)
                    .build(),
            }
        }
        IoRequest::Sync { file } => {
            opcode::Fsync::new(fd(file)).flags(FsyncFlags::DATASYNC).build()
        }
        IoRequest::Allocate { file, mode, at, len } => {
            opcode::Fallocate::new(fd(file), *len).offset(*at).mode(mode_bits(*mode)).build()
        }
        IoRequest::Recv { .. } | IoRequest::Send { .. } => unreachable!("a request for a socket"),
    }
}

/// The entry of a request for a socket whose bytes are in one place. Else `None`, and `vectors`
/// is set for [`message_entry`].
pub(crate) fn one_vector_entry(request: &IoRequest, vectors: &mut IoVecs) -> Option<squeue::Entry> {
    match request {
        IoRequest::Recv { into, skip, .. } => vectors.set_payload(into, *skip),
        IoRequest::Send { from, skip, .. } => vectors.set_source(from, *skip),
        _ => unreachable!("a request for a file"),
    }
    let [one] = vectors.0[..] else { return None };
    let (base, len) = (one.iov_base.cast::<u8>(), len_u32(one.iov_len));
    let flags = message_flags(request);
    Some(match request {
        IoRequest::Recv { socket, .. } => {
            opcode::Recv::new(fd(socket), base, len).flags(flags).build()
        }
        IoRequest::Send { socket, .. } => {
            opcode::Send::new(fd(socket), base.cast_const(), len).flags(flags).build()
        }
        _ => unreachable!("a request for a file"),
    })
}

/// The entry of a request for a socket, with the header that `one_vector_entry` has set up.
pub(crate) fn message_entry(request: &IoRequest, header: *mut libc::msghdr) -> squeue::Entry {
    let flags = message_flags(request) as u32;
    match request {
        IoRequest::Recv { socket, .. } => {
            opcode::RecvMsg::new(fd(socket), header).flags(flags).build()
        }
        IoRequest::Send { socket, .. } => {
            opcode::SendMsg::new(fd(socket), header.cast_const()).flags(flags).build()
        }
        _ => unreachable!("a request for a file"),
    }
}

fn message_flags(request: &IoRequest) -> i32 {
    match request {
        IoRequest::Recv { all: false, .. } => 0,
        IoRequest::Recv { all: true, .. } => libc::MSG_WAITALL,
        // What was sent is known at any time, so that the rest can be sent by another ring.
        _ => libc::MSG_NOSIGNAL,
    }
}

/// What the kernel takes for an address in registered memory that has none: how far into it.
fn within(buf: &Buf) -> *mut u8 {
    std::ptr::without_provenance_mut(buf.start())
}

fn fd(descriptor: &impl AsRawFd) -> Fd {
    let raw: RawFd = descriptor.as_raw_fd();
    Fd(raw)
}

/// A length as entries of the ring have it.
fn len_u32(len: usize) -> u32 {
    u32::try_from(len).expect("a request is shorter than 4 GiB")
}
