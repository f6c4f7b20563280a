//! A byte stream to a server: a unix or TCP socket, with or without TLS on it.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

/// A server that says nothing for this long is taken for dead.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Ciphertext taken from the socket, and queued for it, at once.
const TLS_BUFFER_SIZE: usize = 256 << 10;

/// Whether a call may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until there is something to do.
    Sleep,
    /// Fail with [`io::ErrorKind::WouldBlock`] instead.
    No,
}

/// A connected stream.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    tls: Option<Box<Tls>>,
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
    pub(crate) fn start_tls(
        &mut self,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> io::Result<()> {
        let mut connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(TLS_BUFFER_SIZE));
        let mut tls =
            Box::new(Tls { connection, received: vec![0; TLS_BUFFER_SIZE], unread: 0..0 });
        while tls.connection.is_handshaking() {
            tls.flush(&self.socket, Wait::Sleep)?;
            if tls.connection.is_handshaking() && tls.receive(&self.socket, Wait::Sleep)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        tls.flush(&self.socket, Wait::Sleep)?;
        self.tls = Some(tls);
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
        match &mut self.tls {
            None => receive(&self.socket, buf, wait),
            Some(tls) => loop {
                match tls.connection.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if tls.receive(&self.socket, wait)? == 0 {
                            return Ok(0);
                        }
                    }
                    ended => return ended,
                }
            },
        }
    }

    /// Sends from the front of `pieces`; answers how many bytes it took.
    ///
    /// # Errors
    /// As [`Stream::receive`].
    pub(crate) fn send(&mut self, pieces: &[IoSlice<'_>], wait: Wait) -> io::Result<usize> {
        match &mut self.tls {
            None => send(&self.socket, pieces, wait),
            Some(tls) => {
                let mut taken = 0;
                // Without room nothing is taken, and flush says why.
                while taken == 0 {
                    taken = tls.connection.writer().write_vectored(pieces)?;
                    tls.flush(&self.socket, wait)?;
                }
                Ok(taken)
            }
        }
    }

    /// Whether bytes that [`Stream::send`] took still wait for room in the socket.
    pub(crate) fn has_unsent(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.connection.wants_write())
    }

    /// Sends such bytes.
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

#[derive(Debug)]
struct Tls {
    connection: ClientConnection,
    /// Ciphertext; one large receive is fed to rustls in the small pieces that it asks for.
    received: Vec<u8>,
    unread: std::ops::Range<usize>,
}

impl Tls {
    /// Decrypts what the socket has, and answers how many bytes of ciphertext that was.
    fn receive(&mut self, socket: &OwnedFd, wait: Wait) -> io::Result<usize> {
        if self.unread.is_empty() {
            let count = receive(socket, &mut self.received, wait)?;
            self.unread = 0..count;
        }
        let mut ciphertext = &self.received[self.unread.clone()];
        let taken = self.connection.read_tls(&mut ciphertext)?;
        self.unread.start += taken;
        self.connection.process_new_packets().map_err(io::Error::other)?;
        Ok(taken)
    }

    fn flush(&mut self, socket: &OwnedFd, wait: Wait) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut SocketWriter { socket, wait }) {
                // The rest goes with a later flush.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && wait == Wait::No => {
                    return Ok(());
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        Ok(())
    }
}

struct SocketWriter<'a> {
    socket: &'a OwnedFd,
    wait: Wait,
}

impl Write for SocketWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        send(self.socket, &[IoSlice::new(buf)], self.wait)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        send(self.socket, pieces, self.wait)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn receive(socket: &OwnedFd, buf: &mut [u8], wait: Wait) -> io::Result<usize> {
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

fn send(socket: &OwnedFd, pieces: &[IoSlice<'_>], wait: Wait) -> io::Result<usize> {
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
