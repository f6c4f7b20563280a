//! The plain engine: one thread per connection, and blocking calls. It is the fallback where
//! io_uring is disabled, and the reference for measurements of the ring.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use sheave_core::{Backend, Error, memory};
use sheave_ring::{SendBatch, plain};
use sheave_telemetry::Recorder;

use crate::assignment::Assignment;
use crate::ending::{Ending, STOP_GRACE};
use crate::io::PlainIo;
use crate::tags::untag;
use crate::waiting::Waiting;
use crate::{Clock, Cx, NextRead, Phase, Session};

/// The owner in the tags of a thread's only connection.
const CONNECTION: u32 = 0;
const RECEIVE_LEN: usize = 64 << 10;
/// How long threads may take to end after their sockets were shut down.
const LAST_GRACE: Duration = Duration::from_secs(1);

pub(crate) struct ThreadEngine {
    clock: Clock,
    open: Arc<OpenSockets>,
}

/// Sockets of running threads, so that the engine can end their reads.
#[derive(Default)]
struct OpenSockets {
    sockets: Mutex<HashMap<u64, OpenSocket>>,
    closed: Condvar,
    next: AtomicU64,
    /// Threads take no more requests, even if their sockets have some.
    stopping: AtomicBool,
}

struct OpenSocket {
    socket: Arc<OwnedFd>,
    /// See [`Assignment::key`].
    key: Option<u64>,
    /// Its thread takes no more requests.
    ending: Arc<AtomicBool>,
}

impl ThreadEngine {
    pub(crate) fn new(clock: Clock) -> Self {
        Self { clock, open: Arc::default() }
    }

    pub(crate) fn serve(&self, assignment: Assignment) -> Result<(), Error> {
        let Assignment { socket, session, served, key } = assignment;
        let mut receive = Vec::new();
        memory::attempt(|| receive.try_reserve_exact(RECEIVE_LEN))?;
        receive.resize(RECEIVE_LEN, 0);
        let (socket, ending) = (Arc::new(socket), Arc::<AtomicBool>::default());
        let id = self.open.next.fetch_add(1, Relaxed);
        let (open, clock) = (Arc::clone(&self.open), self.clock);
        let mut io =
            PlainIo::new().map_err(|error| Error::from_io("serve", "connection's waker", error))?;
        io.recorder = served.volume.link().map(|_| served.stats.recorder());
        let entry = OpenSocket { socket: Arc::clone(&socket), key, ending: Arc::clone(&ending) };
        self.open.lock().insert(id, entry);
        let begin = move |backend| Connection {
            open: Arc::clone(&open),
            ending,
            socket,
            session,
            backend,
            waiting: Waiting::default(),
            io,
            recorder: served.stats.recorder(),
            clock,
            batch: SendBatch::new(),
            receive: receive.into_boxed_slice(),
        };
        let open = Arc::clone(&self.open);
        let spawned = std::thread::Builder::new().name("connection".to_owned()).spawn(move || {
            // In this thread, which is the backend's.
            match served.volume.backend() {
                Ok(backend) => begin(backend).run(),
                Err(error) => {
                    tracing::warn!(%error, "connection refused: its volume cannot be used");
                }
            }
            open.remove(id);
        });
        spawned.map(|_| ()).map_err(|error| {
            self.open.remove(id);
            Error::from_io("serve", "connection thread", error)
        })
    }

    pub(crate) fn connections(&self) -> usize {
        self.open.lock().len()
    }

    /// See [`crate::Engine::end`].
    pub(crate) fn end(&self, keys: &HashSet<u64>, ending: Ending) {
        for open in self.open.lock().values() {
            if open.key.is_some_and(|key| keys.contains(&key)) {
                open.ending.store(true, Relaxed);
                let _ = shutdown(
                    open.socket.as_fd(),
                    match ending {
                        Ending::InOrder => Shutdown::Read,
                        Ending::AtOnce => Shutdown::Both,
                    },
                );
            }
        }
    }

    pub(crate) fn stop(self) {
        self.open.stopping.store(true, Relaxed);
        for (how, wait) in [(Shutdown::Read, STOP_GRACE), (Shutdown::Both, LAST_GRACE)] {
            let sockets = self.open.lock();
            for open in sockets.values() {
                let _ = shutdown(open.socket.as_fd(), how);
            }
            let waited = self
                .open
                .closed
                .wait_timeout_while(sockets, wait, |sockets| !sockets.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            if waited.0.is_empty() {
                return;
            }
        }
    }
}

impl OpenSockets {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, OpenSocket>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, id: u64) {
        self.lock().remove(&id);
        self.closed.notify_all();
    }
}

struct Connection {
    open: Arc<OpenSockets>,
    /// See [`OpenSocket::ending`].
    ending: Arc<AtomicBool>,
    socket: Arc<OwnedFd>,
    session: Box<dyn Session>,
    backend: Box<dyn Backend>,
    /// Ops that the backend had no room for.
    waiting: Waiting,
    io: PlainIo,
    recorder: Recorder,
    clock: Clock,
    batch: SendBatch,
    receive: Box<[u8]>,
}

impl Connection {
    fn run(mut self) {
        self.recorder.add_connections(1);
        self.io.now = self.clock.now();
        self.call(|session, cx| session.received(&mut [], cx));
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return self.drain(),
                Err(error) => {
                    self.session.enter(Phase::Gone, Some(&error));
                    // The client need not wait while this thread waits for the backend.
                    let _ = shutdown(&self.socket, Shutdown::Both);
                    for (request, outcome) in self.waiting.withdraw(CONNECTION) {
                        self.call(|session, cx| session.completed(request, outcome, cx));
                    }
                    return self.drain();
                }
            }
        }
    }

    /// Processes completions, replies, receives. False when the session has finished.
    fn turn(&mut self) -> io::Result<bool> {
        self.io.now = self.clock.now();
        self.work();
        while self.reply()? {
            // Sent replies may have made room for more work of the session.
            self.work();
        }
        if self.ending.load(Relaxed) || self.open.stopping.load(Relaxed) {
            self.session.enter(Phase::Draining, None);
        }
        match self.session.next_read() {
            NextRead::Stream | NextRead::Paused if self.waiting.is_crowd() => self.hold_back()?,
            NextRead::Stream => {
                if self.wait_for(PollFlags::IN)
                    && let Some(count) = ready(self.receive())?
                {
                    self.io.now = self.clock.now();
                    self.received(count);
                }
            }
            NextRead::Into { payload, skip } => {
                // The bytes may take long to arrive; the backend's work goes on meanwhile.
                let count = loop {
                    while self.waiting.is_crowd() {
                        self.hold_back()?;
                        self.work();
                        self.reply()?;
                    }
                    let received = plain::recv_into(self.socket.as_fd(), &payload, skip);
                    if let Some(count) = ready(received)? {
                        break count;
                    }
                    self.wait_for(PollFlags::IN);
                    self.io.now = self.clock.now();
                    self.work();
                    self.reply()?;
                };
                self.io.now = self.clock.now();
                match count {
                    0 => self.session.enter(Phase::Draining, None),
                    _ => self.call(|session, cx| session.received_into(payload, count, cx)),
                }
            }
            NextRead::Paused => self.sleep(),
            NextRead::Finished if self.session.in_flight() == 0 => return Ok(false),
            // A client that goes needs no answers, and what waits can still be withdrawn.
            NextRead::Finished if !self.waiting.is_empty() => self.hold_back()?,
            NextRead::Finished => self.sleep(),
        }
        Ok(true)
    }

    fn received(&mut self, count: usize) {
        if count == 0 {
            return self.session.enter(Phase::Draining, None);
        }
        let mut receive = std::mem::take(&mut self.receive);
        self.call(|session, cx| session.received(&mut receive[..count], cx));
        self.receive = receive;
    }

    /// Runs file I/O and backend until neither has a completion.
    fn work(&mut self) {
        loop {
            let mut quiet = true;
            while let Some(done) = self.io.done.pop_front() {
                self.backend.io_done(done, &mut self.io);
                quiet = false;
            }
            while let Some(completion) = self.backend.reap(&mut self.io) {
                let (_, request) = untag(completion.tag);
                self.io.now = self.clock.now();
                self.call(|session, cx| session.completed(request, completion.outcome, cx));
                quiet = false;
            }
            while let Some((tag, outcome)) = self.waiting.offer(&mut *self.backend, &mut self.io) {
                let (_, request) = untag(tag);
                self.session.taken(request, self.io.now);
                if let Some(outcome) = outcome {
                    self.call(|session, cx| session.completed(request, outcome, cx));
                }
                quiet = false;
            }
            // A reap may have started I/O that has completed by now.
            if quiet && self.io.done.is_empty() {
                return;
            }
        }
    }

    /// Sends all replies that are ready. True if there were any.
    fn reply(&mut self) -> io::Result<bool> {
        let mut has_sent = false;
        loop {
            self.session.gather(&mut self.batch, self.clock.now(), &self.recorder);
            if self.batch.is_empty() {
                self.batch.shrink();
                return Ok(has_sent);
            }
            has_sent = true;
            while self.batch.unsent() > 0 {
                match ready(plain::send(self.socket.as_fd(), &mut self.batch))? {
                    Some(count) => self.batch.advance(count),
                    // A slow client must not hold up the backend, which may work for others.
                    None => {
                        self.wait_for(PollFlags::OUT);
                        self.io.now = self.clock.now();
                        self.work();
                    }
                }
            }
            let bytes = self.batch.len();
            self.call(|session, cx| session.sent(bytes, cx));
            self.batch.clear(|buf| self.io.pool.give(buf));
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let (count, _) = retry(|| recv(&self.socket, &mut *self.receive, RecvFlags::empty()))?;
        Ok(count)
    }

    /// Sleeps until the socket is ready (true), the backend has something to do, or its deadline
    /// has passed.
    fn wait_for(&mut self, what: PollFlags) -> bool {
        let left = self.time_left();
        self.io.wait(Some(PollFd::new(&self.socket, what)), left)
    }

    /// Sleeps in the same way, since too much waits for the volume to receive more.
    ///
    /// # Errors
    /// When the client is gone.
    fn hold_back(&mut self) -> io::Result<()> {
        // poll(2) reports a hang-up even if no event is asked for.
        let is_gone = self.wait_for(PollFlags::empty());
        self.io.now = self.clock.now();
        if is_gone { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }

    /// Sleeps until the backend has something to do or its deadline has passed.
    fn sleep(&mut self) {
        let left = self.time_left();
        self.io.wait(None, left);
        self.io.now = self.clock.now();
    }

    fn time_left(&self) -> Option<Duration> {
        self.backend.deadline().map(|due| self.clock.until(due))
    }

    /// Waits for the ops in flight of a connection that has ended.
    fn drain(mut self) {
        while self.session.in_flight() > 0 {
            self.work();
            if self.session.in_flight() > 0 {
                self.sleep();
            }
        }
        // Requests in flight on sockets are for ops of other threads, which take them over.
        self.io.cancel();
        while let Some(done) = self.io.done.pop_front() {
            // Not reaped, since the backend would start new requests.
            self.backend.io_done(done, &mut self.io);
        }
        self.session.closed(&self.recorder);
        self.recorder.add_connections(-1);
    }

    fn call(&mut self, call: impl FnOnce(&mut dyn Session, &mut Cx<'_>)) {
        let mut cx = Cx {
            backend: &mut *self.backend,
            waiting: &mut self.waiting,
            io: &mut self.io,
            recorder: &self.recorder,
            connection: CONNECTION,
            has_started: false,
        };
        call(&mut *self.session, &mut cx);
    }
}

/// `None` if the call would have to wait.
fn ready(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        other => other.map(Some),
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}
