//! A plain NBD client: one request at a time, waited for.

use std::io;
use std::time::Duration;

use sheave_core::{Buf, Error, ErrorKind, Op, Payload, Reply, VolumeInfo};
use sheave_proto::{
    Answer, Client, ClientConfig, ClientEvent, ClientNegotiated, ReplyError, uri::NbdUri,
};
use sheave_tls::ClientTls;

use crate::negotiate::{Reached, Stream, negotiate, receive};

/// A server that says nothing for so long is taken for dead.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A negotiated connection to a server.
pub(crate) struct Connection {
    /// The URI, for errors.
    server: String,
    stream: Box<dyn Stream>,
    client: Client<Buf>,
    /// Received and not looked at yet: `input[taken..]`.
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
    /// Why nothing can be said or heard any more: it is not known where the next reply begins.
    broken: Option<String>,
}

impl Connection {
    /// Connects and negotiates. A server that is silent for longer than `silence_max`, then or
    /// later, is an error.
    pub(crate) fn open(
        uri: &NbdUri,
        tls: Option<&ClientTls>,
        silence_max: Duration,
    ) -> Result<Self, Error> {
        let config =
            ClientConfig { export: uri.export.clone(), tls: uri.tls, ..ClientConfig::default() };
        let reached = negotiate(&uri.transport, config, tls, silence_max);
        match reached.map_err(|refused| refused.at(&uri.to_string()))? {
            Reached::Ready { stream, negotiated, input } => {
                Ok(Self::ready(uri.to_string(), stream, &negotiated, input))
            }
            Reached::Tls => {
                let why = format!("{uri}: there is no configuration for TLS");
                Err(Error::new(ErrorKind::Invalid, "connect", why))
            }
            Reached::Info { .. } | Reached::Listed(_) => unreachable!("the goal is transmission"),
        }
    }

    fn ready(
        server: String,
        stream: Box<dyn Stream>,
        negotiated: &ClientNegotiated,
        input: Vec<u8>,
    ) -> Self {
        let client = Client::new(negotiated, 1);
        Self { server, stream, client, input, taken: 0, output: Vec::new(), broken: None }
    }

    /// Size of the export in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.client.size()
    }

    /// What the export is and can do.
    pub(crate) fn info(&self) -> &VolumeInfo {
        self.client.info()
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
        let len = match op {
            Op::Read { range, .. } => {
                usize::try_from(range.len()).expect("a read fits into memory")
            }
            _ => 0,
        };
        self.output.clear();
        let submitted = self.client.submit(op, Buf::zeroed(len), &mut self.output);
        submitted.expect("one request at a time");
        if let Op::Write { data, .. } = op {
            let start = self.output.len();
            self.output.resize(start + data.len(), 0);
            data.copy_out(&mut self.output[start..]);
        }
        self.stream.write_all(&self.output).and_then(|()| self.stream.flush()).map_err(lost)?;
        self.answer(op)
    }

    /// Receives the reply, chunk by chunk.
    fn answer(&mut self, op: &Op) -> Result<Result<Reply, Error>, Error> {
        loop {
            let step = self.client.step(&self.input[self.taken..]);
            let (consumed, event) = step.map_err(violation)?;
            self.taken += consumed;
            match event {
                ClientEvent::NeedMore(_) => self.fill().map_err(lost)?,
                ClientEvent::Data { state, at, bytes, .. } => state.copy_in(at, bytes),
                ClientEvent::Zeroes { state, at, len, .. } => state.zero(at, len),
                ClientEvent::Done { state, outcome, .. } => {
                    return Ok(outcome.map_err(Error::from).map(|answer| match (answer, op) {
                        (Answer::Extents(extents), _) => Reply::Extents(extents),
                        (Answer::Done, Op::Read { .. }) => Reply::Data(Payload::from(state)),
                        (Answer::Done, _) => Reply::Done,
                    }));
                }
            }
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        self.input.drain(..self.taken);
        self.taken = 0;
        match receive(&mut *self.stream, &mut self.input)? {
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
        self.output.clear();
        self.client.disconnect(&mut self.output);
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
}
