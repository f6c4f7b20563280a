//! The record layer of TLS on a socket. Decrypted bytes are copied at most once, and not at all if
//! their reader has no use for them; small pieces share a record.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;

use rustls::client::UnbufferedClientConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};
use sheave_tls::ClientTls;

use super::stream::{Received, Wait, receive, send};

/// Ciphertext taken from the socket at once.
const RECEIVE_SIZE: usize = 256 << 10;
/// The longest record on the wire, with room to spare.
const RECORD_LEN_MAX: usize = 18 << 10;
/// Plaintext in one record.
const FRAGMENT_LEN_MAX: usize = 16 << 10;
/// Plaintext encrypted before the socket is tried.
const UNSENT_MAX: usize = 128 << 10;

/// TLS on a socket of the caller.
pub(crate) struct TlsStream {
    connection: UnbufferedClientConnection,
    /// Ciphertext from the socket; what counts is between `start` and `end`.
    input: Box<[u8]>,
    start: usize,
    end: usize,
    /// Plaintext of a record for which its reader had no room.
    left: Vec<u8>,
    left_at: usize,
    /// Ciphertext for the socket, as far as `output_end`; `sent` of it is gone.
    output: Vec<u8>,
    output_end: usize,
    sent: usize,
    /// Small pieces on their way into one record.
    fragment: Vec<u8>,
}

/// What became of some ciphertext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// There may be more to do.
    Some,
    /// More ciphertext is needed.
    Blocked,
    /// The peer has said good-bye.
    Closed,
}

/// Where plaintext goes.
struct Sink<'a> {
    skip: usize,
    buf: &'a mut [u8],
    done: Received,
}

impl TlsStream {
    /// Does the handshake.
    ///
    /// # Errors
    /// When it fails, for instance because the server's certificate is not trusted.
    pub(crate) fn connect(socket: &OwnedFd, tls: ClientTls) -> io::Result<Self> {
        let connection =
            UnbufferedClientConnection::new(tls.config, tls.server).map_err(io::Error::other)?;
        let mut tls = Self {
            connection,
            input: vec![0; RECEIVE_SIZE].into(),
            start: 0,
            end: 0,
            left: Vec::new(),
            left_at: 0,
            output: Vec::new(),
            output_end: 0,
            sent: 0,
            fragment: Vec::new(),
        };
        let mut nowhere = Sink { skip: 0, buf: &mut [], done: Received::default() };
        while tls.connection.is_handshaking() {
            match tls.advance(&mut nowhere) {
                Ok(Progress::Some) => {}
                Ok(Progress::Blocked) => {
                    tls.flush(socket, Wait::Sleep)?;
                    if tls.fill(socket, Wait::Sleep)? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Ok(Progress::Closed) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => {
                    // The alert tells the server why.
                    let _ = tls.advance(&mut nowhere);
                    let _ = tls.flush(socket, Wait::No);
                    return Err(error);
                }
            }
        }
        tls.flush(socket, Wait::Sleep)?;
        Ok(tls)
    }

    /// Receives into `buf` what comes after `skip` bytes, which are dropped. Both counts are 0 at
    /// the end of the stream.
    ///
    /// # Errors
    /// The system's or TLS's.
    pub(crate) fn receive(
        &mut self,
        socket: &OwnedFd,
        skip: usize,
        buf: &mut [u8],
        wait: Wait,
    ) -> io::Result<Received> {
        let mut sink = Sink { skip, buf, done: Received::default() };
        let taken = sink.take(&self.left[self.left_at..]);
        self.left_at += taken;
        loop {
            let is_full = self.has_unread();
            let progress = if is_full { Progress::Blocked } else { self.advance(&mut sink)? };
            let has_some = sink.done != Received::default();
            match progress {
                Progress::Some => {}
                Progress::Blocked if has_some => return Ok(sink.done),
                Progress::Blocked => {
                    if self.fill(socket, wait)? == 0 {
                        return Ok(sink.done);
                    }
                }
                Progress::Closed => return Ok(sink.done),
            }
        }
    }

    /// Encrypts from the front of `pieces`, and sends what the socket takes; answers how many
    /// bytes of them are on their way.
    ///
    /// # Errors
    /// As [`TlsStream::receive`].
    pub(crate) fn send(
        &mut self,
        socket: &OwnedFd,
        pieces: &[IoSlice<'_>],
        wait: Wait,
    ) -> io::Result<usize> {
        if self.has_unsent() {
            self.flush(socket, wait)?;
            if self.has_unsent() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        let mut taken = 0;
        for piece in pieces {
            let mut rest = &piece[..piece.len().min(UNSENT_MAX - taken)];
            taken += rest.len();
            while !rest.is_empty() {
                // Whole records go without a copy, unless something waits for company.
                let now = if self.fragment.is_empty() && rest.len() >= FRAGMENT_LEN_MAX {
                    let now = rest.len() - rest.len() % FRAGMENT_LEN_MAX;
                    self.encrypt(&rest[..now])?;
                    now
                } else {
                    let now = rest.len().min(FRAGMENT_LEN_MAX - self.fragment.len());
                    self.fragment.extend_from_slice(&rest[..now]);
                    if self.fragment.len() == FRAGMENT_LEN_MAX {
                        self.encrypt_fragment()?;
                    }
                    now
                };
                rest = &rest[now..];
            }
            if taken == UNSENT_MAX {
                break;
            }
        }
        self.encrypt_fragment()?;
        self.flush(socket, wait)?;
        Ok(taken)
    }

    /// Whether plaintext is at hand for which there was no room.
    pub(crate) fn has_unread(&self) -> bool {
        self.left_at < self.left.len()
    }

    /// Whether ciphertext waits for room in the socket.
    pub(crate) fn has_unsent(&self) -> bool {
        self.sent < self.output_end
    }

    /// Sends such ciphertext, as far as `wait` allows.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn flush(&mut self, socket: &OwnedFd, wait: Wait) -> io::Result<()> {
        while self.has_unsent() {
            let rest = &self.output[self.sent..self.output_end];
            match send(socket, &[IoSlice::new(rest)], wait) {
                Ok(count) => self.sent += count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait == Wait::No => {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        (self.sent, self.output_end) = (0, 0);
        Ok(())
    }

    /// Takes ciphertext from the socket.
    fn fill(&mut self, socket: &OwnedFd, wait: Wait) -> io::Result<usize> {
        if self.input.len() - self.end < RECORD_LEN_MAX || self.start == self.end {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let count = receive(socket, &mut self.input[self.end..], wait)?;
        self.end += count;
        Ok(count)
    }

    /// Does one thing with the ciphertext at hand.
    fn advance(&mut self, sink: &mut Sink<'_>) -> io::Result<Progress> {
        let Self { connection, input, output, output_end, left, left_at, .. } = self;
        let UnbufferedStatus { discard, state, .. } =
            connection.process_tls_records(&mut input[self.start..self.end]);
        let progress = match state.map_err(io::Error::other)? {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let payload = record.map_err(io::Error::other)?.payload;
                    let taken = sink.take(payload);
                    if taken < payload.len() {
                        left.clear();
                        left.extend_from_slice(&payload[taken..]);
                        *left_at = 0;
                    }
                }
                Progress::Some
            }
            ConnectionState::EncodeTlsData(mut data) => {
                append(output, output_end, RECORD_LEN_MAX, |room| data.encode(room))?;
                Progress::Some
            }
            ConnectionState::TransmitTlsData(data) => {
                // It is in the output, which is sent in order.
                data.done();
                Progress::Some
            }
            ConnectionState::PeerClosed | ConnectionState::Closed => Progress::Closed,
            _ => Progress::Blocked,
        };
        self.start += discard;
        Ok(progress)
    }

    fn encrypt_fragment(&mut self) -> io::Result<()> {
        if self.fragment.is_empty() {
            return Ok(());
        }
        let mut fragment = std::mem::take(&mut self.fragment);
        let ended = self.encrypt(&fragment);
        fragment.clear();
        self.fragment = fragment;
        ended
    }

    fn encrypt(&mut self, plaintext: &[u8]) -> io::Result<()> {
        const OVERHEAD: usize = RECORD_LEN_MAX - FRAGMENT_LEN_MAX;
        let records = plaintext.len().div_ceil(FRAGMENT_LEN_MAX);
        let room = plaintext.len() + records * OVERHEAD;
        loop {
            let Self { connection, output, output_end, .. } = self;
            // Nothing is read here, so that no plaintext can turn up.
            let UnbufferedStatus { state, .. } = connection.process_tls_records(&mut []);
            match state.map_err(io::Error::other)? {
                ConnectionState::WriteTraffic(mut traffic) => {
                    return append(output, output_end, room, |room| {
                        traffic.encrypt(plaintext, room)
                    });
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    append(output, output_end, RECORD_LEN_MAX, |room| data.encode(room))?;
                }
                ConnectionState::TransmitTlsData(data) => data.done(),
                _ => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unsent = self.output_end - self.sent;
        write!(f, "TlsStream({} bytes received, {unsent} unsent)", self.end - self.start)
    }
}

/// Appends to the output what `write` writes into the room it is given.
fn append<E: TooSmall + std::error::Error + Send + Sync + 'static>(
    output: &mut Vec<u8>,
    end: &mut usize,
    room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
) -> io::Result<()> {
    let mut room = room;
    loop {
        if output.len() < *end + room {
            output.resize(*end + room, 0);
        }
        match write(&mut output[*end..]) {
            Ok(count) => {
                *end += count;
                return Ok(());
            }
            Err(error) => match error.required() {
                Some(required) if required > room => room = required,
                _ => return Err(io::Error::other(error)),
            },
        }
    }
}

/// Errors that may say that a buffer was too small.
trait TooSmall {
    /// How large it must be.
    fn required(&self) -> Option<usize>;
}

impl TooSmall for EncodeError {
    fn required(&self) -> Option<usize> {
        match self {
            Self::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
            Self::AlreadyEncoded => None,
        }
    }
}

impl TooSmall for EncryptError {
    fn required(&self) -> Option<usize> {
        match self {
            Self::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
            Self::EncryptExhausted => None,
        }
    }
}

impl Sink<'_> {
    /// Takes from the front of `bytes` what it wants; answers how much.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let skipped = bytes.len().min(self.skip - self.done.skipped);
        self.done.skipped += skipped;
        let room = &mut self.buf[self.done.stored..];
        let stored = room.len().min(bytes.len() - skipped);
        room[..stored].copy_from_slice(&bytes[skipped..skipped + stored]);
        self.done.stored += stored;
        skipped + stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_skips_then_stores() {
        let mut buf = [0; 4];
        let mut sink = Sink { skip: 3, buf: &mut buf, done: Received::default() };
        assert_eq!(sink.take(b"ab"), 2);
        assert_eq!(sink.take(b"cdef"), 4);
        assert_eq!(sink.take(b"ghi"), 1);
        assert_eq!(sink.done, Received { skipped: 3, stored: 4 });
        assert_eq!(&buf, b"defg");
    }
}
