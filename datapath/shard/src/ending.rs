//! Connections that end while others go on.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use crate::Engine;
use crate::engine::{Command, Kind};
use crate::shard::Shard;

/// How connections end that others outlive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Requests in flight are answered; no more are taken.
    InOrder,
    /// Whatever is in flight.
    AtOnce,
}

impl Engine {
    /// Ends the connections that have these names ([`crate::Assignment::name`]). Does not wait for
    /// it: with [`Ending::InOrder`] a connection lasts until its client has read all replies.
    pub fn end(&self, names: HashSet<u64>, ending: Ending) {
        match &self.kind {
            Kind::Threads(threads) => threads.end(&names, ending),
            Kind::Ring(_) => {
                let names = Arc::new(names);
                self.tell(|| Command::End(Arc::clone(&names), ending));
            }
        }
    }
}

impl Shard {
    /// Ends the connections that have one of these names.
    pub(crate) fn end(&mut self, names: &HashSet<u64>, ending: Ending) {
        let all = self.connections.iter();
        let has = |name: Option<u64>| name.is_some_and(|name| names.contains(&name));
        let named = all.filter(|(_, connection)| has(connection.name));
        for key in named.map(|(key, _)| key).collect::<Vec<_>>() {
            match ending {
                Ending::InOrder => self.shut_down(key),
                Ending::AtOnce => self.fail(key, &io::ErrorKind::ConnectionAborted.into()),
            }
        }
    }
}
