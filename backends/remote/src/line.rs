//! One connection: what is sent and received next. One backend drives it at a time.

use std::collections::VecDeque;
use std::io::ErrorKind as IoErrorKind;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{Shutdown, shutdown};
use rustls::ClientConnection;
use sheave_core::{Buf, Io, IoRequest, IoToken, Nanos, Payload, Result, Segment, memory};
use sheave_proto::Client;

use crate::connect::Connected;

/// Requests in flight on one connection.
pub(crate) const DEPTH: usize = 256;
/// Bytes received at once, unless they have a place of their own.
const INPUT_LEN: usize = 64 << 10;
/// The same where reads are long: the head of the next reply, and little of its data.
const SHORT_INPUT_LEN: usize = 4 << 10;
/// From how many bytes on data is received in its place.
const IN_PLACE_MIN: usize = 16 << 10;

/// What a request of the engine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Send,
    Input,
    Place,
}

/// Number of the connection and step, in the 56 bits that a backend has.
pub(crate) fn token(number: u64, step: Step) -> IoToken {
    IoToken(number << 2 | step as u64)
}

/// The reverse of [`token`].
pub(crate) fn step_of(token: IoToken) -> Option<(u64, Step)> {
    let step = [Step::Send, Step::Input, Step::Place].get((token.0 & 3) as usize)?;
    Some((token.0 >> 2, *step))
}

pub(crate) struct Line {
    /// Tells it from all connections before it.
    pub(crate) number: u64,
    socket: Arc<OwnedFd>,
    /// The jobs in flight.
    pub(crate) client: Client<usize>,
    tls: Option<Box<ClientConnection>>,
    /// The user whose engine sends and receives.
    pub(crate) driver: Option<usize>,
    /// Jobs to be sent, in order.
    pub(crate) queue: VecDeque<usize>,
    pub(crate) is_sending: bool,
    pub(crate) is_receiving: bool,
    /// What is to be sent before anything else, from this byte on.
    unsent: Option<(Payload, usize)>,
    /// Received, decrypted and not consumed.
    pub(crate) input: Vec<u8>,
    input_len: usize,
    /// It has ended; only the others are of use until all are made again.
    pub(crate) is_over: bool,
    /// When something arrived, or was asked for while nothing was owed.
    pub(crate) heard: Nanos,
    /// When a request may have waited for its answer for too long, though others have theirs.
    pub(crate) check_at: Nanos,
}

impl Line {
    pub(crate) fn new(number: u64, connected: Connected) -> Self {
        let Connected { socket, tls, negotiated, input } = connected;
        Self {
            number,
            socket: Arc::new(socket),
            client: Client::new(&negotiated, DEPTH),
            tls,
            driver: None,
            queue: VecDeque::new(),
            is_sending: false,
            is_receiving: false,
            unsent: None,
            input,
            input_len: INPUT_LEN,
            is_over: false,
            heard: 0,
            check_at: Nanos::MAX,
        }
    }

    /// Whether it needs a driver.
    pub(crate) fn has_work(&self) -> bool {
        !self.queue.is_empty() || self.client.in_flight() > 0 || self.unsent.is_some()
    }

    /// Whether the server owes answers, or is to get the rest of what has begun.
    pub(crate) fn is_owed(&self) -> bool {
        let is_owed = self.client.in_flight() > 0 || self.unsent.is_some() || self.is_sending;
        is_owed && !self.is_over
    }

    /// Requests that it has.
    pub(crate) fn load(&self) -> usize {
        self.queue.len() + self.client.in_flight()
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether more may be gathered for sending.
    pub(crate) fn may_gather(&self) -> bool {
        !self.is_sending && self.unsent.is_none() && self.client.has_room()
    }

    /// Ends it for both sides. Requests of an engine that are in flight end soon.
    pub(crate) fn shut_down(&self) {
        // So that a server over TCP does not read what is still on its way to it.
        let _ =
            rustix::net::sockopt::set_socket_linger(&self.socket, Some(std::time::Duration::ZERO));
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Has these bytes sent next.
    ///
    /// # Errors
    /// When there is no memory to encrypt them.
    pub(crate) fn send(&mut self, payload: Payload, io: &mut dyn Io) -> Result<()> {
        debug_assert!(self.unsent.is_none(), "one send at a time");
        let payload = match &mut self.tls {
            None => payload,
            Some(tls) => encrypt(tls, payload, io)?,
        };
        self.unsent = (!payload.is_empty()).then_some((payload, 0));
        Ok(())
    }

    /// The next send, if one is due.
    pub(crate) fn next_send(&mut self) -> Option<(IoRequest, IoToken)> {
        if self.is_sending {
            return None;
        }
        let (from, skip) = self.unsent.take()?;
        self.is_sending = true;
        let send = IoRequest::Send { socket: Arc::clone(&self.socket), from, skip };
        Some((send, token(self.number, Step::Send)))
    }

    /// Nothing was sent from this byte on; it is next.
    pub(crate) fn not_sent(&mut self, from: Payload, skip: usize) {
        self.is_sending = false;
        self.unsent = Some((from, skip));
    }

    /// So many bytes have been sent; the rest is next.
    pub(crate) fn sent(&mut self, from: Payload, skip: usize, io: &mut dyn Io) {
        self.is_sending = false;
        if skip < from.len() {
            self.unsent = Some((from, skip));
        } else {
            io.recycle(from);
        }
    }

    /// The next receive, if one is due: into the memory of a read, which `into_of` answers for its
    /// job, or into a buffer.
    ///
    /// # Errors
    /// When there is no memory for the buffer.
    pub(crate) fn next_recv(
        &mut self,
        into_of: impl FnOnce(usize) -> Option<Buf>,
        io: &mut dyn Io,
    ) -> Result<Option<(IoRequest, IoToken)>> {
        if self.is_receiving || self.client.in_flight() == 0 {
            return Ok(None);
        }
        let place = match &self.tls {
            None if self.input.is_empty() => self.client.payload(),
            _ => None,
        };
        let place = place.filter(|place| place.len >= IN_PLACE_MIN);
        let place = place.and_then(|place| Some(into_of(*place.state)?.slice(place.at, place.len)));
        let (into, step) = match place {
            Some(buf) => {
                self.input_len = SHORT_INPUT_LEN;
                (buf, Step::Place)
            }
            None => (io.buffer(self.input_len)?, Step::Input),
        };
        self.is_receiving = true;
        let (socket, into) = (Arc::clone(&self.socket), into.into());
        // Not all of it: what has arrived is known at any time, so that another backend can go on.
        let recv = IoRequest::Recv { socket, into, skip: 0, all: false };
        Ok(Some((recv, token(self.number, step))))
    }

    /// Takes `count` bytes that were received into a buffer.
    ///
    /// # Errors
    /// Why the connection is of no more use.
    pub(crate) fn received(&mut self, from: &Payload, count: usize) -> Result<(), String> {
        if count == self.input_len {
            self.input_len = INPUT_LEN;
        }
        let start = self.input.len();
        memory::attempt(|| self.input.try_reserve(count)).map_err(|error| error.to_string())?;
        match &mut self.tls {
            None => {
                self.input.resize(start + count, 0);
                from.slice(0, count).copy_out(&mut self.input[start..]);
                Ok(())
            }
            Some(tls) => {
                let bytes = from.slice(0, count).to_vec();
                decrypt(tls, &bytes, &mut self.input)
            }
        }
    }

    /// Takes what TLS has decrypted during its handshake.
    ///
    /// # Errors
    /// As [`Self::received`].
    pub(crate) fn take_early(&mut self) -> Result<(), String> {
        match &mut self.tls {
            Some(tls) => decrypt(tls, &[], &mut self.input),
            None => Ok(()),
        }
    }
}

/// Encrypts a payload, and whatever else TLS has to say.
fn encrypt(tls: &mut ClientConnection, payload: Payload, io: &mut dyn Io) -> Result<Payload> {
    let mut records = Vec::new();
    for segment in payload.segments() {
        let bytes = match segment {
            Segment::Data(buf) => {
                memory::check_room(2 * buf.len())?;
                buf.to_vec()
            }
            Segment::Zero(len) => {
                memory::check_room(2 * len)?;
                vec![0; *len]
            }
        };
        tls.writer().write_all(&bytes).expect("writing to memory without a limit");
        while tls.wants_write() {
            tls.write_tls(&mut records).expect("writing to memory");
        }
    }
    let out = io.buffer(records.len())?;
    out.copy_in(0, &records);
    io.recycle(payload);
    Ok(out.into())
}

fn decrypt(
    tls: &mut ClientConnection,
    mut bytes: &[u8],
    plain: &mut Vec<u8>,
) -> Result<(), String> {
    loop {
        loop {
            let mut reader = tls.reader();
            match reader.fill_buf() {
                Ok([]) => return Err("the server closed the connection".to_owned()),
                Ok(run) => {
                    memory::attempt(|| plain.try_reserve(run.len()))
                        .map_err(|error| error.to_string())?;
                    plain.extend_from_slice(run);
                    let taken = run.len();
                    reader.consume(taken);
                }
                Err(error) if error.kind() == IoErrorKind::WouldBlock => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        if bytes.is_empty() {
            return Ok(());
        }
        tls.read_tls(&mut bytes).map_err(|error| error.to_string())?;
        tls.process_new_packets().map_err(|error| error.to_string())?;
    }
}
