//! Volumes whose backends send and receive on sockets of their own.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use sheave_core::{
    Backend, Buf, Completion, Destination, Io, IoDone, IoRequest, IoToken, Op, Payload, Reply,
    Result, Submitted, Tag, Volume, VolumeInfo,
};
use sheave_proto::ClientConfig;
use sheave_proto::wire::command;
use sheave_shard::Blocking;

use crate::support::{Client, Link, Running, Setup, TIMEOUT, both_engines, wait_until};

const RECV: IoToken = IoToken(1);
const SEND: IoToken = IoToken(2);
const WORD: usize = 8;

fn memory() -> Arc<dyn Volume> {
    sheave_volumes::open("memory:?size=1M", &sheave_volumes::OpenOptions::default()).unwrap()
}

fn to_export(server: &Running, export: &str) -> Client {
    let config = ClientConfig { export: export.to_owned(), ..ClientConfig::default() };
    Client::negotiate(Link::unix(&server.socket), config, None).unwrap()
}

/// A volume whose flushes go to a peer, which answers each word with a word.
struct Echoed {
    inner: Arc<dyn Volume>,
    peers: Mutex<Vec<UnixStream>>,
    /// The backends' sockets, to see whether a request holds one.
    receiving: Mutex<Vec<Weak<OwnedFd>>>,
    dropped: Arc<AtomicUsize>,
    /// Actions of the peer.
    peer: fn(UnixStream),
}

/// A backend that receives from its first op on.
struct EchoedBackend {
    inner: Box<dyn Backend>,
    socket: Arc<OwnedFd>,
    is_receiving: bool,
    flushes: VecDeque<Tag>,
    ended: VecDeque<Tag>,
    dropped: Arc<AtomicUsize>,
}

impl Echoed {
    fn new(peer: fn(UnixStream)) -> Arc<Self> {
        let (peers, receiving) = (Mutex::default(), Mutex::default());
        Arc::new(Self { inner: memory(), peers, receiving, dropped: Arc::default(), peer })
    }
}

impl Volume for Echoed {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn grow(&self) -> Result<u64> {
        self.inner.grow()
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(TIMEOUT)).unwrap();
        let (peer, peers_end) = (self.peer, theirs.try_clone().unwrap());
        std::thread::spawn(move || peer(peers_end));
        self.peers.lock().unwrap().push(theirs);
        let socket = Arc::new(OwnedFd::from(ours));
        self.receiving.lock().unwrap().push(Arc::downgrade(&socket));
        Ok(Box::new(EchoedBackend {
            inner: self.inner.backend()?,
            socket,
            is_receiving: false,
            flushes: VecDeque::new(),
            ended: VecDeque::new(),
            dropped: Arc::clone(&self.dropped),
        }))
    }
}

impl EchoedBackend {
    fn receive(&mut self, io: &mut dyn Io) {
        self.receive_from(Payload::from(Buf::zeroed(WORD)), 0, io);
    }

    fn receive_from(&mut self, into: Payload, skip: usize, io: &mut dyn Io) {
        self.is_receiving = true;
        let recv = IoRequest::Recv { socket: Arc::clone(&self.socket), into, skip, all: true };
        io.start(recv, RECV, Destination::Unknown).expect("room");
    }
}

impl Backend for EchoedBackend {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if !self.is_receiving {
            self.receive(io);
        }
        if !matches!(op, Op::Flush) {
            return self.inner.submit(op, tag, io);
        }
        self.flushes.push_back(tag);
        let (socket, from) = (Arc::clone(&self.socket), Payload::from(Buf::from_bytes(&[7; WORD])));
        let send = IoRequest::Send { socket, from, skip: 0 };
        io.start(send, SEND, Destination::Unknown).expect("room");
        Submitted::Queued
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        match (done.token, done.request) {
            (SEND, _) => assert_eq!(done.result.unwrap(), WORD),
            (RECV, IoRequest::Recv { into, skip, .. }) => {
                self.is_receiving = false;
                match done.result {
                    Ok(count) if skip + count < WORD => {
                        assert!(count > 0, "the peer stays");
                        return self.receive_from(into, skip + count, io);
                    }
                    Ok(count) => assert_eq!(skip + count, WORD),
                    // This thread drives no I/O until the next op.
                    Err(error) => {
                        let canceled = Errno::CANCELED.raw_os_error();
                        return assert_eq!(error.raw_os_error(), Some(canceled));
                    }
                }
                assert_eq!(into.to_vec(), [8; WORD]);
                self.ended.extend(self.flushes.pop_front());
                self.receive(io);
            }
            other => panic!("{other:?} was never started here"),
        }
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        let ended = self.ended.pop_front();
        ended
            .map(|tag| Completion { tag, outcome: Ok(Reply::Done) })
            .or_else(|| self.inner.reap(io))
    }
}

impl Drop for EchoedBackend {
    fn drop(&mut self) {
        shutdown(&self.socket, Shutdown::Both).unwrap();
        self.dropped.fetch_add(1, SeqCst);
    }
}

fn echo(mut peer: UnixStream) {
    let mut word = [0; WORD];
    while peer.read_exact(&mut word).is_ok() {
        assert_eq!(word, [7; WORD]);
        if peer.write_all(&[8; WORD]).is_err() {
            return;
        }
    }
}

/// The test answers by the other handle of the same socket.
fn silent(_: UnixStream) {}

both_engines! {
    fn a_volume_talks_to_its_peer(engine) {
        let server = Setup::of(engine, Echoed::new(echo)).start();
        let mut client = Client::new(&server);
        for _ in 0..50 {
            client.flush();
            assert_eq!(client.only_answer().error, None);
        }
        for _ in 0..50 {
            client.flush();
        }
        while client.in_flight() > 0 {
            assert_eq!(client.answer().unwrap().expect("a reply").error, None);
        }
        client.put(5, b"abc");
        assert_eq!(client.bytes(5, 3), b"abc");
    }

    fn a_peer_that_does_not_answer_holds_up_nothing_else(engine) {
        let volume = Echoed::new(silent);
        let mut setup = Setup::of(engine, volume.clone()).and("other", memory());
        setup.shards = 1;
        let server = setup.start();
        let (mut client, mut other) = (to_export(&server, "disk"), to_export(&server, "other"));
        client.flush();
        client.link.turn(Duration::from_millis(1)).unwrap();
        // Of the same connection, and of another one of the thread.
        client.ask(command::READ, 0, 0, 4096);
        let answer = client.answer().unwrap().expect("a reply");
        assert_eq!(answer.request.command, command::READ);
        other.put(0, b"abc");
        assert_eq!(other.bytes(0, 3), b"abc");
        let mut peer = volume.peers.lock().unwrap().pop().unwrap();
        let mut word = [0; WORD];
        peer.read_exact(&mut word).unwrap();
        // In two parts; the first is incomplete.
        peer.write_all(&[8; 3]).unwrap();
        other.put(0, b"def");
        peer.write_all(&[8; 5]).unwrap();
        assert_eq!(client.only_answer().error, None);
    }

    fn what_is_in_flight_for_a_volume_that_is_gone_ends_and_reaches_no_other(engine) {
        let volume = Echoed::new(silent);
        let mut setup = Setup::of(engine, volume.clone()).and("other", memory());
        setup.shards = 1;
        let server = setup.start();
        for round in 0..20 {
            // A read makes it receive, for ever.
            let mut client = to_export(&server, "disk");
            client.bytes(0, 512);
            drop(client);
            wait_until("the backend is gone", || volume.dropped.load(SeqCst) > round);
            let mut other = to_export(&server, "other");
            other.put(0, b"abc");
            assert_eq!(other.bytes(0, 3), b"abc");
            let socket = volume.receiving.lock().unwrap().pop().unwrap();
            wait_until("the receive has ended", || socket.strong_count() == 0);
            let mut peer = volume.peers.lock().unwrap().pop().unwrap();
            assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0, "the end of the stream");
        }
    }
}

#[test]
fn between_two_ops_of_a_tool_nothing_is_in_flight() {
    let volume = Echoed::new(echo);
    let mut blocking = Blocking::open(&*volume).unwrap();
    for _ in 0..20 {
        blocking.run(Op::Flush).unwrap();
        let socket = volume.receiving.lock().unwrap()[0].clone();
        assert_eq!(socket.strong_count(), 1, "the backend's own");
    }
}
