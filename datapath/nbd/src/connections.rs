//! The connections of an export, and the bytes of each.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sheave_telemetry::VolumeStats;

use crate::acceptor::ClientSlot;
use crate::access::Client;

/// The connections of a volume that is offered or was. They outlive its place in the set.
pub(crate) struct Users {
    pub(crate) stats: Arc<VolumeStats>,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
}

/// One connection. Aligned so that no two shards write to one cache line.
#[repr(align(64))]
pub(crate) struct Connection {
    /// Its key in the engine ([`sheave_shard::Assignment::key`]).
    pub(crate) id: u64,
    pub(crate) peer: String,
    pub(crate) client: Client,
    /// The export's name when it was opened.
    pub(crate) export: String,
    since: Instant,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// A connection among those of its export, which it leaves when this is dropped. The only writer of
/// its counters.
pub(crate) struct Attached {
    users: Arc<Users>,
    connection: Arc<Connection>,
    /// Freed for another client on drop.
    _slot: Option<ClientSlot>,
}

/// A connection for statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientSnapshot {
    /// Address and port, or process and user at a unix socket.
    pub peer: String,
    /// The first name in its certificate, if it has one.
    pub certificate: Option<String>,
    /// How long it has been connected.
    pub connected: Duration,
    /// Payload bytes of its reads that succeeded.
    pub bytes_read: u64,
    /// Payload bytes of its writes that succeeded.
    pub bytes_written: u64,
}

impl Users {
    pub(crate) fn new(stats: Arc<VolumeStats>) -> Arc<Self> {
        Arc::new(Self { stats, connections: Mutex::default() })
    }

    /// Adds a connection, with its slot among all.
    pub(crate) fn attach(
        self: &Arc<Self>,
        id: u64,
        slot: Option<ClientSlot>,
        peer: String,
        client: Client,
        export: &str,
    ) -> Attached {
        let connection = Arc::new(Connection {
            id,
            peer,
            client,
            export: export.to_owned(),
            since: Instant::now(),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
        });
        self.lock().insert(id, Arc::clone(&connection));
        Attached { users: Arc::clone(self), connection, _slot: slot }
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// All connections, the oldest first.
    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        let mut all: Vec<_> = self.lock().values().cloned().collect();
        all.sort_by_key(|connection| connection.id);
        all
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        // Entries are added and removed whole.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// The bytes that it has moved so far.
    pub(crate) fn count(&self, bytes_read: u64, bytes_written: u64) {
        self.bytes_read.store(bytes_read, Relaxed);
        self.bytes_written.store(bytes_written, Relaxed);
    }

    pub(crate) fn snapshot(&self) -> ClientSnapshot {
        ClientSnapshot {
            peer: self.peer.clone(),
            certificate: self.client.names.first().cloned(),
            connected: self.since.elapsed(),
            bytes_read: self.bytes_read.load(Relaxed),
            bytes_written: self.bytes_written.load(Relaxed),
        }
    }
}

impl Deref for Attached {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.users.lock().remove(&self.connection.id);
    }
}
