//! A shard: take all completions, work through them, send all replies, wait.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use sheave_core::{
    Buf, Completion, Error, ErrorKind, IoDone, IoRequest, IoToken, Nanos, Outcome, Tag, memory,
};
use sheave_ring::{Event, Probe, Received, Ring, RingConfig, SendBatch, Socket};
use slab::Slab;

use crate::engine::{Assignment, Command, Inbox, Released, STOP_GRACE};
use crate::io::{CONNECTION_SUBMIT_FROM, Mount, RingIo};
use crate::poll::AdaptivePoll;
use crate::pool::Pool;
use crate::queue::queue_of;
use crate::queues::Queue;
use crate::quick::Quick;
use crate::session::{CONNECTIONS_MAX, untag};
use crate::volumes::{Mounted, Volumes};
use crate::waker::Woken;
use crate::{Clock, Cx, NextRead, Session};

/// File requests of this "volume" are the shard's own: reads of its bell.
const BELL: u32 = u32::MAX;

pub(crate) struct Shard {
    pub(crate) ring: Ring,
    pub(crate) pool: Pool,
    pub(crate) quick: Quick,
    pub(crate) clock: Clock,
    pub(crate) now: Nanos,
    poll: AdaptivePoll,
    pub(crate) inbox: Arc<Inbox>,
    /// The inbox's bell, to be read through the ring.
    bell: Arc<File>,
    pub(crate) connections: Slab<Connection>,
    pub(crate) queues: Slab<Queue>,
    pub(crate) volumes: Volumes,
    /// Connections that something happened to in this turn.
    touched: Vec<usize>,
    /// The same for the queues of devices.
    pub(crate) touched_queues: Vec<usize>,
    /// Set when the shard is to stop: until when connections may finish.
    stop_by: Option<Nanos>,
}

pub(crate) struct Connection {
    pub(crate) socket: Socket,
    pub(crate) session: Box<dyn Session>,
    pub(crate) volume: usize,
    pub(crate) receiving: bool,
    /// `None` while a send is in flight.
    pub(crate) batch: Option<Box<SendBatch>>,
    /// The stream has failed or ended; nothing more is sent or received.
    dead: bool,
    pub(crate) touched: bool,
    /// See [`Assignment::name`].
    pub(crate) name: Option<u64>,
    /// Where it goes once it is at rest, if it is to.
    pub(crate) leaving: Option<Sender<Released>>,
}

impl Shard {
    pub(crate) fn new(
        probe: &Probe,
        poll_limit: Nanos,
        clock: Clock,
        inbox: Arc<Inbox>,
    ) -> io::Result<Self> {
        let bell = inbox.bell.as_fd().try_clone_to_owned()?;
        let woken = Woken::new(Arc::clone(&inbox.bell));
        Ok(Self {
            ring: Ring::new(probe, RingConfig::default())?,
            pool: Pool::default(),
            quick: Quick::default(),
            clock,
            now: clock.now(),
            poll: AdaptivePoll::new(poll_limit),
            inbox,
            bell: Arc::new(File::from(bell)),
            connections: Slab::new(),
            queues: Slab::new(),
            volumes: Volumes::new(woken),
            touched: Vec::new(),
            touched_queues: Vec::new(),
            stop_by: None,
        })
    }

    /// Serves until told to stop.
    ///
    /// # Errors
    /// When the ring itself fails, which ends all its connections.
    pub(crate) fn run(mut self) -> io::Result<()> {
        self.watch_bell();
        loop {
            self.pause()?;
            self.now = self.clock.now();
            while let Some(event) = self.ring.next_event() {
                self.dispatch(event);
            }
            if self.inbox.bell.answer() {
                self.take_commands();
                self.volumes.touch_woken();
            }
            self.volumes.touch_due(self.now);
            self.reap();
            self.settle();
            if self.stop_by.is_some_and(|by| self.connections.is_empty() || self.now >= by) {
                return Ok(());
            }
        }
    }

    /// Waits for a completion: by polling while that pays, else asleep.
    fn pause(&mut self) -> io::Result<()> {
        if self.ring.poll()? || !self.quick.is_empty() || self.has_touched() {
            return Ok(());
        }
        let began = self.clock.now();
        let due = self.deadline();
        if due.is_some_and(|due| due <= began) {
            return Ok(());
        }
        let budget = self.poll.budget();
        let mut now = began;
        while now - began < budget {
            std::hint::spin_loop();
            let hit = self.ring.poll()? || self.inbox.bell.has_rung();
            now = self.clock.now();
            if hit || due.is_some_and(|due| due <= now) {
                self.poll.paused(now - began, budget, true);
                return Ok(());
            }
        }
        if !self.inbox.bell.lie_down() {
            return Ok(());
        }
        let waited = self.ring.wait(due.map(|due| Duration::from_nanos(due - now)));
        self.inbox.bell.get_up();
        waited?;
        self.poll.paused(self.clock.now() - began, budget, false);
        Ok(())
    }

    fn has_touched(&self) -> bool {
        !self.touched.is_empty() || !self.touched_queues.is_empty() || self.volumes.has_touched()
    }

    /// When to wake although nothing has ended.
    fn deadline(&self) -> Option<Nanos> {
        self.volumes.deadline().into_iter().chain(self.stop_by).min()
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Received { user, result } => {
                let key = user as usize;
                self.connections[key].receiving = false;
                match result {
                    Ok(Some(received)) => self.received(key, received),
                    Ok(None) => self.end_of_stream(key),
                    Err(error) if self.is_leaving(key, &error) => self.touch(key),
                    Err(error) => self.fail(key, &error),
                }
            }
            Event::NoBuffer { user } => {
                self.connections[user as usize].receiving = false;
                self.touch(user as usize);
            }
            Event::Landed { user, result, payload } => self.landed(user as usize, payload, result),
            Event::Sent { user, result, batch } => self.sent(user as usize, result, batch),
            // What it rang for is taken after all events.
            Event::File { user: (BELL, _), .. } => self.watch_bell(),
            Event::File { user: (volume, token), result, request } => {
                self.io_done(volume, IoDone { token: IoToken(token), request, result });
            }
            Event::Command { user: (key, slot), result } => {
                self.commanded(key as usize, slot, result);
            }
        }
    }

    fn received(&mut self, key: usize, mut received: Received) {
        if !self.connections[key].dead {
            self.call(key, |session, cx| session.received(received.bytes(), cx));
        }
        self.ring.give_back(received);
        self.touch(key);
    }

    fn landed(&mut self, key: usize, payload: sheave_core::Payload, result: io::Result<usize>) {
        self.connections[key].receiving = false;
        match result {
            Ok(0) => self.end_of_stream(key),
            Err(error) if self.is_leaving(key, &error) => {}
            Err(error) => self.fail(key, &error),
            Ok(count) if !self.connections[key].dead => {
                self.call(key, |session, cx| session.landed(payload, count, cx));
            }
            Ok(_) => {}
        }
        self.touch(key);
    }

    fn sent(&mut self, key: usize, result: io::Result<()>, mut batch: Box<SendBatch>) {
        let connection = &mut self.connections[key];
        match result {
            Ok(()) if batch.unsent() > 0 && !connection.dead => {
                self.ring.send(&connection.socket, batch, key as u64);
                return;
            }
            Ok(()) => {
                let bytes = batch.len();
                self.call(key, |session, cx| session.sent(bytes, cx));
            }
            Err(error) => self.fail(key, &error),
        }
        batch.clear(|buf| self.pool.give(buf));
        self.connections[key].batch = Some(batch);
        self.touch(key);
    }

    fn io_done(&mut self, volume: u32, done: IoDone) {
        if !self.volumes.io_ended(volume as usize) {
            // The backend that started it is gone.
            return;
        }
        let (backend, _, mut io) = self.volume(volume as usize);
        backend.io_done(done, &mut io);
        self.volumes.touch(volume as usize);
    }

    /// Hands completions of the backends to their sessions, and ops that wait to backends that have
    /// room again.
    fn reap(&mut self) {
        while let Some((volume, done)) = self.quick.next_done() {
            self.io_done(volume, done);
        }
        self.volumes.touch_crowded();
        while let Some(index) = self.volumes.next_touched() {
            while let Some((tag, outcome)) = self.next_end(index) {
                let (owner, request) = untag(tag);
                match queue_of(owner) {
                    Some(key) => {
                        self.call_queue(key, |queue, cx| queue.completed(request, outcome, cx));
                    }
                    None => {
                        let key = owner as usize;
                        self.call(key, |session, cx| session.completed(request, outcome, cx));
                        self.touch(key);
                    }
                }
            }
            self.volumes.visited(index);
        }
    }

    /// The next op of a volume that has ended.
    fn next_end(&mut self, index: usize) -> Option<(Tag, Outcome)> {
        loop {
            let (backend, waiting, mut io) = self.volume(index);
            if let Some(Completion { tag, outcome }) = backend.reap(&mut io) {
                return Some((tag, outcome));
            }
            let (tag, outcome) = waiting.offer(backend, &mut io)?;
            let (owner, request) = untag(tag);
            match queue_of(owner) {
                Some(key) => self.queues[key].queue.taken(request, self.now),
                None => self.connections[owner as usize].session.taken(request, self.now),
            }
            if let Some(outcome) = outcome {
                return Some((tag, outcome));
            }
            // What was taken may have ended by now.
        }
    }

    /// Sends, receives and closes as the sessions that were touched want it.
    fn settle(&mut self) {
        let mut touched = std::mem::take(&mut self.touched);
        for key in touched.drain(..) {
            self.connections[key].touched = false;
            self.serve(key);
        }
        // Keeps the allocation, and what was touched meanwhile.
        touched.append(&mut self.touched);
        self.touched = touched;
        self.settle_queues();
    }

    fn serve(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let recorder = &self.volumes[connection.volume].recorder;
        if !connection.dead {
            if let Some(mut batch) = connection.batch.take() {
                connection.session.gather(&mut batch, self.clock.now(), recorder);
                if batch.is_empty() {
                    batch.shrink();
                    connection.batch = Some(batch);
                } else {
                    self.ring.send(&connection.socket, batch, key as u64);
                }
            }
            if !connection.receiving {
                self.receive(key);
            }
        }
        self.close_if_done(key);
        self.release_if_left(key);
    }

    fn receive(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let socket = &connection.socket;
        match connection.session.next_read() {
            NextRead::Stream => self.ring.recv(socket, key as u64),
            NextRead::Into { payload, skip } => {
                self.ring.recv_into(socket, payload, skip, key as u64);
            }
            NextRead::Paused => return,
            NextRead::Finished => {
                let idle = connection.session.in_flight() == 0 && connection.batch.is_some();
                connection.dead |= idle;
                return;
            }
        }
        connection.receiving = true;
    }

    /// The client sends nothing more; what it has asked for is still answered.
    fn end_of_stream(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        if !connection.dead {
            connection.session.ended(None);
        }
        self.touch(key);
    }

    pub(crate) fn fail(&mut self, key: usize, error: &io::Error) {
        let connection = &mut self.connections[key];
        if !connection.dead {
            connection.dead = true;
            connection.session.ended(Some(error));
            // Whatever the kernel still has in flight on the socket ends now.
            let _ = shutdown(connection.socket.as_fd(), Shutdown::Both);
            let volume = connection.volume;
            for (request, outcome) in self.volumes[volume].waiting.withdraw(key as u32) {
                self.call(key, |session, cx| session.completed(request, outcome, cx));
            }
        }
        self.touch(key);
    }

    /// Forgets a dead connection once neither kernel nor backend holds anything of it.
    fn close_if_done(&mut self, key: usize) {
        let connection = &self.connections[key];
        let busy = connection.receiving
            || connection.batch.is_none()
            || connection.session.in_flight() > 0;
        if !connection.dead || busy {
            return;
        }
        let mut connection = self.connections.remove(key);
        self.ring.close(connection.socket);
        self.inbox.closed();
        let mounted = &mut self.volumes[connection.volume];
        connection.session.closed(&mounted.recorder);
        self.unmount(connection.volume);
    }

    fn take_commands(&mut self) {
        while let Some(command) = self.inbox.take() {
            // Whoever waits for an answer may have gone.
            match command {
                Command::Serve(assignment) => self.open(assignment),
                Command::Open(served, to) => drop(to.send(self.volumes.open(&served))),
                Command::Close(volume) => self.close_volume(&volume),
                Command::ServeQueue(queue, served, to) => {
                    self.open_queue(queue, &served);
                    let _ = to.send(());
                }
                Command::Release(to) => self.begin_release(&to),
                Command::Stay => self.end_release(),
                Command::Abandon(name) => self.abandon(name),
                Command::End(names, ending) => self.end(&names, ending),
                Command::Echo(index, answer) => drop(answer.try_send(index)),
                Command::Stop => self.begin_stop(),
            }
        }
    }

    fn open(&mut self, assignment: Assignment) {
        let Assignment { socket, session, served, name } = assignment;
        let index = match self.volumes.mount(&served) {
            Ok(index) => index,
            Err(error) => {
                tracing::warn!(%error, "connection refused: its volume cannot be used");
                self.inbox.closed();
                return;
            }
        };
        if let Err(error) = self.make_room() {
            tracing::warn!(%error, "connection refused");
            self.unmount(index);
            self.inbox.closed();
            return;
        }
        let socket = self.ring.adopt(socket);
        let batch = Some(Box::default());
        let key = self.connections.insert(Connection {
            socket,
            session,
            volume: index,
            receiving: false,
            batch,
            dead: false,
            touched: false,
            name,
            leaving: None,
        });
        // The client may have sent requests right behind its last option.
        self.call(key, |session, cx| session.received(&mut [], cx));
        if self.stop_by.is_some() {
            self.connections[key].session.shut_down();
        }
        self.touch(key);
    }

    /// Makes room for one more connection in all lists.
    fn make_room(&mut self) -> sheave_core::Result<()> {
        let count = self.connections.len() + 1;
        if count > CONNECTIONS_MAX as usize {
            let why = format!("a shard has {CONNECTIONS_MAX} connections, the most there may be");
            return Err(Error::new(ErrorKind::Busy, "serve", why));
        }
        memory::check_growth::<Connection>(self.connections.len(), self.connections.capacity())?;
        memory::attempt(|| self.touched.try_reserve(count))?;
        self.ring.make_room()
    }

    fn begin_stop(&mut self) {
        self.stop_by = Some(self.now + STOP_GRACE.as_nanos() as Nanos);
        let keys: Vec<usize> = self.connections.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.shut_down(key);
        }
    }

    /// Lets a connection finish what it has in flight and takes no more requests from it.
    pub(crate) fn shut_down(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        connection.session.shut_down();
        // Ends a receive that waits for a request; replies can still be sent.
        let _ = shutdown(connection.socket.as_fd(), Shutdown::Read);
        self.touch(key);
    }

    fn call(&mut self, key: usize, call: impl FnOnce(&mut dyn Session, &mut Cx<'_>)) {
        let Self { ring, pool, quick, clock, now, connections, volumes, .. } = self;
        let Connection { session, volume, .. } = &mut connections[key];
        volumes.touch(*volume);
        let Mounted { backend, waiting, recorder, waker, io_in_flight, .. } = &mut volumes[*volume];
        let (clock, now, submit_from, volume) =
            (*clock, *now, CONNECTION_SUBMIT_FROM, *volume as u32);
        let mount = Mount { waker, io_in_flight };
        let mut io = RingIo { ring, pool, quick, clock, now, submit_from, volume, mount };
        let backend = &mut **backend;
        let mut cx = Cx { backend, waiting, io: &mut io, recorder, connection: key as u32 };
        call(&mut **session, &mut cx);
    }

    pub(crate) fn touch(&mut self, key: usize) {
        if let Some(connection) = self.connections.get_mut(key)
            && !connection.touched
        {
            connection.touched = true;
            self.touched.push(key);
        }
    }

    fn watch_bell(&mut self) {
        let request = IoRequest::Read { file: Arc::clone(&self.bell), at: 0, into: Buf::zeroed(8) };
        self.ring.start_unbounded(request, (BELL, 0));
    }
}
