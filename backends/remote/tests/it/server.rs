//! A server that dies on purpose: at any request, before or after it was carried out or in the
//! middle of its answer. What was not flushed is lost then, all of it or any part.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use sheave_core::{BlockSizes, Capabilities, NbdErrno, VolumeInfo};
use sheave_proto::wire::command;
use sheave_proto::{
    Export, HandshakeLimits, MetaContext, Negotiated, Next, ReplyTo, Request, ServerHandshake,
    StatusQuery, TlsMode, Verdict, reply,
};
use tempfile::TempDir;

/// What a server is and does.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) size: u64,
    pub(crate) info: VolumeInfo,
    /// It dies with one in so many requests; 0 is never.
    pub(crate) dies_one_in: u64,
    pub(crate) seed: u64,
    /// After so many bytes of a handshake it closes the connection, or says nothing more.
    pub(crate) handshake_len: Option<usize>,
    pub(crate) is_silent_then: bool,
}

impl Script {
    pub(crate) fn new(size: u64) -> Self {
        let can = Capabilities { multi_conn: false, ..Capabilities::ALL };
        let info = VolumeInfo {
            block: BlockSizes::default(),
            read_only: false,
            rotational: false,
            volatile: false,
            identity: None,
            can,
        };
        let (handshake_len, is_silent_then) = (None, false);
        Self { size, info, dies_one_in: 0, seed: 1, handshake_len, is_silent_then }
    }
}

/// A running server. Its thread ends with the process.
pub(crate) struct Server {
    pub(crate) socket: PathBuf,
    pub(crate) life: Arc<Mutex<Life>>,
    _dir: TempDir,
}

/// The server's state, of which each life has the disk and nothing else of the one before.
pub(crate) struct Life {
    pub(crate) script: Script,
    /// Counts the deaths.
    pub(crate) deaths: u64,
    /// The end of a connection that its server survived.
    pub(crate) cuts: u64,
    stable: Vec<u8>,
    now: Vec<u8>,
    /// What was written since the last flush.
    unflushed: Vec<Unflushed>,
    open: Vec<UnixStream>,
    random: u64,
    /// Connections are refused.
    pub(crate) is_away: bool,
    /// So many requests get no answer.
    pub(crate) mute: u32,
    pub(crate) refuses_writes: bool,
    pub(crate) refuses_trims: bool,
    pub(crate) flush_fails_once: bool,
    /// Whether the next write waits before it is carried out, and what has become of it.
    pub(crate) hold: Hold,
    /// How the next read is answered wrongly.
    pub(crate) garbage: Option<&'static str>,
    /// The requests that it dies of, before it has carried them out.
    pub(crate) poison: Option<fn(&Request) -> bool>,
    /// What a client did that it must not do.
    pub(crate) wrong: Option<String>,
}

/// What becomes of a write that waits in the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    None,
    Next,
    Held,
    Released,
}

struct Unflushed {
    at: usize,
    bytes: Vec<u8>,
    fua: bool,
}

/// What happens with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Served,
    /// Dies before it is carried out.
    DiesBefore,
    /// Dies when it was carried out and not answered.
    DiesAfter,
    /// Dies when so much of the answer was sent.
    DiesWithin,
    /// Only the connection ends, when the request was carried out and not answered.
    Cut,
    /// Refused because the server is about to end, which it then does.
    ShutsDown,
}

impl Server {
    pub(crate) fn start(script: Script) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let disk = vec![0; script.size as usize];
        let random = script.seed | 1;
        let life = Life {
            script,
            deaths: 0,
            cuts: 0,
            stable: disk.clone(),
            now: disk,
            unflushed: Vec::new(),
            open: Vec::new(),
            random,
            is_away: false,
            mute: 0,
            refuses_writes: false,
            refuses_trims: false,
            flush_fails_once: false,
            hold: Hold::None,
            garbage: None,
            poison: None,
            wrong: None,
        };
        let life = Arc::new(Mutex::new(life));
        let lives = Arc::clone(&life);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, life) = (stream.unwrap(), Arc::clone(&lives));
                thread::spawn(move || {
                    // An error is the end of the connection, which the other side has to bear.
                    let _ = Connection::serve(stream, &life);
                });
            }
        });
        Self { socket, life, _dir: dir }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Life> {
        lock(&self.life)
    }
}

fn lock(life: &Mutex<Life>) -> MutexGuard<'_, Life> {
    life.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Life {
    /// Marsaglia's xorshift64.
    fn below(&mut self, count: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 8) % count
    }

    /// Ends all connections. Of what was not flushed nothing, something or all is left.
    pub(crate) fn die(&mut self) {
        self.deaths += 1;
        let mut disk = self.stable.clone();
        let kept_of_4 = self.below(5);
        for Unflushed { at, bytes, fua } in std::mem::take(&mut self.unflushed) {
            if self.below(4) < kept_of_4 || fua {
                disk[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        self.stable.clone_from(&disk);
        self.now = disk;
        self.cut_all();
    }

    /// Ends all connections.
    pub(crate) fn cut_all(&mut self) {
        for stream in self.open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Dies, and refuses connections until `is_away` is cleared.
    pub(crate) fn go_away(&mut self) {
        self.is_away = true;
        self.die();
    }

    /// Connections made from now on have this size in bytes.
    pub(crate) fn grow(&mut self, size: u64) {
        self.script.size = size;
        self.now.resize(size as usize, 0);
        self.stable.resize(size as usize, 0);
    }

    fn put(&mut self, at: usize, bytes: Vec<u8>, fua: bool) {
        self.now[at..at + bytes.len()].copy_from_slice(&bytes);
        self.unflushed.push(Unflushed { at, bytes, fua });
    }

    fn fate(&mut self) -> Fate {
        let odds = self.script.dies_one_in;
        if odds == 0 || self.below(odds) > 0 {
            return Fate::Served;
        }
        let fates = [
            Fate::DiesBefore,
            Fate::DiesAfter,
            Fate::DiesWithin,
            Fate::Cut,
            Fate::ShutsDown,
            Fate::DiesBefore,
        ];
        fates[self.below(fates.len() as u64) as usize]
    }
}

struct Connection<'a> {
    stream: UnixStream,
    life: &'a Mutex<Life>,
    /// The life that it belongs to.
    deaths: u64,
    cuts: u64,
    negotiated: Negotiated,
}

impl<'a> Connection<'a> {
    fn serve(mut stream: UnixStream, life: &'a Mutex<Life>) -> io::Result<()> {
        let (deaths, cuts, script) = {
            let mut life = lock(life);
            if life.is_away {
                return Ok(());
            }
            life.open.push(stream.try_clone()?);
            (life.deaths, life.cuts, life.script.clone())
        };
        let negotiated = shake_hands(&mut stream, script).inspect_err(|_| {
            // There is another handle of it.
            let _ = stream.shutdown(Shutdown::Both);
        })?;
        Self { stream, life, deaths, cuts, negotiated }.run()
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            // Some at once, to be carried out in another order than they came in.
            let mut batch = vec![self.request()?];
            let count = lock(self.life).below(6);
            self.stream.set_nonblocking(true)?;
            for _ in 0..count {
                let mut byte = [0];
                let peeked =
                    rustix::net::recv(&self.stream, &mut byte[..], rustix::net::RecvFlags::PEEK);
                if !matches!(peeked, Ok((1, _))) {
                    break;
                }
                self.stream.set_nonblocking(false)?;
                batch.push(self.request()?);
                self.stream.set_nonblocking(true)?;
            }
            self.stream.set_nonblocking(false)?;
            if let Some(wrong) = overlap(&batch) {
                lock(self.life).wrong = Some(wrong);
            }
            while !batch.is_empty() {
                let index = lock(self.life).below(batch.len() as u64) as usize;
                let (request, payload) = batch.swap_remove(index);
                self.answer(&request, payload)?;
            }
        }
    }

    fn request(&mut self) -> io::Result<(Request, Vec<u8>)> {
        let style = self.negotiated.style;
        let mut header = vec![0; Request::header_len(style)];
        self.stream.read_exact(&mut header)?;
        let request = Request::decode(style, &header).map_err(io::Error::other)?;
        let mut payload = vec![0; request.payload_len(style) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok((request, payload))
    }

    fn answer(&mut self, request: &Request, payload: Vec<u8>) -> io::Result<()> {
        let ended = || io::Error::other("the server has died");
        // Nothing of an old life is carried out in a new one.
        let mut life = lock(self.life);
        if (life.deaths, life.cuts) != (self.deaths, self.cuts) {
            return Err(ended());
        }
        let is_held = request.command == command::WRITE && life.hold == Hold::Next;
        if is_held {
            life.hold = Hold::Held;
            while life.hold == Hold::Held {
                drop(life);
                thread::sleep(Duration::from_millis(1));
                life = lock(self.life);
            }
        }
        if life.mute > 0 {
            life.mute -= 1;
            return Ok(());
        }
        let fate = match life.poison {
            Some(is_poison) if is_poison(request) => Fate::DiesBefore,
            _ => life.fate(),
        };
        if fate == Fate::DiesBefore {
            life.die();
            return Err(ended());
        }
        let to = ReplyTo::new(self.negotiated.style, request);
        let mut out = Vec::new();
        if fate == Fate::ShutsDown {
            reply::failure(&mut out, to, NbdErrno::Shutdown, "going away");
            let _ = self.stream.write_all(&out);
            life.die();
            return Err(ended());
        }
        self.carry_out(&mut life, request, payload, to, &mut out);
        if is_held {
            life.hold = Hold::None;
        }
        match life.garbage.take_if(|_| request.command == command::READ) {
            Some("wrong") => out[0] ^= 0xff,
            // The server lives, and so do its other connections.
            Some("cut") => return self.stream.shutdown(Shutdown::Both),
            Some("twice") => out = [&out[..], &out[..]].concat(),
            // More bytes than were asked for.
            Some(_) => {
                out.clear();
                let len = request.length as u32 + 512;
                reply::data_chunk(&mut out, to, request.offset, len, true);
                out.resize(out.len() + len as usize, 7);
            }
            None => {}
        }
        match fate {
            Fate::Served => {}
            Fate::Cut => {
                life.cuts += 1;
                life.cut_all();
                return Err(ended());
            }
            _ => {
                let len = if fate == Fate::DiesWithin { out.len() / 2 } else { 0 };
                let _ = self.stream.write_all(&out[..len]);
                life.die();
                return Err(ended());
            }
        }
        drop(life);
        self.stream.write_all(&out)
    }

    fn carry_out(
        &self,
        life: &mut Life,
        request: &Request,
        payload: Vec<u8>,
        to: ReplyTo,
        out: &mut Vec<u8>,
    ) {
        match self.negotiated.check(request) {
            Verdict::Read { range, .. } => {
                let bytes = &life.now[range.start() as usize..range.end() as usize];
                reply::data_chunk(out, to, range.start(), range.len() as u32, true);
                out.extend_from_slice(bytes);
                return;
            }
            Verdict::Write { .. } if life.refuses_writes => {
                return reply::failure(out, to, NbdErrno::NoSpc, "full");
            }
            Verdict::Trim { .. } if life.refuses_trims => {
                return reply::failure(out, to, NbdErrno::NotSup, "no");
            }
            Verdict::Write { range, fua } => life.put(range.start() as usize, payload, fua),
            Verdict::Flush if std::mem::take(&mut life.flush_fails_once) => {
                return reply::failure(out, to, NbdErrno::Io, "write-back failed");
            }
            Verdict::Flush => {
                life.stable = life.now.clone();
                life.unflushed.clear();
            }
            Verdict::Trim { range, fua } | Verdict::WriteZeroes { range, fua, .. } => {
                life.put(range.start() as usize, vec![0; range.len() as usize], fua);
            }
            Verdict::BlockStatus { .. } => {
                let context = MetaContext::BaseAllocation;
                let range = sheave_core::ByteRange::within(
                    request.offset,
                    request.length,
                    life.script.size,
                )
                .unwrap();
                let query = StatusQuery { range, req_one: false };
                reply::block_status_chunk(out, to, context, &[], query, true);
                return;
            }
            Verdict::Cache { .. } | Verdict::Done => {}
            Verdict::Refuse { error, message, .. } => {
                reply::failure(out, to, error, message);
                return;
            }
            other => panic!("{other:?}"),
        }
        reply::success(out, to);
    }
}

/// Negotiates, as far as the script lets it.
fn shake_hands(stream: &mut UnixStream, script: Script) -> io::Result<Negotiated> {
    let Script { size, info, handshake_len, is_silent_then, .. } = script;
    let (name, description) = ("disk".to_owned(), String::new());
    let exports = vec![Export { name, description, size, info, tls_only: false }];
    let mut left = handshake_len.unwrap_or(usize::MAX);
    let mut send = |stream: &mut UnixStream, bytes: &[u8]| {
        stream.write_all(&bytes[..bytes.len().min(left)])?;
        if left < bytes.len() {
            if is_silent_then {
                // Until the client has had enough.
                let _ = stream.read_to_end(&mut Vec::new());
            }
            return Err(io::Error::other("no more of the handshake"));
        }
        left -= bytes.len();
        Ok(())
    };
    send(stream, &ServerHandshake::greeting())?;
    let mut handshake = ServerHandshake::new(TlsMode::Off, HandshakeLimits::default());
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        let step = handshake.step(&byte, &exports);
        send(stream, &step.output)?;
        match step.next {
            Next::NeedMore => {}
            Next::Transmission(negotiated) => return Ok(*negotiated),
            other => return Err(io::Error::other(format!("{other:?}"))),
        }
    }
}

/// Two writes to the same bytes that were sent without waiting for the first.
fn overlap(batch: &[(Request, Vec<u8>)]) -> Option<String> {
    let is_write = |request: &&Request| {
        matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES)
    };
    let writes: Vec<_> = batch.iter().map(|(request, _)| request).filter(is_write).collect();
    writes.iter().enumerate().find_map(|(index, one)| {
        let overlaps = |other: &&&Request| {
            one.offset < other.offset + other.length && other.offset < one.offset + one.length
        };
        let other = writes[index + 1..].iter().find(overlaps)?;
        Some(format!("{one:?} and {other:?}"))
    })
}
