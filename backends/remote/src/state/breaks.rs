//! The end of connections, and what comes of it. The rules are in docs/decisions/0008.

use std::sync::atomic::Ordering::Release;
use std::time::Instant;

use sheave_core::{Error, ErrorKind, Result, VolumeInfo};
use sheave_proto::ClientNegotiated;

use super::{Failure, LIVED, Phase, State};
use crate::connect::Connected;
use crate::job::Owner;
use crate::kept::Kept;
use crate::line::Line;

/// What the volume's users were promised, which a server must keep.
#[derive(Clone, Debug)]
pub(crate) struct Promised {
    pub(crate) info: VolumeInfo,
    pub(crate) size: u64,
    /// The export's name as the server has it.
    pub(crate) name: Option<String>,
}

impl Promised {
    pub(crate) fn of(negotiated: &ClientNegotiated) -> Self {
        let (size, name) = (negotiated.size, negotiated.name.clone());
        Self { info: negotiated.volume_info(), size, name }
    }

    /// What a server no longer keeps of it.
    fn broken_by(&self, negotiated: &ClientNegotiated) -> Option<String> {
        let (old, new) = (&self.info, negotiated.volume_info());
        if negotiated.size < self.size {
            let (from, to) = (self.size, negotiated.size);
            return Some(format!("the export has shrunk from {from} to {to} bytes"));
        }
        if new.read_only && !old.read_only {
            return Some("the export is read-only now".to_owned());
        }
        let (before, now) = (old.block, new.block);
        if now.minimum > before.minimum
            || now.logical != before.logical
            || now.maximum_payload < before.maximum_payload
        {
            return Some(format!(
                "the export's block sizes have changed: minimum {} to {}, maximum {} to {} bytes",
                before.minimum, now.minimum, before.maximum_payload, now.maximum_payload
            ));
        }
        if let (Some(before), Some(now)) = (&self.name, &negotiated.name)
            && before != now
        {
            return Some(format!("the export is called {now:?} now, and was {before:?}"));
        }
        let can = [
            (old.can.flush, new.can.flush, "flush"),
            (old.can.fua, new.can.fua, "FUA"),
            (old.can.trim, new.can.trim, "trim"),
            (old.can.write_zeroes, new.can.write_zeroes, "zeroing"),
            (old.can.fast_zero, new.can.fast_zero, "fast zeroing"),
            (old.can.cache, new.can.cache, "prefetching"),
            (old.can.block_status, new.can.block_status, "block status"),
        ];
        let missing = can.iter().find(|(had, has, _)| *had && !has);
        missing.map(|(_, _, what)| format!("the server no longer has {what}"))
    }
}

impl State {
    /// A connection has broken, maybe because of a request that the server had.
    pub(super) fn line_broke(&mut self, index: usize, why: &str) {
        self.blame(index);
        self.end_line(index, why);
    }

    /// Ends a connection. A server that restarts ends them all, and a single one cannot tell, so
    /// all are made again, once the others have what they are owed.
    pub(super) fn end_line(&mut self, index: usize, why: &str) {
        // The volume may have failed meanwhile.
        let Some(line) = self.lines.get_mut(index) else { return };
        line.is_over = true;
        line.shut_down();
        self.ending.get_or_insert_with(|| why.to_owned());
        self.end_if_nothing_is_owed();
    }

    /// Gives the connections up if they are about to be made again and nothing holds that back.
    pub(super) fn end_if_nothing_is_owed(&mut self) {
        if !self.lines.iter().any(Line::is_owed)
            && let Some(why) = self.ending.take()
        {
            self.broke(&why);
        }
    }

    /// The connections are of no more use. What was sent and not answered waits for new ones.
    fn broke(&mut self, why: &str) {
        self.ending = None;
        if self.lines.is_empty() {
            return;
        }
        self.lines.drain(..).for_each(|line| line.shut_down());
        self.writing.clear();
        self.alone = None;
        self.remember_replays();
        self.jobs.retain(|_, job| {
            job.taken_back();
            !matches!(job.owner, Owner::Probe | Owner::Replay)
        });
        if self.unkept > self.stable {
            return self.lost(&format!("the connection ended: {why}"));
        }
        if let Err(why) = self.give_up_suspects() {
            return self.lost(&why);
        }
        self.waiting = self.in_order();
        if self.up_since.elapsed() >= LIVED {
            self.failures = 0;
        }
        self.epoch += 1;
        self.effects.reconnect = Some((self.epoch, self.failures));
        self.failures += 1;
        self.away_since.get_or_insert_with(Instant::now);
        self.phase = Phase::Down { has_expired: false };
        let (waiting, kept) = (self.waiting.len(), self.kept.bytes());
        tracing::warn!(
            server = %self.options.name, why, waiting, kept,
            "the connection is lost and is being made again; requests wait"
        );
        // It may come back again and again without answering anything.
        self.expire(self.epoch);
    }

    /// The export has so many bytes now. All that is sent from now on waits for connections that
    /// know it.
    ///
    /// # Errors
    /// When connections cannot be given up without a loss.
    pub(crate) fn grown(&mut self, size: u64) -> Result<()> {
        let is_writing = !self.keeps() && self.promised.info.can.flush && !self.writing.is_empty();
        if self.unkept > self.stable || is_writing {
            let why = format!(
                "{}: flush first: the connection has to be made again, and replay-bytes=0 keeps \
                 nothing",
                self.options.name
            );
            return Err(Error::new(ErrorKind::Busy, "resize", why));
        }
        self.promised.size = self.promised.size.max(size);
        if self.wants(self.epoch) {
            // A connection that is being made may have been negotiated before.
            self.epoch += 1;
            self.effects.reconnect = Some((self.epoch, self.failures));
        }
        if !self.lines.is_empty() {
            self.ending.get_or_insert_with(|| "the export has grown".to_owned());
        }
        self.end_if_nothing_is_owed();
        self.wake_all(|_| true);
        Ok(())
    }

    /// Whether connections are wanted for this epoch.
    pub(crate) fn wants(&self, epoch: u64) -> bool {
        epoch == self.epoch && matches!(self.phase, Phase::Down { .. })
    }

    /// Goes on with new connections, if they are still wanted.
    pub(crate) fn arrived(&mut self, epoch: u64, connections: Vec<Connected>) {
        if !self.wants(epoch) {
            return;
        }
        let broken = |new: &Connected| self.promised.broken_by(&new.negotiated);
        if let Some(why) = connections.iter().find_map(broken) {
            return self.changed(&why);
        }
        for connected in connections {
            self.next_line += 1;
            self.lines.push(Line::new(self.next_line, connected));
        }
        if let Some(why) = self.lines.iter_mut().find_map(|line| line.take_early().err()) {
            return self.broke(&why);
        }
        self.reconnects += u64::from(epoch > 0);
        self.up_since = Instant::now();
        self.replay();
        if epoch == 0 && self.promised.info.can.flush && !self.promised.info.read_only {
            // What another process has written and not flushed is not kept here.
            self.flush();
        }
        self.wake_all(|_| true);
    }

    /// Sends again what the server may have lost, before anything else.
    fn replay(&mut self) {
        let client = &self.lines[0].client;
        let ops = self.kept.ops(|op| client.len_max(op.kind()));
        self.phase = match ops.len() {
            0 => Phase::Up,
            left => Phase::Replaying { left },
        };
        let mut suspects = Vec::new();
        for op in ops {
            let key = self.insert_replay(op);
            match self.jobs[key].is_suspect() {
                true => suspects.push(key),
                false => self.lines[0].queue.push_back(key),
            }
        }
        let probe = suspects.first().map(|key| self.probe_beside(*key));
        self.lines[0].queue.extend(probe.into_iter().chain(suspects));
    }

    /// The server has been away for too long.
    pub(crate) fn expire(&mut self, epoch: u64) {
        let limit = self.options.reconnect_timeout;
        let is_over = limit.zip(self.away_since).is_some_and(|(most, at)| at.elapsed() >= most);
        let has_expired = matches!(self.phase, Phase::Down { has_expired: true });
        if !is_over || has_expired || !self.wants(epoch) {
            return;
        }
        let failure = self.away();
        if !self.kept.is_empty() {
            let limit = self.options.reconnect_timeout.unwrap_or_default().as_secs();
            return self.lost(&format!("the server has been away for more than {limit} s"));
        }
        self.phase = Phase::Down { has_expired: true };
        tracing::error!("requests fail: {}", failure.why);
        self.end_all(&failure);
    }

    /// Data that was written may be lost, so nothing can be relied on any more.
    pub(super) fn lost(&mut self, why: &str) {
        self.has_lost.store(true, Release);
        let why = format!(
            "{}: {why}; what was written since the last flush may be lost, and nothing more is \
             accepted until the volume is opened again",
            self.options.name
        );
        self.fail(Failure::new(ErrorKind::Io, why));
    }

    /// The server serves something else than before.
    fn changed(&mut self, why: &str) {
        if !self.kept.is_empty() {
            return self.lost(why);
        }
        let uri = &self.options.name;
        let why = format!("{uri}: {why}; open the volume again to use it as it is now");
        self.fail(Failure::new(ErrorKind::Io, why));
    }

    fn fail(&mut self, failure: Failure) {
        tracing::error!("the volume has failed: {}", failure.why);
        self.ending = None;
        self.lines.drain(..).for_each(|line| line.shut_down());
        self.kept = Kept::default();
        self.writing.clear();
        self.alone = None;
        self.end_all(&failure);
        self.phase = Phase::Failed(failure);
    }

    fn end_all(&mut self, failure: &Failure) {
        self.waiting.clear();
        self.is_flushing = false;
        let keys: Vec<_> = self.jobs.iter().map(|(key, _)| key).collect();
        for key in keys {
            let error = failure.error(self.jobs[key].op.kind().name());
            self.complete(key, Err(error), None);
        }
        self.wake_all(|_| true);
    }
}
