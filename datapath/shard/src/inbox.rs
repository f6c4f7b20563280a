//! Commands to a shard from other threads.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Sender, SyncSender};
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use sheave_core::{Error, ErrorKind, Volume};

use crate::assignment::{Assignment, QueueAssignment, Released, Served};
use crate::doorbell::Doorbell;
use crate::ending::Ending;

/// Commands that wait for a shard to take them.
const INBOX_MAX: usize = 1024;
/// How soon a command is sent again to a shard whose inbox is full.
pub(crate) const TELL_RETRY: Duration = Duration::from_millis(1);

pub(crate) enum Command {
    Serve(Assignment),
    /// Open this volume and keep it so.
    Open(Served, Sender<Result<(), Error>>),
    /// That is not needed any more.
    Close(Arc<dyn Volume>),
    ServeQueue(QueueAssignment, Served, Sender<()>),
    /// Bring connections that have a name to rest and give them back.
    Release(Sender<Released>),
    /// Stop doing so.
    Stay,
    /// End all I/O of this device with errors.
    Abandon(u64),
    /// End the connections that have these names.
    End(Arc<HashSet<u64>>, Ending),
    /// Answer with this number.
    Echo(usize, SyncSender<usize>),
    Stop,
}

/// Commands to a shard, and its load as other threads see it.
pub(crate) struct Inbox {
    commands: ArrayQueue<Command>,
    pub(crate) bell: Arc<Doorbell>,
    connections: AtomicUsize,
}

impl Inbox {
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn new() -> io::Result<Self> {
        Self::of(INBOX_MAX)
    }

    /// One with room for so many commands.
    pub(crate) fn of(commands_max: usize) -> io::Result<Self> {
        let (commands, bell) = (ArrayQueue::new(commands_max), Arc::new(Doorbell::new()?));
        Ok(Self { commands, bell, connections: AtomicUsize::new(0) })
    }

    /// Connections and queues that the shard has, or is about to have.
    pub(crate) fn load(&self) -> usize {
        self.connections.load(Relaxed)
    }

    pub(crate) fn take(&self) -> Option<Command> {
        self.commands.pop()
    }

    pub(crate) fn counted(&self) {
        self.connections.fetch_add(1, Relaxed);
    }

    pub(crate) fn closed(&self) {
        self.connections.fetch_sub(1, Relaxed);
    }

    pub(crate) fn assign(&self, command: Command) -> Result<(), Error> {
        self.counted();
        self.send(command).map_err(|_| {
            self.closed();
            let what = format!("a shard has {INBOX_MAX} connections waiting");
            Error::new(ErrorKind::Busy, "serve", what)
        })
    }

    pub(crate) fn send(&self, command: Command) -> Result<(), Command> {
        self.commands.push(command)?;
        self.bell.ring();
        Ok(())
    }
}
