//! Connections of devices that are to rest, go on in another process, or end at once.

use std::io;
use std::sync::mpsc::{SendError, Sender};

use rustix::io::Errno;

use crate::engine::Released;
use crate::shard::Shard;

impl Shard {
    /// Brings connections that have a name to rest.
    pub(crate) fn begin_release(&mut self, to: &Sender<Released>) {
        for key in self.named(|_| true) {
            self.connections[key].leaving = Some(to.clone());
            self.connections[key].session.leave();
            self.touch(key);
        }
    }

    /// Serves those on that are not at rest yet.
    pub(crate) fn end_release(&mut self) {
        for key in self.named(|_| true) {
            self.connections[key].leaving = None;
            self.connections[key].session.stay();
            self.touch(key);
        }
    }

    /// Cuts the connections that have this name, whatever they have in flight.
    pub(crate) fn cut(&mut self, name: u64) {
        for key in self.named(|found| found == name) {
            self.fail(key, &io::ErrorKind::ConnectionAborted.into());
        }
    }

    /// Whether that is how a receive ends that was cancelled because its connection is to rest.
    pub(crate) fn is_leaving(&self, key: usize, error: &io::Error) -> bool {
        let is_cancelled = Errno::from_io_error(error) == Some(Errno::CANCELED);
        is_cancelled && self.connections[key].name.is_some()
    }

    /// Gives a connection away that is at rest.
    pub(crate) fn release_if_left(&mut self, key: usize) {
        let Some(connection) = self.connections.get(key) else { return };
        let (Some(to), Some(name)) = (connection.leaving.clone(), connection.name) else { return };
        if !connection.session.has_left() || connection.batch.is_none() {
            return;
        }
        if connection.receiving {
            // The end of the receive brings us here again; it may have brought a request.
            return self.ring.cancel(&connection.socket);
        }
        let mut connection = self.connections.remove(key);
        let socket = self.ring.release(connection.socket);
        match to.send(Released { name, socket }) {
            Ok(()) => {
                connection.session.closed(&self.volumes[connection.volume].recorder);
                self.inbox.closed();
                self.unmount(connection.volume);
            }
            // It took too long, and nobody waits any more.
            Err(SendError(Released { socket, .. })) => {
                connection.leaving = None;
                connection.session.stay();
                connection.socket = self.ring.adopt(socket);
                connection.touched = false;
                let key = self.connections.insert(connection);
                self.touch(key);
            }
        }
    }

    fn named(&self, is_wanted: impl Fn(u64) -> bool) -> Vec<usize> {
        let all = self.connections.iter();
        let named = all.filter(|(_, connection)| connection.name.is_some_and(&is_wanted));
        named.map(|(key, _)| key).collect()
    }
}
