//! Other people's servers, and a blocking client to talk to them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sheave_core::{Extent, NbdErrno};
use sheave_proto::wire::{command, command_flag, transmission_flag as flag};
use sheave_proto::{
    Answer, Client, ClientConfig, ClientError, ClientEvent, ClientHandshake, ClientNegotiated,
    ClientNext, Cookie, Request,
};

const DEADLINE: Duration = Duration::from_secs(120);
pub(crate) const SIZE: u64 = 16 << 20;

/// A directory of our own, removed at the end.
pub(crate) struct TempDir(pub(crate) PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("sheave-proto-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running server with a unix socket.
pub(crate) struct Server {
    child: Child,
    dir: TempDir,
}

impl Server {
    pub(crate) fn start(dir: TempDir, program: &str, args: &[OsString]) -> Self {
        let spawned = Command::new(program).args(args).stdin(Stdio::null()).spawn();
        let child = spawned.unwrap_or_else(|error| panic!("{program}: {error}"));
        Self { child, dir }
    }

    /// nbdkit with options, then a plugin and its parameters.
    pub(crate) fn nbdkit(args: &[&str]) -> Self {
        let dir = TempDir::new();
        let mut all = vec!["-f".into(), "-U".into(), dir.file("socket").into()];
        all.extend(args.iter().map(OsString::from));
        Self::start(dir, "nbdkit", &all)
    }

    pub(crate) fn nbdkit_memory(args: &[&str]) -> Self {
        let size = SIZE.to_string();
        Self::nbdkit(&[args, &["memory", &size]].concat())
    }

    /// Connects as soon as the server listens. Nothing else probes for that, since one of the
    /// servers ends after its first connection.
    fn stream(&mut self) -> UnixStream {
        let start = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(self.dir.file("socket")) {
                stream.set_read_timeout(Some(DEADLINE)).unwrap();
                return stream;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the server has ended");
            assert!(start.elapsed() < DEADLINE, "the server does not listen");
            sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn shake_hands(
        &mut self,
        config: ClientConfig,
    ) -> Result<(UnixStream, ClientNext), ClientError> {
        shake_hands(self.stream(), config)
    }

    pub(crate) fn connect(&mut self, config: ClientConfig) -> Peer {
        match self.shake_hands(config) {
            Ok((stream, ClientNext::Ready(negotiated))) => {
                let client = Client::new(&negotiated, 64);
                Peer { stream, negotiated: *negotiated, client, input: Vec::new() }
            }
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn shake_hands(
    mut stream: UnixStream,
    config: ClientConfig,
) -> Result<(UnixStream, ClientNext), ClientError> {
    let mut handshake = ClientHandshake::new(config)?;
    let mut input = [0; 4096];
    loop {
        let len = stream.read(&mut input).unwrap();
        if len == 0 {
            return Err(handshake.closed());
        }
        let mut rest = &input[..len];
        while !rest.is_empty() {
            let step = handshake.step(rest);
            rest = &rest[step.consumed..];
            // A server that has refused may be gone already.
            let sent = stream.write_all(&step.output);
            match step.next {
                ClientNext::NeedMore => sent.unwrap(),
                ClientNext::Failed(error) => return Err(error),
                next => {
                    assert!(rest.is_empty(), "servers do not speak first");
                    return Ok((stream, next));
                }
            }
        }
    }
}

/// A connection in transmission, with any number of requests in flight.
pub(crate) struct Peer {
    stream: UnixStream,
    pub(crate) negotiated: ClientNegotiated,
    client: Client<Reply>,
    input: Vec<u8>,
}

/// All of the reply to one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Reply {
    pub(crate) data: Vec<u8>,
    pub(crate) holes: usize,
    pub(crate) extents: Vec<Extent>,
    pub(crate) error: Option<NbdErrno>,
}

impl Peer {
    pub(crate) fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> Cookie {
        let request = Request { cookie: 0, flags, command, offset, length };
        let mut reply = Reply::default();
        if command == command::READ {
            reply.data = vec![0xee; usize::try_from(length).unwrap()];
        }
        let mut wire = Vec::new();
        let cookie = self.client.submit_request(request, reply, &mut wire).unwrap();
        wire.extend(data);
        self.stream.write_all(&wire).unwrap();
        cookie
    }

    fn receive_more(&mut self, len: usize) {
        let mut buffer = vec![0; 1 << 16];
        while self.input.len() < len {
            let got = self.stream.read(&mut buffer).unwrap();
            assert_ne!(got, 0, "the server hung up");
            self.input.extend(&buffer[..got]);
        }
    }

    /// The next reply that ends.
    fn receive(&mut self) -> (Cookie, Reply) {
        loop {
            let (consumed, event) = self.client.step(&self.input).unwrap();
            let mut needed = 0;
            match event {
                ClientEvent::NeedMore(len) => needed = len,
                ClientEvent::Data { state, at, bytes, .. } => {
                    state.data[at..at + bytes.len()].copy_from_slice(bytes);
                }
                ClientEvent::Zeroes { state, at, len, .. } => {
                    state.data[at..at + len].fill(0);
                    state.holes += 1;
                }
                ClientEvent::Done { cookie, state: mut reply, outcome } => {
                    self.input.drain(..consumed);
                    match outcome {
                        Ok(Answer::Done) => {}
                        Ok(Answer::Extents(extents)) => reply.extents = extents,
                        Err(error) => reply.error = Some(error.errno),
                    }
                    return (cookie, reply);
                }
            }
            self.input.drain(..consumed);
            self.receive_more(needed);
        }
    }

    pub(crate) fn call(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> Reply {
        let sent = self.send(command, flags, offset, length, data);
        let (cookie, reply) = self.receive();
        assert_eq!(cookie, sent);
        reply
    }

    pub(crate) fn ok(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> Reply {
        let reply = self.call(command, flags, offset, length, data);
        assert_eq!(reply.error, None, "command {command}");
        reply
    }

    pub(crate) fn has(&self, flags: u16) -> bool {
        self.negotiated.has(flags)
    }

    /// Disconnects; the server closes the connection.
    pub(crate) fn disconnect(mut self) {
        let mut wire = Vec::new();
        self.client.disconnect(&mut wire);
        self.stream.write_all(&wire).unwrap();
        assert_eq!(self.stream.read(&mut [0; 64]).unwrap(), 0);
    }

    /// Uses all features of the server, and checks their effects.
    pub(crate) fn exercise(mut self) {
        let block = u64::from(self.negotiated.block.preferred.max(4096));
        let pattern: Vec<u8> = (0..4 * block).map(|i| (i % 251) as u8).collect();
        let len = pattern.len() as u64;
        let at = 2 * block;
        self.ok(command::WRITE, 0, at, len, &pattern);
        assert_eq!(self.ok(command::READ, 0, at, len, &[]).data, pattern);
        if self.has(flag::SEND_DF) {
            let whole = self.ok(command::READ, command_flag::DF, at, 65536, &[]);
            let common = pattern.len().min(65536);
            assert_eq!(whole.data[..common], pattern[..common]);
        }
        if self.has(flag::SEND_FLUSH) {
            self.ok(command::FLUSH, 0, 0, 0, &[]);
        }
        if self.has(flag::SEND_CACHE) {
            self.ok(command::CACHE, 0, at, len, &[]);
        }
        if self.has(flag::SEND_FUA) {
            self.ok(command::WRITE, command_flag::FUA, at, len, &pattern);
        }
        if self.has(flag::SEND_WRITE_ZEROES) {
            self.ok(command::WRITE_ZEROES, command_flag::NO_HOLE, at, block, &[]);
            assert_eq!(
                self.ok(command::READ, 0, at, block, &[]).data,
                vec![0; 4096.max(block as usize)]
            );
        }
        if self.has(flag::SEND_TRIM) {
            self.ok(command::TRIM, 0, at, len, &[]);
        }
        if self.negotiated.context("base:allocation").is_some() {
            let reply = self.ok(command::BLOCK_STATUS, 0, 0, SIZE, &[]);
            assert!(reply.extents.iter().map(|extent| extent.len).sum::<u64>() <= SIZE);
            let flags = command_flag::REQ_ONE;
            let one = self.ok(command::BLOCK_STATUS, flags, at, block, &[]);
            assert_eq!(one.extents.len(), 1);
        }
        self.pipeline();
        let past_end = self.call(command::READ, 0, SIZE, block, &[]);
        assert_eq!(past_end.error, Some(NbdErrno::Inval));
        self.ok(command::READ, 0, 0, block, &[]);
        self.disconnect();
    }

    /// Many requests at once, replies in any order.
    fn pipeline(&mut self) {
        let offset = |index: u8| (1 << 20) + u64::from(index) * 4096;
        for index in 0..64 {
            self.send(command::WRITE, 0, offset(index), 4096, &[index + 1; 4096]);
        }
        for _ in 0..64 {
            assert_eq!(self.receive().1.error, None);
        }
        let sent =
            (0..64).map(|index| (self.send(command::READ, 0, offset(index), 4096, &[]), index));
        let mut sent = sent.collect::<HashMap<_, _>>();
        while !sent.is_empty() {
            let (cookie, reply) = self.receive();
            let index = sent.remove(&cookie).unwrap();
            assert_eq!((reply.error, reply.data), (None, vec![index + 1; 4096]));
        }
    }
}
