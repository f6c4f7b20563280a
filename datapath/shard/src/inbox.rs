//! Commands to a shard from other threads.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Sender, SyncSender};
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use sheave_core::{Error, ErrorKind, Volume};

use crate::assignment::{Assignment, QueueAssignment, Quiesced, Served};
use crate::doorbell::Doorbell;
use crate::ending::Ending;

/// The most commands that wait for a shard.
const INBOX_MAX: usize = 1024;
/// When a shard's inbox is full, its sender tries again after this time.
pub(crate) const TELL_RETRY: Duration = Duration::from_millis(1);

pub(crate) enum Command {
    Serve(Assignment),
    /// Open this volume and keep it open until [`Command::Close`].
    Open(Served, Sender<Result<(), Error>>),
    /// Close a volume that was opened by [`Command::Open`].
    Close(Arc<dyn Volume>),
    ServeQueue(QueueAssignment, Served, Sender<()>),
    /// Quiesce all connections that have a key; each is sent back when it is quiescent.
    Quiesce(Sender<Quiesced>),
    /// Serve the connections again that are not quiescent yet.
    Resume,
    /// Complete all I/O of the device with this key with errors.
    Abandon(u64),
    /// End the connections with these keys.
    End(Arc<HashSet<u64>>, Ending),
    /// Answer with this number.
    Echo(usize, SyncSender<usize>),
    Stop,
}

/// Commands to a shard, and its load, which other threads read.
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

    /// An inbox with room for `commands_max` commands.
    pub(crate) fn of(commands_max: usize) -> io::Result<Self> {
        let (commands, bell) = (ArrayQueue::new(commands_max), Arc::new(Doorbell::new()?));
        Ok(Self { commands, bell, connections: AtomicUsize::new(0) })
    }

    /// Connections and queues of the shard, those in its inbox included.
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
