//! A connection that reads while it writes, so that neither side can wait for the other.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown, sockopt};
use rustls::ClientConnection;

use super::TIMEOUT;

/// A connection, encrypted or not.
pub(crate) struct Link {
    file: std::fs::File,
    tls: Option<ClientConnection>,
    output: Vec<u8>,
    /// Received bytes that have not been taken.
    pub(crate) input: Vec<u8>,
    pub(crate) ended: bool,
    /// Does not receive.
    pub(crate) deaf: bool,
}

impl Link {
    pub(crate) fn unix(path: &Path) -> Self {
        Self::over(UnixStream::connect(path).unwrap().into())
    }

    pub(crate) fn tcp(address: std::net::SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream.into())
    }

    fn over(fd: OwnedFd) -> Self {
        rustix::io::ioctl_fionbio(&fd, true).unwrap();
        let (output, input) = (Vec::new(), Vec::new());
        Self { file: fd.into(), tls: None, output, input, ended: false, deaf: false }
    }

    /// Continues with TLS.
    pub(crate) fn start_tls(&mut self, tls: ClientConnection) -> io::Result<()> {
        self.tls = Some(tls);
        while self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            self.encrypt();
            self.turn(TIMEOUT)?;
        }
        self.flush()
    }

    /// Sends close_notify, but leaves the connection open.
    pub(crate) fn close_tls(&mut self) {
        self.tls.as_mut().expect("TLS").send_close_notify();
        self.encrypt();
        self.flush().unwrap();
    }

    /// Sends bytes that are not TLS.
    pub(crate) fn break_tls(&mut self) {
        self.output.extend_from_slice(&[0x17; 100]);
        let _ = self.flush();
    }

    /// Whether the peer has sent close_notify.
    pub(crate) fn is_closed_by_tls(&mut self) -> bool {
        let mut none = [];
        matches!(self.tls.as_mut().map(|tls| tls.reader().read(&mut none)), Some(Ok(0)))
    }

    /// Bytes to be sent by the next turns.
    pub(crate) fn queue(&mut self, bytes: &[u8]) {
        match &mut self.tls {
            None => self.output.extend_from_slice(bytes),
            Some(tls) => {
                tls.set_buffer_limit(None);
                tls.writer().write_all(bytes).unwrap();
                self.encrypt();
            }
        }
    }

    /// Sends all that is queued.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            self.turn(TIMEOUT)?;
        }
        Ok(())
    }

    /// Sends until the peer has taken nothing for this long; returns the number of remaining bytes.
    pub(crate) fn push(&mut self, patience: Duration) -> usize {
        loop {
            let before = self.output.len();
            if before == 0 || self.turn(patience).is_err() || self.output.len() == before {
                return self.output.len();
            }
        }
    }

    /// Receives until at least `count` bytes are there, or the end.
    pub(crate) fn receive(&mut self, count: usize) -> io::Result<()> {
        while self.input.len() < count && !self.ended {
            self.turn(TIMEOUT)?;
        }
        Ok(())
    }

    /// Waits until the socket is ready, then sends or receives.
    ///
    /// # Errors
    /// `TimedOut`, and errors of the system.
    pub(crate) fn turn(&mut self, patience: Duration) -> io::Result<()> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, !self.deaf && !self.ended);
        wanted.set(PollFlags::OUT, !self.output.is_empty());
        let mut fds = [PollFd::new(&self.file, wanted)];
        let timeout = Timespec::try_from(patience).unwrap();
        if poll(&mut fds, Some(&timeout))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let ready = fds[0].revents();
        if ready.contains(PollFlags::OUT) && !self.output.is_empty() {
            let written = (&self.file).write(&self.output);
            // After an error the output is dropped.
            let count = *written.as_ref().unwrap_or(&self.output.len());
            self.output.drain(..count);
            written?;
        }
        if wanted.contains(PollFlags::IN) && ready.intersects(PollFlags::IN | PollFlags::HUP) {
            self.take_in()?;
        }
        Ok(())
    }

    /// Shuts down the sending side.
    pub(crate) fn finish(&mut self) {
        shutdown(&self.file, Shutdown::Write).unwrap();
    }

    /// Closes a TCP connection by a reset.
    pub(crate) fn reset(self) {
        sockopt::set_socket_linger(&self.file, Some(Duration::ZERO)).unwrap();
    }

    fn encrypt(&mut self) {
        let Some(tls) = &mut self.tls else { return };
        while tls.wants_write() {
            tls.write_tls(&mut self.output).unwrap();
        }
    }

    fn take_in(&mut self) -> io::Result<()> {
        let mut bytes = [0; 64 << 10];
        let count = match (&self.file).read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            other => other?,
        };
        self.ended = count == 0;
        let Some(tls) = &mut self.tls else {
            self.input.extend_from_slice(&bytes[..count]);
            return Ok(());
        };
        let mut rest = &bytes[..count];
        while !rest.is_empty() {
            tls.read_tls(&mut rest)?;
            let state = tls.process_new_packets().map_err(io::Error::other)?;
            let start = self.input.len();
            self.input.resize(start + state.plaintext_bytes_to_read(), 0);
            tls.reader().read_exact(&mut self.input[start..])?;
            if state.peer_has_closed() {
                break;
            }
        }
        self.encrypt();
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
