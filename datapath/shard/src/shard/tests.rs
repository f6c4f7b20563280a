//! The loop, with scripted sessions and a scripted backend, on a ring of this thread.

use std::collections::{HashSet, VecDeque};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, sync_channel};
use std::sync::{Mutex, MutexGuard};

use sheave_core::{
    Backend, BlockSizes, Capabilities, Completion, Destination, Io, Op, Outcome, Payload, Reply,
    Result, Submitted, Tag, Volume, VolumeInfo,
};
use sheave_ring::SendBatch;
use sheave_telemetry::{Recorder, Registry, VolumeStats};

use super::*;
use crate::assignment::{Assignment, Quiesced, Served};
use crate::ending::Ending;
use crate::session::{Cx, NextRead, Phase, Session};

/// The most turns to wait for an event.
const TURNS_MAX: usize = 100_000;

/// The calls to sessions and backend, one line each.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    fn has(&self, line: &str) -> bool {
        self.0.lock().unwrap().iter().any(|other| other == line)
    }

    /// The lines that begin with this prefix, without it.
    fn of(&self, prefix: &str) -> Vec<String> {
        let lines = self.0.lock().unwrap();
        lines.iter().filter_map(|line| line.strip_prefix(prefix)).map(str::to_owned).collect()
    }
}

/// A session whose requests are single bytes, answered by the same byte, or 0 for an error.
struct Scripted {
    name: &'static str,
    log: Log,
    phase: Phase,
    in_flight: usize,
    ready: Vec<u8>,
}

impl Scripted {
    fn end(&mut self, request: u32, outcome: &Outcome) {
        self.in_flight -= 1;
        let is_ok = outcome.is_ok();
        self.log.add(format!("{} {request} {}", self.name, if is_ok { "ok" } else { "failed" }));
        self.ready.push(if is_ok { request as u8 } else { 0 });
    }
}

impl Session for Scripted {
    fn received(&mut self, bytes: &mut [u8], cx: &mut Cx<'_>) {
        for &byte in &*bytes {
            self.in_flight += 1;
            if let Some(outcome) = cx.submit(Op::Flush, byte.into()) {
                self.end(byte.into(), &outcome);
            }
        }
    }

    fn received_into(&mut self, _: Payload, _: usize, _: &mut Cx<'_>) {
        unreachable!("nothing is received in place")
    }

    fn taken(&mut self, request: u32, _: Nanos) {
        self.log.add(format!("{} {request} taken", self.name));
    }

    fn completed(&mut self, request: u32, outcome: Outcome, _: &mut Cx<'_>) {
        self.end(request, &outcome);
    }

    fn gather(&mut self, batch: &mut SendBatch, _: Nanos, _: &Recorder) {
        if !self.ready.is_empty() {
            batch.try_reserve(self.ready.len(), 1).unwrap();
            batch.head(|head| head.append(&mut self.ready));
        }
    }

    fn sent(&mut self, bytes: usize, _: &mut Cx<'_>) {
        self.log.add(format!("{} sent {bytes}", self.name));
    }

    fn next_read(&mut self) -> NextRead {
        match self.phase {
            Phase::Open => NextRead::Stream,
            Phase::Quiescing => NextRead::Paused,
            Phase::Draining | Phase::Gone => NextRead::Finished,
        }
    }

    fn enter(&mut self, phase: Phase, error: Option<&io::Error>) {
        self.phase = phase;
        let why = if error.is_some() { ", broken" } else { "" };
        self.log.add(format!("{} is {phase:?}{why}", self.name));
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn is_quiescent(&self) -> bool {
        self.in_flight == 0 && self.ready.is_empty()
    }

    fn closed(&mut self, _: &Recorder) {
        self.log.add(format!("{} closed", self.name));
    }
}

/// A backend with room for as many ops as the script says, which completes them when the script
/// says.
#[derive(Default)]
struct State {
    room: usize,
    held: VecDeque<Tag>,
    ending: usize,
    due: Option<Nanos>,
    visits: usize,
    /// Receive from this socket.
    listens_to: Option<Arc<OwnedFd>>,
}

struct ScriptedVolume {
    info: VolumeInfo,
    state: Arc<Mutex<State>>,
    log: Log,
}

struct ScriptedBackend {
    info: VolumeInfo,
    state: Arc<Mutex<State>>,
    log: Log,
}

impl ScriptedVolume {
    fn new(log: &Log) -> Arc<Self> {
        let info = VolumeInfo {
            block: BlockSizes::default(),
            read_only: false,
            rotational: false,
            volatile: true,
            identity: None,
            can: Capabilities::ALL,
        };
        Arc::new(Self { info, state: Arc::default(), log: log.clone() })
    }
}

impl Volume for ScriptedVolume {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn size(&self) -> u64 {
        4096
    }

    fn grow(&self) -> Result<u64> {
        Ok(4096)
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let (info, state, log) = (self.info.clone(), Arc::clone(&self.state), self.log.clone());
        Ok(Box::new(ScriptedBackend { info, state, log }))
    }
}

impl Backend for ScriptedBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn submit(&mut self, op: Op, tag: Tag, _: &mut dyn Io) -> Submitted {
        let mut state = self.state.lock().unwrap();
        if state.held.len() >= state.room {
            return Submitted::Full(op);
        }
        state.held.push_back(tag);
        self.log.add(format!("backend has {}", untag(tag).1));
        Submitted::Queued
    }

    fn io_done(&mut self, done: IoDone, _: &mut dyn Io) {
        self.log.add(format!("received {}", done.result.is_ok()));
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        let mut state = self.state.lock().unwrap();
        state.visits += 1;
        state.due = state.due.filter(|due| *due > io.now());
        if let Some(socket) = state.listens_to.take() {
            let into = Buf::zeroed(1).into();
            let receive = IoRequest::Recv { socket, into, skip: 0, all: false };
            io.start(receive, IoToken(0), Destination::Unknown).expect("room");
        }
        state.ending = state.ending.checked_sub(1)?;
        let tag = state.held.pop_front()?;
        Some(Completion { tag, outcome: Ok(Reply::Done) })
    }

    fn deadline(&self) -> Option<Nanos> {
        self.state.lock().unwrap().due
    }
}

/// A shard that runs in this thread.
struct World {
    shard: Shard,
    inbox: Arc<Inbox>,
    volume: Arc<ScriptedVolume>,
    stats: Arc<VolumeStats>,
    log: Log,
    keys: u64,
}

impl World {
    /// `None` where there is no io_uring.
    fn new() -> Option<Self> {
        let probe = sheave_ring::probe().ok()?;
        let inbox = Arc::new(Inbox::new().unwrap());
        let shard = Shard::new(&probe, 0, Clock::start(), Arc::clone(&inbox)).unwrap();
        let log = Log::default();
        let volume = ScriptedVolume::new(&log);
        let stats = Registry::new().volume("scripted");
        Some(Self { shard, inbox, volume, stats, log, keys: 0 })
    }

    fn backend(&self) -> MutexGuard<'_, State> {
        self.volume.state.lock().unwrap()
    }

    /// The peer's end of a new connection, whose session has this name. Keys of connections count
    /// from 1.
    fn connect(&mut self, name: &'static str) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (log, phase) = (self.log.clone(), Phase::Open);
        let session = Box::new(Scripted { name, log, phase, in_flight: 0, ready: Vec::new() });
        self.keys += 1;
        let served = Served { volume: self.volume.clone(), stats: Arc::clone(&self.stats) };
        let socket = theirs.into();
        let assignment = Assignment { socket, session, served, key: Some(self.keys) };
        self.inbox.assign(Command::Serve(assignment)).unwrap();
        ours
    }

    /// Sends requests, and runs the shard until it has them.
    fn ask(&mut self, stream: &mut UnixStream, request: u8) {
        let before = self.waiting() + self.backend().held.len();
        stream.write_all(&[request]).unwrap();
        self.until("the request has come", |world| {
            world.waiting() + world.backend().held.len() > before
        });
    }

    fn waiting(&self) -> usize {
        if self.shard.volumes.count() == 0 { 0 } else { self.shard.volumes[0].waiting.len() }
    }

    /// Makes the backend complete this many ops.
    fn end(&mut self, count: usize) {
        self.backend().ending = count;
        self.shard.volumes.touch(0);
        self.turn();
    }

    /// One turn that does not sleep. False if the shard has stopped.
    fn turn(&mut self) -> bool {
        let (answer, answers) = sync_channel(1);
        self.inbox.send(Command::Echo(0, answer)).ok().expect("room");
        let goes_on = self.shard.turn().unwrap();
        assert_eq!(answers.recv(), Ok(0));
        goes_on
    }

    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        for _ in 0..TURNS_MAX {
            self.turn();
            if is_so(self) {
                return;
            }
        }
        panic!("{what}: not so; {:?}", self.log.0.lock().unwrap());
    }
}

fn read(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn ops_of_all_connections_are_taken_in_the_order_in_which_they_came() {
    let Some(mut world) = World::new() else { return };
    let (mut a, mut b) = (world.connect("a"), world.connect("b"));
    world.until("both are served", |world| {
        world.inbox.load() == 2 && world.shard.volumes.count() == 1
    });
    for request in [1, 3, 5] {
        world.ask(&mut a, request);
        world.ask(&mut b, request + 1);
    }
    assert_eq!(world.waiting(), 6);
    world.backend().room = 4;
    world.turn();
    assert_eq!(world.log.of("backend has "), ["1", "2", "3", "4"]);
    world.end(1);
    world.end(2);
    world.until("the rest is taken", |world| world.waiting() == 0);
    assert_eq!(world.log.of("backend has "), ["1", "2", "3", "4", "5", "6"]);
    world.end(6);
    world.until("all is sent", |world| {
        let sent = |name: &str| -> usize {
            world.log.of(name).iter().map(|bytes| bytes.parse::<usize>().unwrap()).sum()
        };
        sent("a sent ") == 3 && sent("b sent ") == 3
    });
    assert_eq!((read(&mut a, 3), read(&mut b, 3)), (vec![1, 3, 5], vec![2, 4, 6]));
}

#[test]
fn a_connection_that_is_cut_takes_its_waiting_ops_along() {
    let Some(mut world) = World::new() else { return };
    let (mut a, mut b) = (world.connect("a"), world.connect("b"));
    world.backend().room = 1;
    for request in [1, 2] {
        world.ask(&mut a, request);
    }
    world.ask(&mut b, 3);
    let names = Arc::new(HashSet::from([1]));
    world.inbox.send(Command::End(names, Ending::AtOnce)).ok().unwrap();
    world.until("it is gone", |world| world.log.has("a is Gone, broken"));
    assert!(world.log.has("a 2 failed") && !world.log.has("a 1 ok"));
    assert_eq!((world.waiting(), world.inbox.load()), (1, 2), "the backend has an op of it");
    world.end(1);
    world.until("it is closed", |world| world.log.has("a closed"));
    world.until("the other's op is taken", |world| world.log.has("b 3 taken"));
    assert_eq!(
        (world.inbox.load(), world.log.of("backend has ")),
        (1, vec!["1".into(), "3".into()])
    );
    world.end(1);
    world.until("the other is answered", |world| world.log.has("b sent 1"));
    assert_eq!(read(&mut b, 1), [3]);
    assert_eq!(a.read(&mut [0]).unwrap(), 0, "no reply to a connection that was cut");
}

#[test]
fn a_client_that_sends_nothing_more_gets_its_answers() {
    let Some(mut world) = World::new() else { return };
    let mut a = world.connect("a");
    world.ask(&mut a, 1);
    a.shutdown(std::net::Shutdown::Write).unwrap();
    world.until("it drains", |world| world.log.has("a is Draining"));
    assert!(!world.log.has("a closed"));
    world.backend().room = 1;
    world.until("the op is taken", |world| world.log.has("a 1 taken"));
    world.end(1);
    world.until("it is closed", |world| world.log.has("a closed"));
    assert_eq!((read(&mut a, 1), a.read(&mut [0]).unwrap()), (vec![1], 0));
    assert_eq!((world.inbox.load(), world.shard.volumes.count()), (0, 0));
}

fn quiesce(world: &mut World) -> Receiver<Quiesced> {
    let (to, quiesced) = mpsc::channel();
    world.inbox.send(Command::Quiesce(to)).ok().unwrap();
    world.until("it quiesces", |world| world.log.has("a is Quiescing"));
    quiesced
}

#[test]
fn a_connection_is_given_away_when_it_is_quiescent_and_not_before() {
    let Some(mut world) = World::new() else { return };
    world.backend().room = 1;
    let mut a = world.connect("a");
    world.ask(&mut a, 1);
    let quiesced = quiesce(&mut world);
    for _ in 0..10 {
        world.turn();
    }
    assert!(quiesced.try_recv().is_err(), "a request is in flight");
    world.end(1);
    world.until("it is closed here", |world| world.log.has("a closed"));
    let Quiesced { key, socket } = quiesced.try_recv().unwrap();
    assert_eq!((key, read(&mut a, 1), world.inbox.load()), (1, vec![1], 0));
    UnixStream::from(socket).write_all(b"x").unwrap();
    assert_eq!(read(&mut a, 1), b"x", "the connection goes on elsewhere");
}

#[test]
fn a_connection_that_resumes_is_served_again() {
    let Some(mut world) = World::new() else { return };
    world.backend().room = 1;
    let mut a = world.connect("a");
    world.ask(&mut a, 1);
    let quiesced = quiesce(&mut world);
    world.inbox.send(Command::Resume).ok().unwrap();
    world.until("it resumes", |world| world.log.has("a is Open"));
    world.end(1);
    world.ask(&mut a, 2);
    world.end(1);
    world.until("it is answered", |world| world.log.has("a 2 ok"));
    world.turn();
    assert_eq!(read(&mut a, 2), [1, 2]);
    assert!(quiesced.try_recv().is_err());
}

#[test]
fn a_shard_stops_when_what_is_in_flight_is_answered() {
    let Some(mut world) = World::new() else { return };
    world.backend().room = 1;
    let mut a = world.connect("a");
    world.ask(&mut a, 1);
    world.inbox.send(Command::Stop).ok().unwrap();
    world.until("it drains", |world| world.log.has("a is Draining"));
    assert!(world.turn(), "a request is in flight");
    world.end(1);
    let stopped = (0..TURNS_MAX).any(|_| !world.turn());
    assert!(stopped && world.log.has("a closed"));
    assert_eq!(read(&mut a, 1), [1]);
}

#[test]
fn a_volume_is_visited_when_it_is_due_and_else_left_in_peace() {
    let Some(mut world) = World::new() else { return };
    let _a = world.connect("a");
    world.until("it is mounted", |world| world.shard.volumes.count() == 1);
    let before = world.backend().visits;
    for _ in 0..10 {
        world.turn();
    }
    assert_eq!(world.backend().visits, before, "nothing has happened to it");
    let due = world.shard.core.clock.now() + 20_000_000;
    world.backend().due = Some(due);
    world.end(0);
    // Nothing but the deadline ends this sleep.
    let mut turns = 0;
    while world.backend().due.is_some() {
        assert!(world.shard.turn().unwrap());
        turns += 1;
    }
    assert!(world.shard.core.now >= due && turns < 10, "{turns} turns");
}

#[test]
fn a_volume_that_ends_counts_until_its_last_request_has_completed() {
    let Some(mut world) = World::new() else { return };
    let _a = world.connect("a");
    world.until("it is mounted", |world| world.shard.volumes.count() == 1);
    assert!(world.shard.core.inline.has_one_volume);
    let (ours, _theirs) = UnixStream::pair().unwrap();
    world.volume = ScriptedVolume::new(&world.log);
    world.backend().listens_to = Some(Arc::new(ours.into()));
    let b = world.connect("b");
    let is_mounted = |world: &World| world.shard.volumes.count() == 2;
    world.until("it receives", |world| is_mounted(world) && world.backend().listens_to.is_none());
    assert!(!world.shard.core.inline.has_one_volume);
    drop(b);
    world.until("it is cancelled", |world| world.log.has("received false"));
    assert!(world.log.has("b closed") && world.shard.core.inline.has_one_volume);
}
