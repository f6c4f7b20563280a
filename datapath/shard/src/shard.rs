//! The loop of a shard: take all completions, process them, send all replies, wait.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use sheave_core::{Buf, IoDone, IoRequest, IoToken, Nanos};
use sheave_ring::{Event, Probe, Ring, RingConfig};

use crate::Clock;
use crate::connections::Connections;
use crate::core::Core;
use crate::ending::STOP_GRACE;
use crate::inbox::{Command, Inbox};
use crate::poll::AdaptivePoll;
use crate::queues::Queues;
use crate::tags::{queue_of, untag};
use crate::volumes::{Progress, Volumes};
use crate::waker::Woken;

/// File requests of this "volume" are the shard's own: reads of its bell.
const BELL: u32 = u32::MAX;

/// The loop of one thread. It hands each event to the connection, queue or volume that it belongs
/// to.
pub(crate) struct Shard {
    core: Core,
    volumes: Volumes,
    connections: Connections,
    queues: Queues,
    poll: AdaptivePoll,
    inbox: Arc<Inbox>,
    /// The inbox's bell, which is read through the ring, and the buffer for that.
    bell: Arc<File>,
    bell_count: Buf,
    /// When the shard is stopping: the time until which connections may finish.
    stop_by: Option<Nanos>,
}

impl Shard {
    pub(crate) fn new(
        probe: &Probe,
        poll_limit: Nanos,
        clock: Clock,
        inbox: Arc<Inbox>,
    ) -> io::Result<Self> {
        let bell = inbox.bell.as_fd().try_clone_to_owned()?;
        let ring = Ring::new(probe, RingConfig::default())?;
        let mut shard = Self {
            core: Core::new(ring, clock, Arc::clone(&inbox.bell)),
            volumes: Volumes::new(Woken::new(Arc::clone(&inbox.bell))),
            connections: Connections::new(Arc::clone(&inbox)),
            queues: Queues::new(Arc::clone(&inbox)),
            poll: AdaptivePoll::new(poll_limit),
            inbox,
            bell: Arc::new(File::from(bell)),
            bell_count: Buf::zeroed(8),
            stop_by: None,
        };
        shard.watch_bell();
        Ok(shard)
    }

    /// Serves until the shard is stopped.
    ///
    /// # Errors
    /// When the ring itself fails, which ends all its connections.
    pub(crate) fn run(mut self) -> io::Result<()> {
        while self.turn()? {}
        Ok(())
    }

    /// Waits for events and processes them. False when the shard has stopped.
    fn turn(&mut self) -> io::Result<bool> {
        self.pause()?;
        self.core.now = self.core.clock.now();
        while let Some(event) = self.core.ring.next_event() {
            self.dispatch(event);
        }
        if self.inbox.bell.answer() {
            self.take_commands();
            self.volumes.touch_woken();
            self.core.inline.take_written();
        }
        self.volumes.touch_due(self.core.now);
        self.reap();
        self.connections.settle(&mut self.core, &mut self.volumes);
        self.queues.settle(&mut self.core, &mut self.volumes);
        let now = self.core.now;
        Ok(!self.stop_by.is_some_and(|by| self.connections.is_empty() || now >= by))
    }

    /// Waits for a completion: polls while that pays, then sleeps.
    fn pause(&mut self) -> io::Result<()> {
        if self.core.ring.poll()? || !self.core.inline.is_empty() || self.has_touched() {
            return Ok(());
        }
        let began = self.core.clock.now();
        let due = self.deadline();
        if due.is_some_and(|due| due <= began) {
            return Ok(());
        }
        // A poll would take the processor that a writer could use, and writes take longer.
        let is_behind = self.core.inline.is_behind();
        let budget = if is_behind { 0 } else { self.poll.budget() };
        let mut now = began;
        while now - began < budget {
            std::hint::spin_loop();
            let hit = self.core.ring.poll()? || self.inbox.bell.has_rung();
            now = self.core.clock.now();
            if hit || due.is_some_and(|due| due <= now) {
                self.poll.paused(now - began, budget, true);
                return Ok(());
            }
        }
        if !self.inbox.bell.lie_down() {
            return Ok(());
        }
        let waited = self.core.ring.wait(due.map(|due| Duration::from_nanos(due - now)));
        self.inbox.bell.get_up();
        waited?;
        self.poll.paused(self.core.clock.now() - began, budget, false);
        Ok(())
    }

    fn has_touched(&self) -> bool {
        self.connections.has_touched() || self.queues.has_touched() || self.volumes.has_touched()
    }

    /// When to wake even without a completion.
    fn deadline(&self) -> Option<Nanos> {
        self.volumes.deadline().into_iter().chain(self.stop_by).min()
    }

    fn dispatch(&mut self, event: Event) {
        let Self { core, volumes, connections, queues, .. } = self;
        match event {
            Event::Received { user, result } => {
                connections.received(user as usize, result, core, volumes);
            }
            Event::NoBuffer { user } => connections.not_received(user as usize),
            Event::Landed { user, result, payload } => {
                connections.received_into(user as usize, payload, result, core, volumes);
            }
            Event::Sent { user, result, batch } => {
                connections.sent(user as usize, result, batch, core, volumes);
            }
            Event::Watched { user, is_gone } => connections.watched(user as usize, is_gone),
            // Commands and wakes are taken after all events.
            Event::File { user: (BELL, _), .. } => self.watch_bell(),
            Event::File { user: (volume, token), result, request } => {
                volumes.io_done(volume, IoDone { token: IoToken(token), request, result }, core);
            }
            Event::Command { user: (key, slot), result } => {
                queues.commanded(key as usize, slot, result, core, volumes);
            }
        }
    }

    /// Hands the progress of ops to the connections and queues that they belong to.
    fn reap(&mut self) {
        let Self { core, volumes, connections, queues, .. } = self;
        while let Some((volume, done)) = core.inline.next_done() {
            volumes.io_done(volume, done, core);
        }
        volumes.touch_crowded();
        while let Some(volume) = volumes.next_touched() {
            while let Some(Progress { tag, was_waiting, outcome }) = volumes.next(volume, core) {
                let (owner, request) = untag(tag);
                let queue = queue_of(owner);
                if was_waiting {
                    match queue {
                        Some(key) => queues.taken(key, request, core),
                        None => connections.taken(owner as usize, request, core),
                    }
                }
                match (outcome, queue) {
                    (None, _) => {}
                    (Some(outcome), Some(key)) => {
                        queues.completed(key, request, outcome, core, volumes);
                    }
                    (Some(outcome), None) => {
                        connections.completed(owner as usize, request, outcome, core, volumes);
                    }
                }
            }
            volumes.visited(volume);
        }
    }

    fn take_commands(&mut self) {
        let Self { core, volumes, connections, queues, inbox, stop_by, .. } = self;
        while let Some(command) = inbox.take() {
            // The receiver of an answer may have gone.
            match command {
                Command::Serve(assignment) => connections.open(assignment, core, volumes),
                Command::Open(served, to) => drop(to.send(volumes.open(&served, core))),
                Command::Close(volume) => volumes.close(&volume, core),
                Command::ServeQueue(queue, served, to) => {
                    queues.open(queue, &served, core, volumes);
                    let _ = to.send(());
                }
                Command::Quiesce(to) => connections.quiesce(to),
                Command::Resume => connections.resume(),
                Command::Abandon(key) => {
                    connections.abandon(key, core, volumes);
                    queues.abandon(key, core, volumes);
                }
                Command::End(keys, ending) => connections.end(&keys, ending, core, volumes),
                Command::Echo(index, answer) => drop(answer.try_send(index)),
                Command::Stop => {
                    *stop_by = Some(core.now + STOP_GRACE.as_nanos() as Nanos);
                    connections.drain_all();
                }
            }
        }
    }

    fn watch_bell(&mut self) {
        let (file, into) = (Arc::clone(&self.bell), self.bell_count.clone());
        let request = IoRequest::Read { file, at: 0, into };
        self.core.ring.start_unbounded(request, (BELL, 0));
    }
}

#[cfg(test)]
mod tests;
