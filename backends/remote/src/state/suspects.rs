//! Requests that a server may die of.
//!
//! A request that several connections broke over is a suspect. Suspects are sent when all else has
//! been, one at a time, and each after an answer to something harmless on the same connection. So a
//! break over a suspect is the fault of no other request, nor of a server that answers nothing.

use std::collections::VecDeque;

use sheave_core::{ByteRange, Error, ErrorKind, Op};

use super::State;
use crate::job::{BREAKS_MAX, Owner};

impl State {
    /// A connection has broken with these requests unanswered.
    pub(super) fn blame(&mut self, index: usize) {
        let Some(line) = self.lines.get(index).filter(|line| !line.is_over) else { return };
        for key in line.client.states() {
            self.jobs[*key].breaks += 1;
        }
    }

    /// A read of a block that the suspect does not touch, if there is one.
    pub(super) fn probe_beside(&mut self, suspect: usize) -> usize {
        let (block, size) = (self.promised.info.block, self.promised.size);
        let len = u64::from(block.logical.max(block.minimum)).min(size);
        let block_at = |at| ByteRange::within(at, len.min(size - at), size).expect("a block of it");
        let touches = |range: ByteRange| range.start() < len;
        let range = match self.jobs[suspect].op.range() {
            Some(range) if touches(range) => block_at((size - 1) / len * len),
            _ => block_at(0),
        };
        self.insert(Owner::Probe, Op::Read { range, into: None }, 0)
    }

    /// A write that is to be repeated.
    pub(super) fn insert_replay(&mut self, op: Op) -> usize {
        let breaks = op.range().and_then(|range| self.replay_breaks.get(&range.start()).copied());
        let key = self.insert(Owner::Replay, op, 0);
        self.jobs[key].breaks = breaks.unwrap_or(0);
        key
    }

    /// Remembers the breaks of writes that were being repeated: they will be again, as other jobs.
    pub(super) fn remember_replays(&mut self) {
        let replays = self.jobs.iter().filter(|(_, job)| job.owner == Owner::Replay);
        let broken = replays.filter(|(_, job)| job.breaks > 0);
        self.replay_breaks
            .extend(broken.filter_map(|(_, job)| Some((job.op.range()?.start(), job.breaks))));
    }

    /// The jobs in the order in which they are to be sent: suspects last.
    pub(super) fn in_order(&self) -> VecDeque<usize> {
        let mut keys: Vec<_> = self.jobs.iter().map(|(key, _)| key).collect();
        // Writes may wait for the volume's flush.
        keys.sort_by_key(|key| (self.jobs[*key].owner != Owner::Volume, self.jobs[*key].number));
        let mut writes: Vec<ByteRange> = Vec::new();
        let (mut first, mut last) = (VecDeque::new(), Vec::new());
        for key in keys {
            let job = &self.jobs[key];
            let written = job.op.range().filter(|_| job.op.kind().is_write());
            // Writes to the same bytes keep their order.
            let follows = |range: ByteRange| writes.iter().any(|write| write.overlaps(range));
            let is_late = job.is_suspect() && job.owner != Owner::Volume;
            if is_late || written.is_some_and(follows) {
                writes.extend(written);
                last.push(key);
            } else {
                first.push_back(key);
            }
        }
        first.extend(last);
        first
    }

    /// Ends the requests that the server was given often enough.
    ///
    /// # Errors
    /// What is lost if one of them is the volume's.
    pub(super) fn give_up_suspects(&mut self) -> Result<(), String> {
        if let Some((at, _)) = self.replay_breaks.iter().find(|(_, breaks)| **breaks >= BREAKS_MAX)
        {
            return Err(format!(
                "{BREAKS_MAX} connections broke over the repetition of a write at {at}"
            ));
        }
        let mut keys = Vec::new();
        keys.extend(
            self.jobs.iter().filter(|(_, job)| job.breaks >= BREAKS_MAX).map(|(key, _)| key),
        );
        for key in keys {
            let (op, owner) = (&self.jobs[key].op, self.jobs[key].owner);
            let name = op.kind().name();
            let place = op.range().map_or_else(String::new, |range| {
                format!(" of {} bytes at {}", range.len(), range.start())
            });
            let why = format!("{BREAKS_MAX} connections broke over this {name}{place}");
            match owner {
                Owner::User(user, _) => self.wake(user),
                Owner::Volume if self.is_much_kept() => return Err(why),
                Owner::Volume => self.early_flush_failed(),
                Owner::Gone | Owner::Replay | Owner::Probe => {}
            }
            let why = format!("{}: {why}; see the log of the server", self.options.name);
            tracing::error!("a request is given up: {why}");
            self.complete(key, Err(Error::new(ErrorKind::Io, name, why)), None);
        }
        Ok(())
    }
}
