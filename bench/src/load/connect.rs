//! Where the server is, and the way to a negotiated connection.

use std::fmt;
use std::io::IoSlice;

use anyhow::{Context, Result, bail, ensure};
use sheave_proto::uri::NbdUri;
use sheave_proto::wire::{command, header_len, transmission_flag as flag};
use sheave_proto::{
    ClientConfig as NbdConfig, ClientHandshake, ClientNegotiated, ClientNext, Decoded, Goal,
    ReplyBody, ReplyDecoder, ReplyStyle, Request,
};
use sheave_tls::{ClientTls, client_tls};

use super::stream::{SILENCE_MAX, Stream, Wait};
use crate::process::ProcessTree;

/// Bytes of a handshake taken at once.
const HANDSHAKE_RECEIVE_SIZE: usize = 16 << 10;

/// A request of which there is only one at a time.
const COOKIE_1: Request = Request { cookie: 1, flags: 0, command: 0, offset: 0, length: 0 };

/// A server and an export of it.
#[derive(Clone)]
pub(crate) struct Target {
    uri: NbdUri,
    style: ReplyStyle,
    tls: Option<ClientTls>,
}

/// A negotiated connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
    negotiated: ClientNegotiated,
}

impl Target {
    /// The target that a URL names. `style` is the best style of replies to ask for.
    ///
    /// # Errors
    /// When it is not one, or its certificates cannot be read.
    pub(crate) fn parse(url: &str, style: ReplyStyle) -> Result<Self> {
        let uri: NbdUri = url.parse().with_context(|| format!("{url} is no NBD URL"))?;
        if let Some(unknown) = uri.unknown_parameters().next() {
            bail!("{url} has an unknown parameter: {unknown}");
        }
        let tls = uri.tls.then(|| client_tls(&uri)).transpose()?;
        Ok(Self { uri, style, tls })
    }

    /// Connects and negotiates.
    ///
    /// # Errors
    /// When nobody answers, or not as an NBD server does.
    pub(crate) fn connect(&self) -> Result<Connection> {
        self.negotiate().with_context(|| format!("connect to {self}"))
    }

    fn negotiate(&self) -> Result<Connection> {
        let mut stream = Stream::new(sheave_tls::connect(&self.uri.transport, SILENCE_MAX)?)?;
        let config = NbdConfig {
            export: self.uri.export.clone(),
            goal: Goal::Go,
            style: self.style,
            contexts: Vec::new(),
            block_sizes: true,
            tls: self.tls.is_some(),
        };
        let mut handshake = ClientHandshake::new(config)?;
        let mut input = vec![0; HANDSHAKE_RECEIVE_SIZE];
        loop {
            let count = stream.receive(&mut input, Wait::Sleep)?;
            if count == 0 {
                return Err(handshake.closed().into());
            }
            let mut rest = &input[..count];
            while !rest.is_empty() {
                let step = handshake.step(rest);
                rest = &rest[step.consumed..];
                send_all(&mut stream, &step.output)?;
                match step.next {
                    ClientNext::NeedMore => {}
                    ClientNext::StartTls => {
                        let tls = self.tls.clone().context("TLS was not asked for")?;
                        stream.start_tls(tls).context("TLS handshake")?;
                        send_all(&mut stream, &handshake.tls_started())?;
                    }
                    ClientNext::Ready(negotiated) => {
                        return Ok(Connection { stream, negotiated: *negotiated });
                    }
                    ClientNext::Failed(error) => return Err(error.into()),
                    ClientNext::Info(_) | ClientNext::Listed(_) => bail!("not asked for"),
                }
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({})", self.uri)
    }
}

impl Connection {
    /// The process that listens, which only unix sockets tell.
    pub(crate) fn server(&self) -> Option<ProcessTree> {
        let peer = rustix::net::sockopt::socket_peercred(self.stream.fd()).ok()?;
        Some(ProcessTree::new(peer.pid.as_raw_nonzero().get().unsigned_abs()))
    }

    /// How requests and replies look.
    pub(crate) fn style(&self) -> ReplyStyle {
        self.negotiated.style
    }

    /// Size of the export in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.negotiated.size
    }

    /// The longest read or write in bytes.
    pub(crate) fn payload_max(&self) -> usize {
        usize::try_from(self.negotiated.block.maximum_payload).unwrap_or(usize::MAX)
    }

    /// The server has flushes.
    pub(crate) fn can_flush(&self) -> bool {
        self.negotiated.has(flag::SEND_FLUSH)
    }

    /// The server refuses writes.
    pub(crate) fn is_read_only(&self) -> bool {
        self.negotiated.has(flag::READ_ONLY)
    }

    /// All connections see the same data.
    pub(crate) fn is_multi_conn(&self) -> bool {
        self.negotiated.has(flag::CAN_MULTI_CONN)
    }

    /// Reads the first `len` bytes of the volume, and waits for them.
    ///
    /// # Errors
    /// When the connection fails, or the server answers with an error.
    pub(crate) fn read_once(&mut self, len: u32) -> Result<()> {
        let request = Request { length: u64::from(len), command: command::READ, ..COOKIE_1 };
        self.send(&request)?;
        ensure!(self.negotiated.style == ReplyStyle::Simple, "needs simple replies");
        let mut reply = vec![0; header_len::SIMPLE_REPLY + len as usize];
        let mut received = 0;
        while received < reply.len() {
            let count = self.stream.receive(&mut reply[received..], Wait::Sleep)?;
            ensure!(count > 0, "the server closed the connection");
            received += count;
        }
        let decoded = ReplyDecoder::new(ReplyStyle::Simple)
            .decode(&reply, |cookie| (cookie == COOKIE_1.cookie).then_some(request))?;
        let Decoded::Event { event, .. } = decoded else { bail!("half a reply") };
        ensure!(matches!(event.body, ReplyBody::Data { .. }), "the read failed");
        Ok(())
    }

    /// Says good-bye and closes the connection.
    ///
    /// # Errors
    /// When the server has gone before.
    pub(crate) fn disconnect(mut self) -> Result<()> {
        self.send(&Request { command: command::DISC, ..COOKIE_1 })
    }

    fn send(&mut self, request: &Request) -> Result<()> {
        let mut header = Vec::new();
        request.encode(self.negotiated.style, &mut header);
        send_all(&mut self.stream, &header)
    }

    /// The stream, at the start of the transmission phase.
    pub(crate) fn into_stream(self) -> Stream {
        self.stream
    }
}

fn send_all(stream: &mut Stream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let count = stream.send(&[IoSlice::new(bytes)], Wait::Sleep)?;
        bytes = &bytes[count..];
    }
    Ok(stream.flush(Wait::Sleep)?)
}
