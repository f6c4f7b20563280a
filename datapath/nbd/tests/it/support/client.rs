//! A client with any number of requests in flight.

use std::io;

use sheave_core::{Extent, NbdErrno};
use sheave_proto::wire::command;
use sheave_proto::{
    Answer as Content, CLIENT_IN_FLIGHT_MAX, Client as Transmission, ClientConfig, ClientEvent,
    ClientHandshake, ClientNegotiated, ClientNext, ReplyStyle, Request,
};

use super::{Link, Running};

/// A negotiated connection.
pub(crate) struct Client {
    pub(crate) link: Link,
    pub(crate) negotiated: ClientNegotiated,
    transmission: Transmission<(Request, Vec<u8>)>,
    /// Counts requests; tests call it the cookie.
    next_cookie: u64,
}

/// The whole reply to a request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) request: Request,
    pub(crate) error: Option<(NbdErrno, String)>,
    /// A read's bytes.
    pub(crate) data: Vec<u8>,
    /// Of a block status.
    pub(crate) extents: Vec<Extent>,
}

impl Client {
    /// Connects to the unix socket and requests all features.
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
                    let transmission = Transmission::new(&negotiated, CLIENT_IN_FLIGHT_MAX);
                    let negotiated = *negotiated;
                    return Ok(Self { link, negotiated, transmission, next_cookie: 1 });
                }
                other => return Err(io::Error::other(format!("{other:?}"))),
            }
        }
    }

    /// Requests without an answer.
    pub(crate) fn in_flight(&self) -> usize {
        self.transmission.in_flight()
    }

    pub(crate) fn read(&mut self, offset: u64, length: u64) -> u64 {
        self.ask(command::READ, 0, offset, length)
    }

    pub(crate) fn flush(&mut self) -> u64 {
        self.ask(command::FLUSH, 0, 0, 0)
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, bytes: &[u8]) -> u64 {
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
        let mut header = Vec::new();
        if command == command::DISC {
            self.transmission.disconnect(&mut header);
            return header;
        }
        let data = if command == command::READ { vec![0; len as usize] } else { Vec::new() };
        self.transmission.submit_request(request, (request, data), &mut header).expect("room");
        header
    }

    /// The next whole reply, to whichever request; `None` at the end of the stream.
    pub(crate) fn answer(&mut self) -> io::Result<Option<Answer>> {
        loop {
            if let Some(answer) = self.decode()? {
                return Ok(Some(answer));
            }
            if self.link.ended {
                let is_whole = self.link.input.is_empty() && self.transmission.payload().is_none();
                return match is_whole {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
            self.link.turn(super::TIMEOUT)?;
        }
    }

    /// Sends the queued bytes, and waits for the reply to this request, the only one in flight.
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

    /// Takes the bytes that have arrived. Returns the first complete reply.
    fn decode(&mut self) -> io::Result<Option<Answer>> {
        let Self { link, transmission, .. } = self;
        loop {
            let step = transmission.step(&link.input);
            let (consumed, event) = step.map_err(io::Error::other)?;
            let mut ended = None;
            match event {
                ClientEvent::NeedMore(_) => {
                    link.input.drain(..consumed);
                    return Ok(None);
                }
                ClientEvent::Data { state: (_, data), at, bytes, .. } => {
                    data[at..at + bytes.len()].copy_from_slice(bytes);
                }
                ClientEvent::Zeroes { state: (_, data), at, len, .. } => data[at..at + len].fill(0),
                ClientEvent::Done { state: (request, data), outcome, .. } => {
                    let (mut error, mut extents) = (None, Vec::new());
                    match outcome {
                        Ok(Content::Done) => {}
                        Ok(Content::Extents(found)) => extents = found,
                        Err(told) => error = Some((told.errno, told.message.into())),
                    }
                    ended = Some(Answer { request, error, data, extents });
                }
            }
            link.input.drain(..consumed);
            if ended.is_some() {
                return Ok(ended);
            }
        }
    }
}
