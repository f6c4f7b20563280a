//! I/O by ordinary system calls: the same as on a ring, for the thread engine and for what is
//! better done on the spot; and copies of the data of a device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use sheave_core::{Allocate, IoRequest, Payload};

use crate::SendBatch;
use crate::iovec::{IoVecs, Vectors, address};

/// Carries out a request; the count may be short. One for a socket does not wait.
///
/// # Errors
/// What the kernel says; `EAGAIN` when a request for a socket would have to wait.
pub fn carry_out(request: &IoRequest) -> io::Result<usize> {
    match request {
        IoRequest::Read { file, at, into } => {
            let offset = offset(*at)?;
            // SAFETY: the pointer covers `into.len()` bytes of shared atomics that `into` keeps
            // alive during the call.
            // JUSTIFICATION: std can read only into exclusive bytes.
            retry(|| unsafe {
                libc::pread(file.as_raw_fd(), address(into).cast(), into.len(), offset)
            })
        }
        IoRequest::Write { file, at, from, dsync } => write(file, *at, from, *dsync),
        IoRequest::Sync { file } => file.sync_data().map(|()| 0),
        IoRequest::Allocate { file, mode, at, len } => {
            let (at, len) = (offset(*at)?, offset(*len)?);
            // SAFETY: takes numbers only; the descriptor is open while `file` lives.
            // JUSTIFICATION: keeps the mode bits beside those given to the ring.
            retry(|| unsafe {
                libc::fallocate(file.as_raw_fd(), mode_bits(*mode), at, len) as isize
            })
        }
        IoRequest::Recv { socket, into, skip, all: _ } => {
            let vectors = Vectors::of(into, *skip, IoVecs::set_payload);
            let mut header = vectors.header();
            // SAFETY: header and vectors live through the call and point into memory that `into`
            // keeps alive.
            // JUSTIFICATION: std can read only into exclusive bytes.
            retry(|| unsafe {
                libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT)
            })
        }
        IoRequest::Send { socket, from, skip } => {
            let vectors = Vectors::of(from, *skip, IoVecs::set_source);
            let header = vectors.header();
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            // SAFETY: as above, with memory that `from` keeps alive.
            // JUSTIFICATION: std cannot send shared atomics.
            retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) })
        }
    }
}

fn write(file: &File, at: u64, from: &Payload, dsync: bool) -> io::Result<usize> {
    let vectors = Vectors::of(from, 0, IoVecs::set_payload);
    write_vectors(file.as_fd(), at, &vectors, if dsync { libc::RWF_DSYNC } else { 0 })
}

fn write_vectors(file: BorrowedFd<'_>, at: u64, from: &Vectors, flags: i32) -> io::Result<usize> {
    let (offset, from) = (offset(at)?, from.as_slice());
    let count = from.len() as i32;
    // SAFETY: all callers made the vectors of a payload that they borrow through the call.
    // JUSTIFICATION: std can write only from exclusive or frozen bytes.
    retry(|| unsafe { libc::pwritev2(file.as_raw_fd(), from.as_ptr(), count, offset, flags) })
}

/// Copies the payload to the memory of a device's request, which begins at `at`
/// (Linux's Documentation/block/ublk.rst, `UBLK_F_USER_COPY`).
///
/// # Errors
/// What the kernel says, also when it has not copied everything.
pub fn copy_to_device(device: BorrowedFd<'_>, at: u64, payload: &Payload) -> io::Result<()> {
    until_all(payload.len(), io::ErrorKind::WriteZero, |done| {
        let vectors = Vectors::of(payload, done, IoVecs::set_source);
        write_vectors(device, at + done as u64, &vectors, 0)
    })
}

/// Copies the memory of a device's request, which begins at `at`, to the payload.
///
/// # Errors
/// As [`copy_to_device`].
pub fn copy_from_device(device: BorrowedFd<'_>, at: u64, payload: &Payload) -> io::Result<()> {
    until_all(payload.len(), io::ErrorKind::UnexpectedEof, |done| {
        let vectors = Vectors::of(payload, done, IoVecs::set_payload);
        let (offset, into) = (offset(at + done as u64)?, vectors.as_slice());
        let count = into.len() as i32;
        // SAFETY: the vectors point into shared atomics that `payload` keeps alive.
        // JUSTIFICATION: std can read only into exclusive bytes.
        retry(|| unsafe { libc::preadv(device.as_raw_fd(), into.as_ptr(), count, offset) })
    })
}

/// Calls `step` with how many bytes are done until all are; one that does none is this error.
fn until_all(
    len: usize,
    none: io::ErrorKind,
    mut step: impl FnMut(usize) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match step(done)? {
            0 => return Err(none.into()),
            count => done += count,
        }
    }
    Ok(())
}

/// Receives into `payload` from byte `skip` on; 0 is the end of the stream.
///
/// # Errors
/// What the kernel says, `EAGAIN` included.
pub fn recv_into(socket: BorrowedFd<'_>, payload: &Payload, skip: usize) -> io::Result<usize> {
    let mut iov = IoVecs::default();
    iov.set_payload(payload, skip);
    let mut header = iov.header();
    // SAFETY: header and vectors live through the call and point into memory that `payload` keeps
    // alive.
    // JUSTIFICATION: std can read only into exclusive bytes.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) })
}

/// Sends what is unsent of a batch, as far as one call can; returns how much that was.
///
/// # Errors
/// What the kernel says, `EAGAIN` included.
pub fn send(socket: BorrowedFd<'_>, batch: &mut SendBatch) -> io::Result<usize> {
    let header = batch.prepare();
    // SAFETY: `prepare` made the header; the batch, which holds all it points at, is borrowed
    // through the call.
    // JUSTIFICATION: std cannot send shared atomics.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), header, libc::MSG_NOSIGNAL) })
}

pub(crate) fn mode_bits(mode: Allocate) -> i32 {
    match mode {
        Allocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        Allocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
    }
}

fn offset(at: u64) -> io::Result<libc::off_t> {
    at.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
