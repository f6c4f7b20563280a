//! The connections of a shard.

mod held_back;

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{SendError, Sender};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use sheave_core::{Error, ErrorKind, Outcome, Payload, memory};
use sheave_ring::{Received, SendBatch, Socket};
use slab::Slab;

use crate::assignment::{Assignment, Quiesced};
use crate::core::Core;
use crate::ending::Ending;
use crate::inbox::Inbox;
use crate::io::CONNECTION_SUBMIT_FROM;
use crate::session::{Cx, NextRead, Phase, Session};
use crate::tags::CONNECTIONS_MAX;
use crate::volumes::{Lent, Volumes};

use self::held_back::Watch;

/// All connections, by key.
pub(crate) struct Connections {
    all: Slab<Connection>,
    /// Connections with an event in this turn.
    touched: Vec<usize>,
    /// Those that receive nothing before fewer ops wait for their volume.
    held_back: Vec<usize>,
    /// Counts the connections.
    inbox: Arc<Inbox>,
    /// Where quiesced connections go, while connections are quiescing.
    quiesced_to: Option<Sender<Quiesced>>,
    /// No more requests are taken of any.
    draining: bool,
}

struct Connection {
    socket: Socket,
    session: Box<dyn Session>,
    volume: usize,
    phase: Phase,
    receiving: bool,
    /// What it is to receive once it is no longer held back.
    next: Option<NextRead>,
    /// It is in [`Connections::held_back`].
    is_held_back: bool,
    watch: Watch,
    /// `None` while a send is in flight.
    batch: Option<Box<SendBatch>>,
    touched: bool,
    /// See [`Assignment::key`].
    key: Option<u64>,
}

impl Connection {
    fn enter(&mut self, phase: Phase, error: Option<&io::Error>) {
        self.phase = phase;
        self.session.enter(phase, error);
    }

    fn is_gone(&self) -> bool {
        self.phase == Phase::Gone
    }
}

impl Connections {
    pub(crate) fn new(inbox: Arc<Inbox>) -> Self {
        let (all, touched, held_back) = (Slab::new(), Vec::new(), Vec::new());
        Self { all, touched, held_back, inbox, quiesced_to: None, draining: false }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(crate) fn has_touched(&self) -> bool {
        !self.touched.is_empty()
    }

    /// Serves a connection.
    pub(crate) fn open(&mut self, assignment: Assignment, core: &mut Core, volumes: &mut Volumes) {
        let Assignment { socket, session, served, key: assigned } = assignment;
        let volume = match volumes.mount(&served, core) {
            Ok(volume) => volume,
            Err(error) => {
                tracing::warn!(%error, "connection refused: its volume cannot be used");
                self.inbox.closed();
                return;
            }
        };
        if let Err(error) = self.make_room(core) {
            tracing::warn!(%error, "connection refused");
            volumes.unmount(volume, core);
            self.inbox.closed();
            return;
        }
        let key = self.all.insert(Connection {
            socket: core.ring.adopt(socket),
            session,
            volume,
            phase: Phase::Open,
            receiving: false,
            next: None,
            is_held_back: false,
            watch: Watch::Off,
            batch: Some(Box::default()),
            touched: false,
            key: assigned,
        });
        // The client may have sent requests right behind its last option.
        self.call(key, core, volumes, |session, cx| session.received(&mut [], cx));
        if self.draining {
            self.all[key].enter(Phase::Draining, None);
        }
        self.touch(key);
    }

    /// Makes room for one more connection in all lists.
    fn make_room(&mut self, core: &mut Core) -> sheave_core::Result<()> {
        let count = self.all.len() + 1;
        if count > CONNECTIONS_MAX as usize {
            let why = format!("a shard has {CONNECTIONS_MAX} connections, the most there may be");
            return Err(Error::new(ErrorKind::Busy, "serve", why));
        }
        memory::check_growth::<Connection>(self.all.len(), self.all.capacity())?;
        memory::attempt(|| self.touched.try_reserve(count))?;
        memory::attempt(|| self.held_back.try_reserve(count))?;
        core.ring.make_room()
    }

    /// A receive has completed; `None` is the end of the stream.
    pub(crate) fn received(
        &mut self,
        key: usize,
        result: io::Result<Option<Received>>,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        self.all[key].receiving = false;
        match result {
            Ok(Some(mut received)) => {
                if !self.all[key].is_gone() {
                    let bytes = received.bytes();
                    self.call(key, core, volumes, |session, cx| session.received(bytes, cx));
                }
                core.ring.give_back(received);
            }
            Ok(None) => self.drain(key),
            Err(error) if self.is_cancelled_to_quiesce(key, &error) => {}
            Err(error) => self.fail(key, &error, core, volumes),
        }
        self.touch(key);
    }

    /// A receive found no buffer.
    pub(crate) fn not_received(&mut self, key: usize) {
        self.all[key].receiving = false;
        self.touch(key);
    }

    /// A receive into a payload has completed; 0 bytes are the end of the stream.
    pub(crate) fn received_into(
        &mut self,
        key: usize,
        payload: Payload,
        result: io::Result<usize>,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        self.all[key].receiving = false;
        match result {
            Ok(0) => self.drain(key),
            Err(error) if self.is_cancelled_to_quiesce(key, &error) => {}
            Err(error) => self.fail(key, &error, core, volumes),
            Ok(count) if !self.all[key].is_gone() => {
                self.call(key, core, volumes, |session, cx| {
                    session.received_into(payload, count, cx)
                });
            }
            Ok(_) => {}
        }
        self.touch(key);
    }

    /// A send has completed.
    pub(crate) fn sent(
        &mut self,
        key: usize,
        result: io::Result<()>,
        mut batch: Box<SendBatch>,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        let connection = &mut self.all[key];
        match result {
            Ok(()) if batch.unsent() > 0 && !connection.is_gone() => {
                core.ring.send(&connection.socket, batch, key as u64);
                return;
            }
            Ok(()) => {
                let bytes = batch.len();
                self.call(key, core, volumes, |session, cx| session.sent(bytes, cx));
            }
            Err(error) => self.fail(key, &error, core, volumes),
        }
        batch.clear(|buf| core.pool.give(buf));
        self.all[key].batch = Some(batch);
        self.touch(key);
    }

    /// See [`Session::taken`].
    pub(crate) fn taken(&mut self, key: usize, request: u32, core: &Core) {
        self.all[key].session.taken(request, core.now);
    }

    /// See [`Session::completed`].
    pub(crate) fn completed(
        &mut self,
        key: usize,
        request: u32,
        outcome: Outcome,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        self.call(key, core, volumes, |session, cx| session.completed(request, outcome, cx));
        self.touch(key);
    }

    /// Sends, receives and closes, as the touched sessions request.
    pub(crate) fn settle(&mut self, core: &mut Core, volumes: &mut Volumes) {
        let mut touched = std::mem::take(&mut self.touched);
        for key in touched.drain(..) {
            // A connection that failed while it was settled was touched and may be closed by now.
            let Some(connection) = self.all.get_mut(key) else { continue };
            connection.touched = false;
            self.serve(key, core, volumes);
            self.close_if_done(key, core, volumes);
            self.hand_out_if_quiescent(key, core, volumes);
        }
        // Keeps the allocation, and the connections that were touched meanwhile.
        touched.append(&mut self.touched);
        self.touched = touched;
        self.let_on(volumes);
    }

    fn serve(&mut self, key: usize, core: &mut Core, volumes: &mut Volumes) {
        let connection = &mut self.all[key];
        if connection.is_gone() {
            return;
        }
        let Connection { socket, session, volume, phase, receiving, next, batch, .. } = connection;
        if let Some(mut replies) = batch.take() {
            session.gather(&mut replies, core.clock.now(), &volumes[*volume].recorder);
            if replies.is_empty() {
                replies.shrink();
                *batch = Some(replies);
            } else {
                core.ring.send(socket, replies, key as u64);
            }
        }
        if *receiving {
            return;
        }
        let is_crowd = volumes[*volume].waiting.is_crowd();
        match next.take().unwrap_or_else(|| session.next_read()) {
            read @ NextRead::Into { .. } if is_crowd => {
                *next = Some(read);
                return self.hold_back(key, core, volumes);
            }
            NextRead::Stream | NextRead::Paused if is_crowd => {
                return self.hold_back(key, core, volumes);
            }
            NextRead::Stream => core.ring.recv(socket, key as u64),
            NextRead::Into { payload, skip } => {
                core.ring.recv_into(socket, payload, skip, key as u64);
            }
            NextRead::Paused => return,
            NextRead::Finished => {
                if session.in_flight() == 0 && batch.is_some() {
                    // Everything is answered: no more calls of the session are needed.
                    *phase = Phase::Gone;
                }
                return;
            }
        }
        *receiving = true;
    }

    /// Takes no more requests; those taken are still answered.
    fn drain(&mut self, key: usize) {
        if !self.all[key].is_gone() {
            self.all[key].enter(Phase::Draining, None);
        }
        self.touch(key);
    }

    /// Ends a connection, even with requests in flight.
    fn fail(&mut self, key: usize, error: &io::Error, core: &mut Core, volumes: &mut Volumes) {
        let connection = &mut self.all[key];
        if !connection.is_gone() {
            connection.enter(Phase::Gone, Some(error));
            connection.next = None;
            // This completes the kernel's requests in flight on the socket.
            let _ = shutdown(connection.socket.as_fd(), Shutdown::Both);
            let volume = connection.volume;
            for (request, outcome) in volumes[volume].waiting.withdraw(key as u32) {
                self.completed(key, request, outcome, core, volumes);
            }
        }
        self.touch(key);
    }

    /// Removes a connection that is gone once neither the kernel nor the backend has a request of
    /// it.
    fn close_if_done(&mut self, key: usize, core: &mut Core, volumes: &mut Volumes) {
        let connection = &self.all[key];
        let busy = connection.receiving
            || connection.batch.is_none()
            || connection.session.in_flight() > 0;
        if !connection.is_gone() || busy {
            return;
        }
        if connection.watch == Watch::On {
            // The end of the watch brings us here again.
            let _ = shutdown(connection.socket.as_fd(), Shutdown::Both);
            return;
        }
        let Connection { socket, mut session, volume, .. } = self.all.remove(key);
        core.ring.close(socket);
        self.inbox.closed();
        session.closed(&volumes[volume].recorder);
        volumes.unmount(volume, core);
    }

    /// Takes no more requests of any connection, present or future.
    pub(crate) fn drain_all(&mut self) {
        self.draining = true;
        for key in self.keys(|_| true) {
            self.shut_down(key);
        }
    }

    /// Ends the connections that have one of these keys.
    pub(crate) fn end(
        &mut self,
        wanted: &HashSet<u64>,
        ending: Ending,
        core: &mut Core,
        volumes: &mut Volumes,
    ) {
        for key in self.keys(|one| one.key.is_some_and(|key| wanted.contains(&key))) {
            match ending {
                Ending::InOrder => self.shut_down(key),
                Ending::AtOnce => self.cut(key, core, volumes),
            }
        }
    }

    /// Ends the connections of a device, even with requests in flight.
    pub(crate) fn abandon(&mut self, device: u64, core: &mut Core, volumes: &mut Volumes) {
        for key in self.keys(|one| one.key == Some(device)) {
            self.cut(key, core, volumes);
        }
    }

    fn shut_down(&mut self, key: usize) {
        self.drain(key);
        // Ends a receive that waits for a request; replies can still be sent.
        let _ = shutdown(self.all[key].socket.as_fd(), Shutdown::Read);
    }

    fn cut(&mut self, key: usize, core: &mut Core, volumes: &mut Volumes) {
        self.fail(key, &io::ErrorKind::ConnectionAborted.into(), core, volumes);
    }

    /// Quiesces the connections that have a key; each is sent to `to` when it is quiescent.
    pub(crate) fn quiesce(&mut self, to: Sender<Quiesced>) {
        self.quiesced_to = Some(to);
        for key in self.keys(|one| one.key.is_some() && one.phase == Phase::Open) {
            self.all[key].enter(Phase::Quiescing, None);
            self.touch(key);
        }
    }

    /// Serves the connections again that are not quiescent yet.
    pub(crate) fn resume(&mut self) {
        self.quiesced_to = None;
        for key in self.keys(|one| one.phase == Phase::Quiescing) {
            self.all[key].enter(Phase::Open, None);
            self.touch(key);
        }
    }

    /// Whether a receive failed because it was cancelled to quiesce its connection.
    fn is_cancelled_to_quiesce(&self, key: usize, error: &io::Error) -> bool {
        let is_cancelled = Errno::from_io_error(error) == Some(Errno::CANCELED);
        is_cancelled && self.all[key].key.is_some()
    }

    /// Gives a quiescing connection away if it is quiescent.
    fn hand_out_if_quiescent(&mut self, key: usize, core: &mut Core, volumes: &mut Volumes) {
        let Some(connection) = self.all.get(key) else { return };
        if connection.phase != Phase::Quiescing {
            return;
        }
        let (Some(to), Some(assigned)) = (&self.quiesced_to, connection.key) else { return };
        if !connection.session.is_quiescent() || connection.batch.is_none() {
            return;
        }
        if connection.receiving || connection.watch == Watch::On {
            // The receive's completion brings us here again, possibly with a request.
            return core.ring.cancel(&connection.socket);
        }
        let mut connection = self.all.remove(key);
        let socket = core.ring.release(connection.socket);
        match to.send(Quiesced { key: assigned, socket }) {
            Ok(()) => {
                connection.session.closed(&volumes[connection.volume].recorder);
                self.inbox.closed();
                volumes.unmount(connection.volume, core);
            }
            // It took too long: the receiver is gone.
            Err(SendError(Quiesced { socket, .. })) => {
                connection.socket = core.ring.adopt(socket);
                connection.enter(Phase::Open, None);
                let key = self.all.insert(connection);
                self.touch(key);
            }
        }
    }

    fn keys(&self, is_wanted: impl Fn(&Connection) -> bool) -> Vec<usize> {
        self.all.iter().filter(|(_, one)| is_wanted(one)).map(|(key, _)| key).collect()
    }

    fn call(
        &mut self,
        key: usize,
        core: &mut Core,
        volumes: &mut Volumes,
        call: impl FnOnce(&mut dyn Session, &mut Cx<'_>),
    ) {
        let Connection { session, volume, .. } = &mut self.all[key];
        let Lent { backend, waiting, recorder, mut io, .. } =
            volumes.lend(*volume, core, CONNECTION_SUBMIT_FROM);
        let (io, connection) = (&mut io, key as u32);
        let mut cx = Cx { backend, waiting, io, recorder, connection, has_started: false };
        call(&mut **session, &mut cx);
        if cx.has_started {
            volumes.touch(*volume);
        }
    }

    fn touch(&mut self, key: usize) {
        let connection = &mut self.all[key];
        if !connection.touched {
            connection.touched = true;
            self.touched.push(key);
        }
    }
}
