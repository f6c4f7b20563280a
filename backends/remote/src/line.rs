//! One connection: what is sent and received next. One backend drives it at a time.

use std::collections::VecDeque;
use std::io::ErrorKind as IoErrorKind;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{Shutdown, shutdown};
use rustls::ClientConnection;
use sheave_core::{Buf, Io, IoRequest, IoToken, Nanos, Payload, Result, memory};
use sheave_proto::Client;

use crate::connect::Connected;

/// Requests in flight on one connection.
pub(crate) const DEPTH: usize = 256;
/// Bytes received at once, unless they have a place of their own.
const INPUT_LEN: usize = 64 << 10;
/// The same where reads are long: the head of the next reply, and little of its data.
const SHORT_INPUT_LEN: usize = 4 << 10;
/// The most bytes that are encrypted for one send.
const SEALED_LEN_MAX: usize = 256 << 10;
/// What TLS adds to them: at most 22 bytes to each record of 16 KiB, and the answer to a change of
/// keys. What finds no room goes with the next send.
const SEAL_LEN: usize = 4 << 10;
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
    /// What is to be encrypted and sent next, from this byte on.
    plain: Option<(Payload, usize)>,
    /// Memory to encrypt from, in one piece.
    piece: Vec<u8>,
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
            plain: None,
            piece: Vec::new(),
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
        !self.queue.is_empty() || self.client.in_flight() > 0 || self.has_unsent()
    }

    fn has_unsent(&self) -> bool {
        self.unsent.is_some() || self.plain.is_some()
    }

    /// Whether the server owes answers, or is to get the rest of what has begun.
    pub(crate) fn is_owed(&self) -> bool {
        let is_owed = self.client.in_flight() > 0 || self.has_unsent() || self.is_sending;
        is_owed && !self.is_over
    }

    /// Requests that it has.
    pub(crate) fn load(&self) -> usize {
        self.queue.len() + self.client.in_flight()
    }

    /// Whether more may be gathered for sending.
    pub(crate) fn may_gather(&self) -> bool {
        !self.is_sending && !self.has_unsent() && self.client.has_room()
    }

    /// Ends it for both sides. Requests of an engine that are in flight end soon.
    pub(crate) fn shut_down(&self) {
        // So that a server over TCP does not read what is still on its way to it.
        let _ =
            rustix::net::sockopt::set_socket_linger(&self.socket, Some(std::time::Duration::ZERO));
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Has these bytes sent next.
    pub(crate) fn send(&mut self, payload: Payload) {
        debug_assert!(!self.has_unsent(), "one send at a time");
        let next = (!payload.is_empty()).then_some((payload, 0));
        match self.tls {
            None => self.unsent = next,
            Some(_) => self.plain = next,
        }
    }

    /// The next send, if one is due.
    ///
    /// # Errors
    /// When there is no memory to encrypt in; nothing has changed then.
    pub(crate) fn next_send(&mut self, io: &mut dyn Io) -> Result<Option<(IoRequest, IoToken)>> {
        if self.is_sending {
            return Ok(None);
        }
        if self.unsent.is_none() {
            self.encrypt(io)?;
        }
        let Some((from, skip)) = self.unsent.take() else { return Ok(None) };
        self.is_sending = true;
        let send = IoRequest::Send { socket: Arc::clone(&self.socket), from, skip };
        Ok(Some((send, token(self.number, Step::Send))))
    }

    /// Makes the next send of what is to be encrypted, and of what TLS itself has to say.
    fn encrypt(&mut self, io: &mut dyn Io) -> Result<()> {
        let Some(tls) = self.tls.as_deref_mut() else { return Ok(()) };
        let len = match &self.plain {
            Some((from, skip)) => (from.len() - skip).min(SEALED_LEN_MAX),
            None if tls.wants_write() => 0,
            None => return Ok(()),
        };
        // All memory that it takes, before anything goes into the stream: rustls has a copy, too.
        memory::attempt(|| self.piece.try_reserve_exact(len))?;
        memory::check_room(len + SEAL_LEN)?;
        let out = io.buffer(len + SEAL_LEN)?;
        if let Some((from, skip)) = &mut self.plain {
            self.piece.resize(len, 0);
            from.slice(*skip, len).copy_out(&mut self.piece);
            tls.writer().write_all(&self.piece).expect("writing to memory without a limit");
            self.piece.clear();
            *skip += len;
        }
        if let Some((from, _)) = self.plain.take_if(|(from, skip)| *skip == from.len()) {
            io.recycle(from);
        }
        let mut sealed = Sealed { out: &out, len: 0 };
        while tls.wants_write() && tls.write_tls(&mut sealed).is_ok_and(|count| count > 0) {}
        let sealed_len = sealed.len;
        self.unsent = (sealed_len > 0).then(|| (out.slice(0, sealed_len).into(), 0));
        Ok(())
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

/// A buffer that is being filled.
struct Sealed<'a> {
    out: &'a Buf,
    len: usize,
}

impl Write for Sealed<'_> {
    /// As much as there is room for; 0 when it is full.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = bytes.len().min(self.out.len() - self.len);
        self.out.copy_in(self.len, &bytes[..count]);
        self.len += count;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::process::Command;
    use std::task::Waker;

    use rustls::ServerConnection;
    use sheave_core::{BlockSizes, Destination, Error, ErrorKind};
    use sheave_proto::{ClientNegotiated, ReplyStyle};
    use sheave_tls::{TlsFiles, client_tls, server_tls};

    use super::*;

    /// Has memory for every other buffer, and for short ones only.
    struct Scarce {
        asked: usize,
    }

    impl Io for Scarce {
        fn now(&self) -> Nanos {
            1
        }

        fn buffer(&mut self, len: usize) -> Result<Buf> {
            assert!(len <= SEALED_LEN_MAX + SEAL_LEN, "{len} bytes at once");
            self.asked += 1;
            match self.asked % 2 {
                0 => Buf::try_zeroed(len),
                _ => Err(Error::new(ErrorKind::NoMemory, "buffer", "scarce")),
            }
        }

        fn waker(&self) -> Waker {
            Waker::noop().clone()
        }

        fn start(
            &mut self,
            request: IoRequest,
            _: IoToken,
            _: Destination,
        ) -> std::result::Result<(), IoRequest> {
            Err(request)
        }
    }

    fn make_certificate(dir: &Path) {
        let made = Command::new("openssl")
            .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2".split(' '))
            .args("-keyout key.pem -out ca-cert.pem -subj /CN=server".split(' '))
            .args(["-addext", "subjectAltName=DNS:localhost"])
            .args(["-addext", "basicConstraints=critical,CA:false"])
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
    }

    /// Both sides of an encrypted connection.
    fn pair() -> (ClientConnection, ServerConnection) {
        let dir = tempfile::tempdir().unwrap();
        make_certificate(dir.path());
        let file = |name| dir.path().join(name);
        let (cert, key) = (file("ca-cert.pem"), file("key.pem"));
        let files = TlsFiles { cert, key, client_ca: None, client_crl: None };
        let mut server = ServerConnection::new(server_tls(&files).unwrap()).unwrap();
        let uri = format!("nbds://localhost/?tls-certificates={}", dir.path().display());
        let tls = client_tls(&uri.parse().unwrap()).unwrap();
        let mut client = ClientConnection::new(tls.config, tls.server).unwrap();
        client.set_buffer_limit(None);
        while client.is_handshaking() || server.is_handshaking() || server.wants_write() {
            let (mut there, mut back) = (Vec::new(), Vec::new());
            client.write_tls(&mut there).unwrap();
            take(&mut server, &there);
            server.write_tls(&mut back).unwrap();
            let mut back = &back[..];
            while !back.is_empty() {
                client.read_tls(&mut back).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        (client, server)
    }

    /// Decrypts.
    fn take(server: &mut ServerConnection, mut bytes: &[u8]) -> Vec<u8> {
        let mut plain = Vec::new();
        while !bytes.is_empty() {
            server.read_tls(&mut bytes).unwrap();
            server.process_new_packets().unwrap();
            while let Ok(run @ [_, ..]) = server.reader().fill_buf() {
                let count = run.len();
                plain.extend_from_slice(run);
                server.reader().consume(count);
            }
        }
        plain
    }

    #[test]
    fn long_sends_are_encrypted_in_pieces_and_a_shortage_of_memory_costs_nothing() {
        let (client, mut server) = pair();
        let negotiated = ClientNegotiated {
            style: ReplyStyle::Simple,
            size: 0,
            transmission_flags: 1,
            block: BlockSizes::default(),
            block_sizes_told: false,
            contexts: Vec::new(),
            name: None,
            description: None,
            tls: true,
        };
        let socket = UnixStream::pair().unwrap().0.into();
        let tls = Some(Box::new(client));
        let mut line = Line::new(1, Connected { socket, tls, negotiated, input: Vec::new() });
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
        let mut io = Scarce { asked: 0 };
        line.send(Buf::from_bytes(&bytes).into());
        let (mut plain, mut shortages) = (Vec::new(), 0);
        while line.has_work() {
            assert!(!line.may_gather() && line.is_owed());
            match line.next_send(&mut io) {
                Ok(Some((IoRequest::Send { from, skip, .. }, _))) => {
                    assert!(line.next_send(&mut io).unwrap().is_none(), "one at a time");
                    plain.extend(take(&mut server, &from.slice(skip, from.len() - skip).to_vec()));
                    let len = from.len();
                    line.sent(from, len, &mut io);
                }
                Err(_) => shortages += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(shortages > 5 && plain == bytes, "{shortages} shortages");
    }
}
