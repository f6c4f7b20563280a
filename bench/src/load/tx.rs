//! What a connection still has to send: request headers and the payloads of writes.

use std::io::{self, IoSlice};

use smallvec::SmallVec;

use super::stream::{Stream, Wait};

/// The most pieces in one send; the kernel takes up to 1024.
const PIECES_PER_SEND_MAX: usize = 256;
/// Pieces of a send that need no allocation: a batch of 32 writes.
const PIECES_INLINE: usize = 64;

/// Queued requests, sent with as few system calls as the socket allows.
#[derive(Debug, Default)]
pub(crate) struct Tx {
    headers: Vec<u8>,
    pieces: Vec<Piece>,
    /// Pieces that are sent, and bytes of the next one.
    sent: usize,
    skip: usize,
}

#[derive(Clone, Copy, Debug)]
enum Piece {
    Headers { start: usize, end: usize },
    Payload { slot: usize },
}

impl Tx {
    /// Appends a header that `encode` writes; neighbours become one piece.
    pub(crate) fn push_header<T>(&mut self, encode: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let start = self.headers.len();
        let encoded = encode(&mut self.headers);
        let end = self.headers.len();
        match self.pieces.last_mut() {
            Some(Piece::Headers { end: last, .. }) => *last = end,
            _ => self.pieces.push(Piece::Headers { start, end }),
        }
        encoded
    }

    /// Appends the payload of `slot`.
    pub(crate) fn push_payload(&mut self, slot: usize) {
        self.pieces.push(Piece::Payload { slot });
    }

    /// Whether nothing is left to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Sends as much as `wait` allows; `payload` finds the bytes of a slot.
    ///
    /// # Errors
    /// The stream's, except that a full socket is not an error when `wait` is [`Wait::No`].
    pub(crate) fn flush<'a>(
        &mut self,
        stream: &mut Stream,
        wait: Wait,
        payload: impl Fn(usize) -> &'a [u8],
    ) -> io::Result<()> {
        while self.sent < self.pieces.len() {
            let mut slices: SmallVec<[IoSlice<'_>; PIECES_INLINE]> = SmallVec::new();
            let mut skip = self.skip;
            for piece in self.pieces[self.sent..].iter().take(PIECES_PER_SEND_MAX) {
                slices.push(IoSlice::new(&bytes_of(*piece, &self.headers, &payload)[skip..]));
                skip = 0;
            }
            match stream.send(&slices, wait) {
                Ok(count) => {
                    let lens = slices.iter().map(|slice| slice.len());
                    let (whole, rest) = split_sent(lens, count);
                    self.skip = if whole == 0 { self.skip + rest } else { rest };
                    self.sent += whole;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait == Wait::No => {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        self.headers.clear();
        self.pieces.clear();
        self.sent = 0;
        Ok(())
    }
}

fn bytes_of<'a, 'p: 'a>(
    piece: Piece,
    headers: &'a [u8],
    payload: &impl Fn(usize) -> &'p [u8],
) -> &'a [u8] {
    match piece {
        Piece::Headers { start, end } => &headers[start..end],
        Piece::Payload { slot } => payload(slot),
    }
}

/// How many whole pieces `count` bytes cover, and how many bytes of the next one.
fn split_sent(lens: impl Iterator<Item = usize>, count: usize) -> (usize, usize) {
    let mut rest = count;
    let mut whole = 0;
    for len in lens {
        if rest < len {
            break;
        }
        rest -= len;
        whole += 1;
    }
    (whole, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sent_bytes_are_split_at_pieces() {
        assert_eq!(split_sent([10, 20].into_iter(), 0), (0, 0));
        assert_eq!(split_sent([10, 20].into_iter(), 9), (0, 9));
        assert_eq!(split_sent([10, 20].into_iter(), 10), (1, 0));
        assert_eq!(split_sent([10, 20].into_iter(), 15), (1, 5));
        assert_eq!(split_sent([10, 20].into_iter(), 30), (2, 0));
    }

    #[test]
    fn a_slow_reader_gets_every_byte_in_order() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let kind = SocketType::STREAM;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None).unwrap();
        let mut stream = Stream::new(ours).unwrap();
        let payloads: Vec<Vec<u8>> = (0..40u8).map(|slot| vec![slot; 30_000]).collect();
        let mut tx = Tx::default();
        let mut expected = Vec::new();
        for (slot, payload) in payloads.iter().enumerate() {
            tx.push_header(|out| out.extend_from_slice(&[0xaa; 28]));
            tx.push_payload(slot);
            expected.extend_from_slice(&[0xaa; 28]);
            expected.extend_from_slice(payload);
        }
        let mut got = Vec::new();
        let mut chunk = vec![0; 7777];
        while !tx.is_empty() || got.len() < expected.len() {
            tx.flush(&mut stream, Wait::No, |slot| &payloads[slot]).unwrap();
            let (_, count) =
                rustix::net::recv(&theirs, &mut chunk[..], rustix::net::RecvFlags::empty())
                    .unwrap();
            got.extend_from_slice(&chunk[..count]);
        }
        assert!(got == expected);
    }
}
