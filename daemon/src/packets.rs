//! Unix sockets of packets: each is a value in JSON, with at most one descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg,
    socket_with,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest packet.
pub(crate) const PACKET_MAX: usize = 4096;

/// Connects to the socket of packets at this path.
pub(crate) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let socket = socket_with(family, SocketType::SEQPACKET, flags, None)?;
    let address = SocketAddrUnix::new(path)?;
    retry_on_intr(|| rustix::net::connect(&socket, &address))?;
    Ok(socket)
}

/// Sends a value.
///
/// # Errors
/// Errors of the kernel.
pub fn send<T: Serialize>(to: impl AsFd, value: &T, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let text = serde_json::to_vec(value)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let text = [IoSlice::new(&text)];
    retry_on_intr(|| sendmsg(&to, &text, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives a value, and the descriptor that comes with it.
///
/// # Errors
/// `UnexpectedEof` when the peer has closed the connection, and errors of the kernel.
pub fn receive<T: DeserializeOwned>(from: impl AsFd) -> io::Result<(T, Option<OwnedFd>)> {
    let mut packet = [0; PACKET_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut packet)];
    let received = retry_on_intr(|| recvmsg(&from, slices, &mut control, RecvFlags::CMSG_CLOEXEC));
    let count = received?.bytes;
    if count == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other side has left"));
    }
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    Ok((serde_json::from_slice(&packet[..count])?, fd))
}
