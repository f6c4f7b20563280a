//! A byte stream to a server: a unix or TCP socket, with or without TLS on it.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use sheave_tls::ClientTls;

use super::tls_stream::TlsStream;

/// A server that says nothing for this long is taken for dead.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Whether a call may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until there is something to do.
    Sleep,
    /// Fail with [`io::ErrorKind::WouldBlock`] instead.
    No,
}

/// How much came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Received {
    /// Bytes that were dropped unread.
    pub(crate) skipped: usize,
    /// Bytes in the buffer, which follow those.
    pub(crate) stored: usize,
}

/// A connected stream.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    tls: Option<Box<TlsStream>>,
}

impl Stream {
    /// A stream on a connected socket in blocking mode.
    ///
    /// # Errors
    /// When the socket refuses its timeouts.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        for way in [Timeout::Recv, Timeout::Send] {
            sockopt::set_socket_timeout(&socket, way, Some(SILENCE_MAX))?;
        }
        Ok(Self { socket, tls: None })
    }

    /// Starts TLS on it.
    ///
    /// # Errors
    /// When the handshake fails, for instance because the server's certificate is not trusted.
    pub(crate) fn start_tls(&mut self, tls: ClientTls) -> io::Result<()> {
        self.tls = Some(Box::new(TlsStream::connect(&self.socket, tls)?));
        Ok(())
    }

    /// What to wait on with epoll.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Receives into `buf`; 0 is the end of the stream.
    ///
    /// # Errors
    /// The system's or TLS's; `WouldBlock` also when a sleeping call met a silent server.
    pub(crate) fn receive(&mut self, buf: &mut [u8], wait: Wait) -> io::Result<usize> {
        Ok(self.receive_after(0, buf, wait)?.stored)
    }

    /// Receives into `buf`. If that saves work, up to `skip` bytes before it are dropped, which the
    /// caller has no use for; both counts are 0 at the end of the stream.
    ///
    /// # Errors
    /// As [`Stream::receive`].
    pub(crate) fn receive_after(
        &mut self,
        skip: usize,
        buf: &mut [u8],
        wait: Wait,
    ) -> io::Result<Received> {
        match &mut self.tls {
            // The kernel copies to somewhere anyway.
            None => Ok(Received { skipped: 0, stored: receive(&self.socket, buf, wait)? }),
            Some(tls) => tls.receive(&self.socket, skip, buf, wait),
        }
    }

    /// Whether bytes may have been received that [`Stream::receive`] has not given out: waiting
    /// for the socket would miss them.
    pub(crate) fn has_unread(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_unread())
    }

    /// Sends from the front of `pieces`; answers how many bytes it took.
    ///
    /// # Errors
    /// As [`Stream::receive`].
    pub(crate) fn send(&mut self, pieces: &[IoSlice<'_>], wait: Wait) -> io::Result<usize> {
        match &mut self.tls {
            None => send(&self.socket, pieces, wait),
            Some(tls) => tls.send(&self.socket, pieces, wait),
        }
    }

    /// Whether bytes that [`Stream::send`] took still wait for room in the socket.
    pub(crate) fn has_unsent(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_unsent())
    }

    /// Sends such bytes, as far as `wait` allows.
    ///
    /// # Errors
    /// As [`Stream::receive`].
    pub(crate) fn flush(&mut self, wait: Wait) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => tls.flush(&self.socket, wait),
        }
    }
}

/// One receive on a socket.
pub(crate) fn receive(socket: &OwnedFd, buf: &mut [u8], wait: Wait) -> io::Result<usize> {
    let flags = match wait {
        Wait::Sleep => RecvFlags::empty(),
        Wait::No => RecvFlags::DONTWAIT,
    };
    loop {
        match rustix::net::recv(socket, &mut *buf, flags) {
            Err(Errno::INTR) => {}
            ended => return Ok(ended?.1),
        }
    }
}

/// One send on a socket.
pub(crate) fn send(socket: &OwnedFd, pieces: &[IoSlice<'_>], wait: Wait) -> io::Result<usize> {
    let flags = SendFlags::NOSIGNAL
        | match wait {
            Wait::Sleep => SendFlags::empty(),
            Wait::No => SendFlags::DONTWAIT,
        };
    loop {
        match rustix::net::sendmsg(socket, pieces, &mut SendAncillaryBuffer::default(), flags) {
            Err(Errno::INTR) => {}
            ended => return Ok(ended?),
        }
    }
}
