//! Connections that go on in another process.

use std::io;
use std::sync::mpsc::{SendError, Sender};

use rustix::io::Errno;

use crate::engine::Released;
use crate::shard::Shard;

impl Shard {
    /// Brings connections that have a name to rest.
    pub(crate) fn begin_release(&mut self, to: Sender<Released>) {
        self.releasing = Some(to);
        for key in self.named() {
            self.connections[key].session.leave();
            self.touch(key);
        }
        self.forget_if_released();
    }

    /// Serves those on that are not at rest yet.
    pub(crate) fn end_release(&mut self) {
        self.releasing = None;
        for key in self.named() {
            self.connections[key].session.stay();
            self.touch(key);
        }
    }

    /// Whether that is how a receive ends that was cancelled because its connection is to rest.
    pub(crate) fn is_leaving(&self, key: usize, error: &io::Error) -> bool {
        let is_cancelled = Errno::from_io_error(error) == Some(Errno::CANCELED);
        is_cancelled && self.connections[key].name.is_some()
    }

    /// Gives a connection away that is at rest.
    pub(crate) fn release_if_left(&mut self, key: usize) {
        let Some(to) = self.releasing.clone() else { return };
        let Some(connection) = self.connections.get(key) else { return };
        let Some(name) = connection.name else { return };
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
                self.release(connection.volume);
                self.forget_if_released();
            }
            // It took too long, and nobody waits any more.
            Err(SendError(Released { socket, .. })) => {
                connection.session.stay();
                connection.socket = self.ring.adopt(socket);
                connection.touched = false;
                let key = self.connections.insert(connection);
                self.touch(key);
            }
        }
    }

    /// Tells whoever waits that there are no more.
    fn forget_if_released(&mut self) {
        if self.named().is_empty() {
            self.releasing = None;
        }
    }

    fn named(&self) -> Vec<usize> {
        let all = self.connections.iter();
        all.filter(|(_, connection)| connection.name.is_some()).map(|(key, _)| key).collect()
    }
}
