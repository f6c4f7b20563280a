//! A client with any number of requests in flight.

use std::collections::HashMap;
use std::io;

use sheave_core::NbdErrno;
use sheave_proto::wire::{command, command_flag};
use sheave_proto::{
    ClientConfig, ClientHandshake, ClientNegotiated, ClientNext, Decoded, ReadCoverage, ReplyBody,
    ReplyDecoder, ReplyStyle,
};

use sheave_proto::Request;

use super::{Link, Running};

/// A negotiated connection.
pub(crate) struct Client {
    pub(crate) link: Link,
    pub(crate) negotiated: ClientNegotiated,
    decoder: ReplyDecoder,
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
}

struct Pending {
    request: Request,
    data: Vec<u8>,
    coverage: ReadCoverage,
    extents: Vec<(u64, u64)>,
    error: Option<(NbdErrno, String)>,
}

/// The whole reply to a request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) request: Request,
    pub(crate) error: Option<(NbdErrno, String)>,
    /// A read's bytes.
    pub(crate) data: Vec<u8>,
    /// Lengths and statuses.
    pub(crate) extents: Vec<(u64, u64)>,
}

impl Client {
    /// Connects to the unix socket and asks for the best that there is.
    pub(crate) fn new(server: &Running) -> Self {
        Self::with(Link::unix(&server.socket), ReplyStyle::Extended)
    }

    pub(crate) fn simple(server: &Running) -> Self {
        Self::with(Link::unix(&server.socket), ReplyStyle::Simple)
    }

    pub(crate) fn with(link: Link, style: ReplyStyle) -> Self {
        Self::negotiate(link, ClientConfig { style, ..ClientConfig::default() }, None).unwrap()
    }

    /// Negotiates.
    pub(crate) fn negotiate(
        mut link: Link,
        config: ClientConfig,
        mut tls: Option<rustls::ClientConnection>,
    ) -> io::Result<Self> {
        let mut handshake = ClientHandshake::new(config).unwrap();
        loop {
            let step = handshake.step(&link.input);
            link.input.drain(..step.consumed);
            link.queue(&step.output);
            link.flush()?;
            match step.next {
                ClientNext::NeedMore if step.consumed > 0 && !link.input.is_empty() => {}
                ClientNext::NeedMore => {
                    link.receive(link.input.len() + 1)?;
                    if link.ended {
                        return Err(io::Error::other(handshake.closed()));
                    }
                }
                ClientNext::StartTls => {
                    link.start_tls(tls.take().expect("TLS"))?;
                    link.queue(&handshake.tls_started());
                }
                ClientNext::Ready(negotiated) => {
                    let decoder = ReplyDecoder::new(negotiated.style);
                    let (negotiated, pending) = (*negotiated, HashMap::new());
                    return Ok(Self { link, negotiated, decoder, pending, next_cookie: 1 });
                }
                other => return Err(io::Error::other(format!("{other:?}"))),
            }
        }
    }

    /// Requests without an answer.
    pub(crate) fn in_flight(&self) -> usize {
        self.pending.len()
    }

    pub(crate) fn read(&mut self, offset: u64, length: u64) -> u64 {
        self.ask(command::READ, 0, offset, length)
    }

    pub(crate) fn flush(&mut self) -> u64 {
        self.ask(command::FLUSH, 0, 0, 0)
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, bytes: &[u8]) -> u64 {
        let wide = self.negotiated.style == ReplyStyle::Extended;
        let flags = if wide { flags | command_flag::PAYLOAD_LEN } else { flags };
        let cookie = self.ask(command::WRITE, flags, offset, bytes.len() as u64);
        self.link.queue(bytes);
        cookie
    }

    /// Queues a request's header, to be sent by the next turns.
    pub(crate) fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> u64 {
        let header = self.header(command, flags, offset, length);
        self.link.queue(&header);
        self.next_cookie - 1
    }

    /// A request's header; its answer is awaited.
    pub(crate) fn header(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Vec<u8> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let request = Request { cookie, flags, command, offset, length: len };
        if command != command::DISC {
            let data = if command == command::READ { vec![0; len as usize] } else { Vec::new() };
            let coverage = ReadCoverage::new(&request);
            let pending = Pending { request, data, coverage, extents: Vec::new(), error: None };
            self.pending.insert(cookie, pending);
        }
        let mut header = Vec::new();
        request.encode(self.negotiated.style, &mut header);
        header
    }

    /// The next whole reply, to whichever request; `None` at the end of the stream.
    pub(crate) fn answer(&mut self) -> io::Result<Option<Answer>> {
        loop {
            if let Some(answer) = self.decode()? {
                return Ok(Some(answer));
            }
            if self.link.ended {
                return match self.link.input.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
            self.link.turn(super::TIMEOUT)?;
        }
    }

    /// Sends what is queued, and waits for the reply to this request, which is the only one.
    pub(crate) fn only_answer(&mut self) -> Answer {
        let answer = self.answer().unwrap().expect("a reply, not the end");
        assert_eq!(self.in_flight(), 0);
        answer
    }

    /// Reads, waiting for it.
    pub(crate) fn bytes(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.read(offset, len);
        let answer = self.only_answer();
        assert_eq!(answer.error, None);
        answer.data
    }

    /// Writes, waiting for it.
    pub(crate) fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.write(0, offset, bytes);
        assert_eq!(self.only_answer().error, None);
    }

    /// Takes a chunk off the input. Answers with the reply if that was its last.
    fn decode(&mut self) -> io::Result<Option<Answer>> {
        let Self { link, decoder, pending, .. } = self;
        loop {
            let known = |cookie| pending.get(&cookie).map(|pending| pending.request);
            let decoded = decoder.decode(&link.input, known).map_err(io::Error::other)?;
            let Decoded::Event { consumed, event } = decoded else { return Ok(None) };
            let entry = pending.get_mut(&event.cookie).expect("a request in flight");
            let data_len = match event.body {
                ReplyBody::Data { len, .. } => len as usize,
                _ => 0,
            };
            if link.input.len() < consumed + data_len {
                return Ok(None);
            }
            let (done, cookie) = (event.done, event.cookie);
            entry.take(event.body, &link.input[consumed..consumed + data_len])?;
            link.input.drain(..consumed + data_len);
            if done {
                let pending = pending.remove(&cookie).expect("a request in flight");
                return Ok(Some(pending.finish()?));
            }
        }
    }
}

impl Pending {
    fn take(&mut self, body: ReplyBody<'_>, bytes: &[u8]) -> io::Result<()> {
        match body {
            ReplyBody::Success => {}
            ReplyBody::Data { at, len } => {
                self.coverage.add(at, len).map_err(io::Error::other)?;
                let at = (at - self.request.offset) as usize;
                self.data[at..at + bytes.len()].copy_from_slice(bytes);
            }
            ReplyBody::Hole { at, len } => {
                self.coverage.add(at, len).map_err(io::Error::other)?;
            }
            ReplyBody::BlockStatus { extents, .. } => self.extents.extend(extents.iter()),
            ReplyBody::Error { errno, message, .. } => {
                self.error = Some((errno, message.to_owned()));
            }
        }
        Ok(())
    }

    fn finish(self) -> io::Result<Answer> {
        let Self { request, data, coverage, extents, error } = self;
        let is_read = request.command == command::READ;
        if is_read && error.is_none() && !coverage.is_complete() {
            return Err(io::Error::other("a read that left bytes out"));
        }
        Ok(Answer { request, error, data, extents })
    }
}
