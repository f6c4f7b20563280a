//! A plain NBD client: one request at a time, waited for.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig as TlsClientConfig, ClientConnection, StreamOwned};
use sheave_core::{Buf, Error, ErrorKind, Extent, Op, Payload, Reply};
use sheave_proto::wire::{allocation_status, command, command_flag};
use sheave_proto::{
    ClientConfig, ClientHandshake, ClientNegotiated, ClientNext, Decoded, ReadCoverage, ReplyBody,
    ReplyDecoder, ReplyError, ReplyStyle, Request,
    uri::{NbdUri, Transport},
};

/// A server that says nothing for so long is taken for dead.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const RECEIVE_LEN: usize = 256 << 10;

/// A negotiated connection to a server.
pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    negotiated: ClientNegotiated,
    decoder: ReplyDecoder,
    /// Received and not looked at yet: `input[taken..]`.
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
    cookie: u64,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Connection {
    /// Connects and negotiates.
    pub(crate) fn open(uri: &NbdUri, tls: Option<&Arc<TlsClientConfig>>) -> Result<Self, Error> {
        let fail = |error| Error::from_io("connect", uri.to_string(), error);
        let config =
            ClientConfig { export: uri.export.clone(), tls: uri.tls, ..ClientConfig::default() };
        let mut stream = connect(&uri.transport).map_err(fail)?;
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
                    stream = start_tls(stream, uri, Arc::clone(tls)).map_err(fail)?;
                    stream.write_all(&handshake.tls_started()).map_err(fail)?;
                }
                ClientNext::Ready(negotiated) => {
                    let decoder = ReplyDecoder::new(negotiated.style);
                    let (negotiated, taken, output) = (*negotiated, 0, Vec::new());
                    let cookie = 0;
                    return Ok(Self { stream, negotiated, decoder, input, taken, output, cookie });
                }
                ClientNext::Failed(error) => return Err(refused(error.to_string())),
                ClientNext::Info(_) | ClientNext::Listed(_) => {
                    unreachable!("the goal is transmission")
                }
            }
        }
    }

    /// What was agreed on.
    pub(crate) fn negotiated(&self) -> &ClientNegotiated {
        &self.negotiated
    }

    /// Runs an op to its end.
    pub(crate) fn run(&mut self, op: &Op) -> Result<Reply, Error> {
        self.cookie += 1;
        let request = self.request(op);
        self.output.clear();
        request.encode(self.negotiated.style, &mut self.output);
        if let Op::Write { data, .. } = op {
            let start = self.output.len();
            self.output.resize(start + data.len(), 0);
            data.copy_out(&mut self.output[start..]);
        }
        let lost = |error| Error::from_io(op.kind().name(), "connection to the server", error);
        self.stream.write_all(&self.output).map_err(lost)?;
        self.stream.flush().map_err(lost)?;
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
    fn answer(&mut self, op: &Op, request: &Request) -> Result<Reply, Error> {
        let violation = |error: ReplyError| {
            let what = format!("the server broke the protocol: {error}");
            Error::new(ErrorKind::Io, op.kind().name(), what)
        };
        let mut answer = Answer::to(op, request);
        loop {
            let known = |cookie| (cookie == request.cookie).then_some(*request);
            let decoded =
                self.decoder.decode(&self.input[self.taken..], known).map_err(violation)?;
            let (consumed, done, len) = match decoded {
                Decoded::NeedMore(_) => {
                    self.fill().map_err(|error| {
                        Error::from_io(op.kind().name(), "connection to the server", error)
                    })?;
                    continue;
                }
                Decoded::Event { consumed, event } => {
                    let place = answer.take(request, event.body).map_err(violation)?;
                    (consumed, event.done, place)
                }
            };
            self.taken += consumed;
            if let Some((at, len)) = len {
                self.data(&answer, at, len).map_err(|error| {
                    Error::from_io(op.kind().name(), "connection to the server", error)
                })?;
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
        let bye = Request { command: command::DISC, ..Request::default() };
        self.output.clear();
        bye.encode(self.negotiated.style, &mut self.output);
        // Nobody answers it, and nobody is hurt if it does not arrive.
        let _ = self.stream.write_all(&self.output).and_then(|()| self.stream.flush());
    }
}

/// What has come of an answer.
struct Answer {
    data: Buf,
    /// Which of a read's bytes have come: what a server leaves out must not pass for zeroes.
    coverage: ReadCoverage,
    extents: Vec<Extent>,
    error: Option<Error>,
}

impl Answer {
    fn to(op: &Op, request: &Request) -> Self {
        let len = match op {
            Op::Read { range } => usize::try_from(range.len()).expect("a read fits into memory"),
            _ => 0,
        };
        let coverage = ReadCoverage::new(request);
        Self { data: Buf::zeroed(len), coverage, extents: Vec::new(), error: None }
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
            ReplyBody::BlockStatus { extents, .. } => {
                self.extents.extend(extents.iter().map(|(len, status)| Extent {
                    len,
                    hole: status & u64::from(allocation_status::HOLE) != 0,
                    zero: status & u64::from(allocation_status::ZERO) != 0,
                }));
                None
            }
            ReplyBody::Error { errno, message, .. } => {
                let what = if message.is_empty() { "the server reports an error" } else { message };
                self.error = Some(Error::new(ErrorKind::of_nbd(errno), "server", what));
                None
            }
        })
    }

    fn finish(self, op: &Op) -> Result<Reply, Error> {
        match (self.error, op) {
            (Some(error), _) => Err(error),
            (None, Op::Read { .. }) if !self.coverage.is_complete() => {
                let what = "the server left bytes out of its answer";
                Err(Error::new(ErrorKind::Io, op.kind().name(), what))
            }
            (None, Op::Read { .. }) => Ok(Reply::Data(Payload::from(self.data))),
            (None, Op::BlockStatus { .. }) => Ok(Reply::Extents(self.extents)),
            (None, _) => Ok(Reply::Done),
        }
    }
}

fn connect(transport: &Transport) -> io::Result<Box<dyn Stream>> {
    Ok(match transport {
        Transport::Unix { path } => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            stream.set_write_timeout(Some(SILENCE_MAX))?;
            Box::new(stream)
        }
        Transport::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            stream.set_write_timeout(Some(SILENCE_MAX))?;
            Box::new(stream)
        }
        Transport::Vsock { .. } => {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "vsock is not supported"));
        }
    })
}

fn start_tls(
    stream: Box<dyn Stream>,
    uri: &NbdUri,
    config: Arc<TlsClientConfig>,
) -> io::Result<Box<dyn Stream>> {
    let host = match (&uri.tls_options.hostname, &uri.transport) {
        (Some(name), _) | (None, Transport::Tcp { host: name, .. }) => name.clone(),
        (None, _) => "localhost".to_owned(),
    };
    let name = ServerName::try_from(host).map_err(io::Error::other)?;
    let tls = ClientConnection::new(config, name).map_err(io::Error::other)?;
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
    use sheave_core::ByteRange;

    use super::*;

    fn read_answered_with(bodies: &[ReplyBody<'_>]) -> Result<Reply, Error> {
        let range = ByteRange::within(4096, 1024, 1 << 20).unwrap();
        let op = Op::Read { range };
        let request = Request { offset: range.start(), length: range.len(), ..Request::default() };
        let mut answer = Answer::to(&op, &request);
        for body in bodies {
            answer
                .take(&request, *body)
                .map_err(|error| Error::new(ErrorKind::Io, "read", error.to_string()))?;
        }
        answer.finish(&op)
    }

    #[test]
    fn bytes_that_a_server_leaves_out_do_not_pass_for_zeroes() {
        let hole = |at, len| ReplyBody::Hole { at, len };
        assert!(read_answered_with(&[hole(4096, 1024)]).is_ok());
        assert!(read_answered_with(&[hole(4608, 512), hole(4096, 512)]).is_ok());
        for lies in [&[ReplyBody::Success][..], &[hole(4096, 1023)], &[hole(4100, 1020)]] {
            let error = read_answered_with(lies).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        }
        assert!(read_answered_with(&[hole(4096, 1024), hole(4096, 1)]).is_err());
    }
}
