//! TLS by rustls, in user space: the stream a session runs on.

use std::io::{self, BufRead, Write};

use rustls::ServerConnection;
use sheave_core::memory;
use sheave_ring::SendBatch;

/// Bytes encrypted at once. The client decrypts them while the next are encrypted, and they are
/// still in the cache when they are sent.
const STRETCH: usize = 256 << 10;
/// The same when memory is short: one record.
const SMALL_STRETCH: usize = 16 << 10;

/// Whether more data can come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Open,
    /// The peer has sent its last byte.
    Closed,
}

/// A negotiated connection's cipher state.
pub(crate) struct TlsStream {
    tls: ServerConnection,
    bounce: Vec<u8>,
    closed: bool,
}

impl TlsStream {
    pub(crate) fn new(mut tls: ServerConnection) -> Self {
        // The session bounds a batch; rustls need not bound it again.
        tls.set_buffer_limit(None);
        Self { tls, bounce: Vec::new(), closed: false }
    }

    /// Decrypts the bytes that arrived and hands out the plain bytes, also those left from the
    /// handshake.
    pub(crate) fn decrypt(
        &mut self,
        mut bytes: &[u8],
        mut plain: impl FnMut(&[u8]),
    ) -> io::Result<Stream> {
        loop {
            loop {
                let mut reader = self.tls.reader();
                match reader.fill_buf() {
                    Ok([]) => return Ok(Stream::Closed),
                    Ok(run) => {
                        plain(run);
                        let taken = run.len();
                        reader.consume(taken);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            if bytes.is_empty() {
                return Ok(Stream::Open);
            }
            self.tls.read_tls(&mut bytes)?;
            self.tls.process_new_packets().map_err(io::Error::other)?;
        }
    }

    /// Encrypts the next part of a batch and returns its length. With `last`, sends close_notify
    /// after the end of the batch.
    pub(crate) fn encrypt(
        &mut self,
        batch: &mut SendBatch,
        last: bool,
        out: &mut SendBatch,
    ) -> usize {
        let Self { tls, bounce, closed } = self;
        let before = batch.unsent();
        // rustls and the vector that it writes to each take as much once more.
        let wanted = before.min(STRETCH);
        let has_room = wanted <= SMALL_STRETCH || memory::check_room(2 * wanted).is_ok();
        let stretch = if has_room { STRETCH } else { SMALL_STRETCH };
        batch.drain(stretch, bounce, out, |bytes| {
            tls.writer().write_all(bytes).expect("writing to memory without a limit");
        });
        if last && batch.unsent() == 0 && !*closed {
            tls.send_close_notify();
            *closed = true;
        }
        if tls.wants_write() {
            out.head(|head| {
                while tls.wants_write() {
                    tls.write_tls(head).expect("writing to memory");
                }
            });
        }
        before - batch.unsent()
    }
}
