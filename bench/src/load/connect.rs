//! Where the server is, and the way to a negotiated connection.

use std::fmt;
use std::io::IoSlice;

use anyhow::{Context, Result, bail, ensure};
use sheave_proto::uri::NbdUri;
use sheave_proto::wire::command;
use sheave_proto::{
    Client, ClientConfig as NbdConfig, ClientEvent, ClientHandshake, ClientNegotiated, ClientNext,
    Goal, ReplyStyle, Request,
};
use sheave_tls::{ClientTls, client_tls};

use super::stream::{SILENCE_MAX, Stream, Wait};
use crate::process::ProcessTree;

/// Bytes of a handshake taken at once.
const HANDSHAKE_RECEIVE_SIZE: usize = 16 << 10;

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
    /// When there is no answer, or not one of an NBD server.
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

    /// The transmission phase, with so many requests in flight at most.
    pub(crate) fn client<T>(&self, in_flight_max: usize) -> Client<T> {
        Client::new(&self.negotiated, in_flight_max)
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
        self.negotiated.volume_info().can.flush
    }

    /// The server refuses writes.
    pub(crate) fn is_read_only(&self) -> bool {
        self.negotiated.volume_info().read_only
    }

    /// All connections see the same data.
    pub(crate) fn is_multi_conn(&self) -> bool {
        self.negotiated.volume_info().can.multi_conn
    }

    /// Reads the first `len` bytes of the volume, and waits for them.
    ///
    /// # Errors
    /// When the connection fails, or the server answers with an error.
    pub(crate) fn read_once(&mut self, len: u32) -> Result<()> {
        let mut client = self.client(1);
        let request =
            Request { length: u64::from(len), command: command::READ, ..Request::default() };
        let mut header = Vec::new();
        client.submit_request(request, (), &mut header).expect("room for the first request");
        send_all(&mut self.stream, &header)?;
        let (mut buf, mut input) = ([0; HANDSHAKE_RECEIVE_SIZE], Vec::new());
        loop {
            let (consumed, event) = client.step(&input)?;
            match event {
                ClientEvent::Done { outcome, .. } => return outcome.map(drop).context("read"),
                ClientEvent::NeedMore(_) => {
                    input.drain(..consumed);
                    let count = self.stream.receive(&mut buf, Wait::Sleep)?;
                    ensure!(count > 0, "the server closed the connection");
                    input.extend_from_slice(&buf[..count]);
                }
                _ => drop(input.drain(..consumed)),
            }
        }
    }

    /// Says good-bye and closes the connection.
    ///
    /// # Errors
    /// When the server has gone before.
    pub(crate) fn disconnect(mut self) -> Result<()> {
        let mut header = Vec::new();
        self.client::<()>(1).disconnect(&mut header);
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
