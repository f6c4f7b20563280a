//! A plain NBD client: one request at a time, waited for.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};
use sheave_core::{Buf, Error, ErrorKind, Extent, Op, Payload, Reply};
use sheave_proto::wire::{allocation_status, command, command_flag};
use sheave_proto::{
    ClientConfig, ClientHandshake, ClientNegotiated, ClientNext, Decoded, ReadCoverage, ReplyBody,
    ReplyDecoder, ReplyError, ReplyStyle, Request,
    uri::{NbdUri, Transport},
};

use crate::tls::{ClientTls, explain_io};

/// A server that says nothing for so long is taken for dead.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(60);
/// The most errors in one reply; proto.md has no limit, but one is enough.
const ERRORS_MAX: usize = 64;
const RECEIVE_LEN: usize = 256 << 10;

/// A negotiated connection to a server.
pub(crate) struct Connection {
    /// The URI, for errors.
    server: String,
    stream: Box<dyn Stream>,
    negotiated: ClientNegotiated,
    decoder: ReplyDecoder,
    /// Received and not looked at yet: `input[taken..]`.
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
    cookie: u64,
    /// Why nothing can be said or heard any more: it is not known where the next reply begins.
    broken: Option<String>,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Connection {
    /// Connects and negotiates. A server that is silent for longer than `silence_max`, then or
    /// later, is an error.
    pub(crate) fn open(
        uri: &NbdUri,
        tls: Option<&ClientTls>,
        silence_max: Duration,
    ) -> Result<Self, Error> {
        let fail = |error| Error::from_io("connect", uri.to_string(), explain_io(error));
        let config =
            ClientConfig { export: uri.export.clone(), tls: uri.tls, ..ClientConfig::default() };
        let mut stream =
            connect(&uri.transport, silence_max).map_err(|error| fail(unreachable(error)))?;
        let refused =
            |what: String| Error::new(ErrorKind::Invalid, "connect", format!("{uri}: {what}"));
        let mut handshake =
            ClientHandshake::new(config).map_err(|error| refused(error.to_string()))?;
        let mut input = Vec::new();
        loop {
            let step = handshake.step(&input);
            input.drain(..step.consumed);
            stream.write_all(&step.output).map_err(fail)?;
            match step.next {
                ClientNext::NeedMore if step.consumed > 0 && !input.is_empty() => {}
                ClientNext::NeedMore => {
                    if receive(&mut stream, &mut input).map_err(fail)? == 0 {
                        return Err(refused(handshake.closed().to_string()));
                    }
                }
                ClientNext::StartTls => {
                    let tls = tls.ok_or_else(|| refused("TLS was not asked for".into()))?;
                    // What came before TLS may be anybody's.
                    input.clear();
                    stream = start_tls(stream, tls.clone()).map_err(fail)?;
                    stream.write_all(&handshake.tls_started()).map_err(fail)?;
                }
                ClientNext::Ready(negotiated) => {
                    return Ok(Self::ready(uri.to_string(), stream, *negotiated, input));
                }
                ClientNext::Failed(error) => return Err(refused(error.to_string())),
                ClientNext::Info(_) | ClientNext::Listed(_) => {
                    unreachable!("the goal is transmission")
                }
            }
        }
    }

    fn ready(
        server: String,
        stream: Box<dyn Stream>,
        negotiated: ClientNegotiated,
        input: Vec<u8>,
    ) -> Self {
        let decoder = ReplyDecoder::new(negotiated.style);
        let (taken, output, cookie, broken) = (0, Vec::new(), 0, None);
        Self { server, stream, negotiated, decoder, input, taken, output, cookie, broken }
    }

    /// What was agreed on.
    pub(crate) fn negotiated(&self) -> &ClientNegotiated {
        &self.negotiated
    }

    /// Runs an op to its end.
    pub(crate) fn run(&mut self, op: &Op) -> Result<Reply, Error> {
        if let Some(why) = &self.broken {
            let what = format!("{}: the connection is of no use since {why}", self.server);
            return Err(Error::new(ErrorKind::Io, op.kind().name(), what));
        }
        let answer = self.exchange(op);
        if let Err(broken) = &answer {
            self.broken = Some(broken.to_string());
        }
        answer.flatten().map_err(|why| {
            Error::new(why.kind(), op.kind().name(), self.server.clone()).because(why)
        })
    }

    /// Asks, and waits for the answer. The outer error is that of the connection.
    fn exchange(&mut self, op: &Op) -> Result<Result<Reply, Error>, Error> {
        self.cookie += 1;
        let request = self.request(op);
        self.output.clear();
        request.encode(self.negotiated.style, &mut self.output);
        if let Op::Write { data, .. } = op {
            let start = self.output.len();
            self.output.resize(start + data.len(), 0);
            data.copy_out(&mut self.output[start..]);
        }
        self.stream.write_all(&self.output).and_then(|()| self.stream.flush()).map_err(lost)?;
        self.answer(op, &request)
    }

    fn request(&self, op: &Op) -> Request {
        let wide = self.negotiated.style == ReplyStyle::Extended;
        let flag = |on: bool, flag: u16| if on { flag } else { 0 };
        let (command, flags) = match op {
            Op::Read { .. } => (command::READ, 0),
            Op::Write { fua, .. } => {
                let payload = flag(wide, command_flag::PAYLOAD_LEN);
                (command::WRITE, flag(*fua, command_flag::FUA) | payload)
            }
            Op::Flush => (command::FLUSH, 0),
            Op::Trim { fua, .. } => (command::TRIM, flag(*fua, command_flag::FUA)),
            Op::WriteZeroes { fua, no_hole, fast, .. } => {
                let flags = flag(*fua, command_flag::FUA)
                    | flag(*no_hole, command_flag::NO_HOLE)
                    | flag(*fast, command_flag::FAST_ZERO);
                (command::WRITE_ZEROES, flags)
            }
            Op::Cache { .. } => (command::CACHE, 0),
            Op::BlockStatus { extents_max, .. } => {
                (command::BLOCK_STATUS, flag(*extents_max == 1, command_flag::REQ_ONE))
            }
        };
        let (offset, length) = op.range().map_or((0, 0), |range| (range.start(), range.len()));
        Request { cookie: self.cookie, flags, command, offset, length }
    }

    /// Receives the reply, chunk by chunk.
    fn answer(&mut self, op: &Op, request: &Request) -> Result<Result<Reply, Error>, Error> {
        let status = self.negotiated.context(ALLOCATION);
        let mut answer = Answer::to(op, request, status);
        loop {
            let known = |cookie| (cookie == request.cookie).then_some(*request);
            let decoded = self.decoder.decode(&self.input[self.taken..], known);
            let (consumed, done, place) = match decoded.map_err(violation)? {
                Decoded::NeedMore(_) => {
                    self.fill().map_err(lost)?;
                    continue;
                }
                Decoded::Event { consumed, event } => {
                    let place = answer.take(request, event.body).map_err(violation)?;
                    (consumed, event.done, place)
                }
            };
            self.taken += consumed;
            if let Some((at, len)) = place {
                self.data(&answer, at, len).map_err(lost)?;
            }
            if done {
                return answer.finish(op);
            }
        }
    }

    /// Receives `len` bytes of data into the answer's buffer at `at`.
    fn data(&mut self, answer: &Answer, mut at: usize, len: usize) -> io::Result<()> {
        let end = at + len;
        while at < end {
            if self.taken == self.input.len() {
                self.fill()?;
            }
            let have = &self.input[self.taken..];
            let now = have.len().min(end - at);
            answer.data.copy_in(at, &have[..now]);
            self.taken += now;
            at += now;
        }
        Ok(())
    }

    fn fill(&mut self) -> io::Result<()> {
        self.input.drain(..self.taken);
        self.taken = 0;
        match receive(&mut self.stream, &mut self.input)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let bye = Request { command: command::DISC, ..Request::default() };
        self.output.clear();
        bye.encode(self.negotiated.style, &mut self.output);
        // Nobody answers it, and nobody is hurt if it does not arrive.
        let _ = self.stream.write_all(&self.output).and_then(|()| self.stream.flush());
    }
}

/// The connection cannot be used any more.
fn lost(error: io::Error) -> Error {
    Error::from_io("connection", "lost", error)
}

fn violation(error: ReplyError) -> Error {
    Error::new(ErrorKind::Io, "connection", format!("the server broke the protocol: {error}"))
}

/// The metadata context that a block status is asked for.
const ALLOCATION: &str = "base:allocation";

/// What has come of an answer.
struct Answer {
    data: Buf,
    /// Which of a read's bytes have come: what a server leaves out must not pass for zeroes.
    coverage: ReadCoverage,
    /// The id of [`ALLOCATION`].
    status: Option<u32>,
    extents: Vec<Extent>,
    error: Option<Error>,
    errors: usize,
}

impl Answer {
    fn to(op: &Op, request: &Request, status: Option<u32>) -> Self {
        let len = match op {
            Op::Read { range, .. } => {
                usize::try_from(range.len()).expect("a read fits into memory")
            }
            _ => 0,
        };
        let (data, coverage) = (Buf::zeroed(len), ReadCoverage::new(request));
        Self { data, coverage, status, extents: Vec::new(), error: None, errors: 0 }
    }

    /// Takes a chunk in; answers where in the buffer data goes that follows it.
    fn take(
        &mut self,
        request: &Request,
        body: ReplyBody<'_>,
    ) -> Result<Option<(usize, usize)>, ReplyError> {
        Ok(match body {
            ReplyBody::Success => None,
            ReplyBody::Data { at, len } => {
                self.coverage.add(at, len)?;
                Some(((at - request.offset) as usize, len as usize))
            }
            ReplyBody::Hole { at, len } => {
                self.coverage.add(at, len)?;
                self.data.zero((at - request.offset) as usize, len as usize);
                None
            }
            ReplyBody::BlockStatus { context, extents } => {
                if self.status != Some(context) || !self.extents.is_empty() {
                    return Err(ReplyError::Violation("a block status that was not asked for"));
                }
                self.extents = within(request.length, extents.iter());
                None
            }
            ReplyBody::Error { errno, message, .. } => {
                self.errors += 1;
                if self.errors > ERRORS_MAX {
                    return Err(ReplyError::Violation("a reply with too many errors"));
                }
                let what = if message.is_empty() { "the server reports an error" } else { message };
                self.error = Some(Error::new(ErrorKind::of_nbd(errno), "server", what));
                None
            }
        })
    }

    fn finish(mut self, op: &Op) -> Result<Result<Reply, Error>, Error> {
        let incomplete = || {
            Error::new(ErrorKind::Io, "connection", "the server left something out of its answer")
        };
        match (self.error, op) {
            (Some(error), _) => Ok(Err(error)),
            (None, Op::Read { .. }) if !self.coverage.is_complete() => Err(incomplete()),
            (None, Op::Read { .. }) => Ok(Ok(Reply::Data(Payload::from(self.data)))),
            (None, Op::BlockStatus { .. }) if self.extents.is_empty() => Err(incomplete()),
            (None, Op::BlockStatus { extents_max, .. }) => {
                // The protocol can only ask for one or for as many as there are.
                self.extents.truncate(*extents_max);
                Ok(Ok(Reply::Extents(self.extents)))
            }
            (None, _) => Ok(Ok(Reply::Done)),
        }
    }
}

/// The part of the extents that lies in `len` bytes: servers may tell more.
fn within(len: u64, extents: impl Iterator<Item = (u64, u64)>) -> Vec<Extent> {
    let mut left = len;
    let inside = extents.map_while(|(len, status)| {
        let len = len.min(left);
        left -= len;
        (len > 0).then_some(Extent {
            len,
            hole: status & u64::from(allocation_status::HOLE) != 0,
            zero: status & u64::from(allocation_status::ZERO) != 0,
        })
    });
    inside.collect()
}

/// Says what to look for when nobody listens where a server should be.
#[must_use]
pub fn unreachable(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ (io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            io::Error::new(kind, format!("{error}; is the server running?"))
        }
        _ => error,
    }
}

fn connect(transport: &Transport, silence_max: Duration) -> io::Result<Box<dyn Stream>> {
    Ok(match transport {
        Transport::Unix { path } => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(silence_max))?;
            stream.set_write_timeout(Some(silence_max))?;
            Box::new(stream)
        }
        Transport::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(silence_max))?;
            stream.set_write_timeout(Some(silence_max))?;
            Box::new(stream)
        }
        Transport::Vsock { .. } => {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "vsock is not supported"));
        }
    })
}

fn start_tls(stream: Box<dyn Stream>, tls: ClientTls) -> io::Result<Box<dyn Stream>> {
    let tls = ClientConnection::new(tls.config, tls.server).map_err(io::Error::other)?;
    Ok(Box::new(StreamOwned::new(tls, stream)))
}

fn receive(stream: &mut Box<dyn Stream>, input: &mut Vec<u8>) -> io::Result<usize> {
    let start = input.len();
    input.resize(start + RECEIVE_LEN, 0);
    let received = loop {
        match stream.read(&mut input[start..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    input.truncate(start + received.as_ref().copied().unwrap_or(0));
    received
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_silent_server_is_given_up() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let uri = format!("nbd+unix:///?socket={}", path.display()).parse().unwrap();
        let begun = Instant::now();
        let silence_max = Duration::from_millis(200);
        let error = Connection::open(&uri, None, silence_max).map(|_| ()).unwrap_err();
        assert!(begun.elapsed() >= silence_max && begun.elapsed() < 10 * silence_max, "{error}");
    }

    #[test]
    fn extents_end_where_the_question_ends() {
        let lens = |len, extents: &[(u64, u64)]| -> Vec<u64> {
            within(len, extents.iter().copied()).iter().map(|extent| extent.len).collect()
        };
        assert_eq!(lens(100, &[(60, 0), (40, 3)]), [60, 40]);
        assert_eq!(lens(100, &[(60, 0), (u64::MAX, 3), (u64::MAX, 0)]), [60, 40]);
        assert_eq!(lens(100, &[(u64::MAX, 1)]), [100]);
        assert_eq!(lens(100, &[(60, 0)]), [60]);
    }
}
