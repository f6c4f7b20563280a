//! The ends of sends and receives, and what the server answers.

use std::io;

use rustix::io::Errno;
use sheave_core::{
    ByteRange, Error, Io, IoDone, IoRequest, IoStage, IoToken, Nanos, NbdErrno, Op, OpKind,
    Outcome, Payload, Reply,
};
use sheave_proto::{Answer, ClientEvent, ServerError};

use super::{EARLY_FLUSH_SHARE, Phase, State};
use crate::job::{Job, Owner};
use crate::line::{Line, Step, step_of};

/// A request's job, and how the request ended.
type Ended = (usize, Result<Answer, ServerError>);

impl State {
    /// A request that this backend started has ended.
    pub(crate) fn io_done(&mut self, user: usize, done: IoDone, io: &mut dyn Io) {
        let IoDone { token, request, result } = done;
        let line = step_of(token).and_then(|(number, step)| {
            let is_it = |line: &Line| line.number == number && !line.is_over;
            let index = self.lines.iter().position(is_it)?;
            Some((index, step))
        });
        // What an old connection still brings is of no use.
        let Some((index, step)) = line else { return };
        match (result, request) {
            (Err(error), request) if is_to_be_repeated(&error) => {
                self.put_back(user, request, token);
            }
            (Err(error), _) => self.line_broke(index, &error.to_string()),
            (Ok(count), IoRequest::Send { from, skip, .. }) => {
                self.lines[index].heard = io.now();
                self.lines[index].sent(from, skip + count, io);
            }
            (Ok(0), _) => self.line_broke(index, "the server closed it"),
            (Ok(count), IoRequest::Recv { into, .. }) => {
                if let Err(why) = self.received(index, user, step, into, count, io) {
                    self.line_broke(index, &why);
                }
            }
            (Ok(_), _) => debug_assert!(false, "an end of a request that was never started"),
        }
        self.end_if_nothing_is_owed();
    }

    /// A request has moved nothing and may be started again, by this backend or by another one.
    pub(super) fn put_back(&mut self, user: usize, request: IoRequest, token: IoToken) {
        let Some((number, _)) = step_of(token) else { return };
        let Some(line) = self.lines.iter_mut().find(|line| line.number == number) else { return };
        match request {
            IoRequest::Send { from, skip, .. } => line.not_sent(from, skip),
            _ => line.is_receiving = false,
        }
        if line.driver == Some(user) && !line.is_sending && !line.is_receiving {
            line.driver = None;
            self.wake_the_busy();
        }
    }

    fn received(
        &mut self,
        index: usize,
        user: usize,
        step: Step,
        into: Payload,
        count: usize,
        io: &mut dyn Io,
    ) -> Result<(), String> {
        let line = &mut self.lines[index];
        line.is_receiving = false;
        line.heard = io.now();
        if step == Step::Place {
            line.client.payload_received(count);
        } else {
            line.received(&into, count)?;
        }
        io.recycle(into);
        let mut ended = Vec::new();
        let decoded = self.decode(index, &mut ended);
        for (key, outcome) in ended {
            self.answered(key, user, outcome, io)?;
        }
        decoded
    }

    /// Makes of the input what can be made of it.
    fn decode(&mut self, index: usize, ended: &mut Vec<Ended>) -> Result<(), String> {
        const READ: &str = "a read that was sent has memory";
        let Self { lines, jobs, .. } = self;
        let line = &mut lines[index];
        let mut taken = 0;
        let outcome = loop {
            let (consumed, event) = match line.client.step(&line.input[taken..]) {
                Ok(step) => step,
                Err(error) => break Err(format!("the server broke the protocol: {error}")),
            };
            taken += consumed;
            match event {
                ClientEvent::NeedMore(_) => break Ok(()),
                ClientEvent::Data { state, at, bytes, .. } => {
                    jobs[*state].into.as_ref().expect(READ).copy_in(at, bytes);
                }
                ClientEvent::Zeroes { state, at, len, .. } => {
                    jobs[*state].into.as_ref().expect(READ).zero(at, len);
                }
                ClientEvent::Done { state, outcome, .. } => ended.push((state, outcome)),
            }
        };
        line.input.drain(..taken);
        outcome
    }

    /// The server has answered a request.
    ///
    /// # Errors
    /// Why the connection is of no more use; the job waits for another one then.
    fn answered(
        &mut self,
        key: usize,
        user: usize,
        outcome: Result<Answer, ServerError>,
        io: &mut dyn Io,
    ) -> Result<(), String> {
        // The volume may have failed on an answer just before.
        let Some(job) = self.jobs.get_mut(key) else { return Ok(()) };
        if matches!(&outcome, Err(error) if error.errno == NbdErrno::Shutdown) {
            job.breaks += 1;
            return Err("the server is shutting down".to_owned());
        }
        if !matches!(job.owner, Owner::Replay | Owner::Probe) {
            self.away_since = None;
        }
        self.alone.take_if(|alone| *alone == key);
        let (kind, owner, sent) = (job.op.kind(), job.owner, job.sent.take());
        if kind.is_write() {
            self.writing.retain(|(writer, _)| *writer != key);
            if std::mem::take(&mut self.is_blocked) {
                self.wake_all(|_| true);
            }
        }
        let answer = match (outcome, owner) {
            (outcome, Owner::Replay) => {
                self.replayed(key, outcome.err());
                return Ok(());
            }
            // Whatever it is, it is an answer.
            (_, Owner::Probe) => {
                self.jobs.remove(key);
                return Ok(());
            }
            // Servers report a failure once: the next flush of a client would succeed over it.
            (Err(error), Owner::Volume) => {
                self.lost(&format!("a flush failed: {error}"));
                return Ok(());
            }
            (Err(error), _) => {
                let why = format!("{}: {error}", self.options.name);
                self.end_for(key, user, Err(Error::new(error.kind(), kind.name(), why)), io);
                return Ok(());
            }
            (Ok(answer), _) => answer,
        };
        if let Some(part) = sent.filter(|_| kind.is_write()) {
            self.written(key, part);
        }
        let job = &mut self.jobs[key];
        (job.done, job.breaks) = (job.done + sent.map_or(0, ByteRange::len), 0);
        let is_whole = job.op.range().is_none_or(|range| job.done >= range.len());
        if !is_whole && kind != OpKind::BlockStatus {
            self.waiting.push_front(key);
            return Ok(());
        }
        let reply = match (answer, job.into.take()) {
            (Answer::Extents(extents), _) => Reply::Extents(extents),
            (Answer::Done, Some(buf)) => Reply::Data(buf.into()),
            (Answer::Done, None) => Reply::Done,
        };
        if kind == OpKind::Flush {
            self.flushed(key, io);
        }
        self.end_for(key, user, Ok(reply), io);
        Ok(())
    }

    /// Ends a job in the thread of this user, which need not be the job's.
    fn end_for(&mut self, key: usize, user: usize, outcome: Outcome, io: &mut dyn Io) {
        if let Owner::User(owner, _) = self.jobs[key].owner
            && owner != user
        {
            self.wake(owner);
        }
        let Job { op, accepted, sent_at, .. } = &self.jobs[key];
        // A flush of the volume's own is no op of a user.
        if self.jobs[key].owner != Owner::Volume {
            let (kind, now) = (op.kind(), io.now());
            io.record(kind, IoStage::Wait, sent_at.saturating_sub(*accepted));
            io.record(kind, IoStage::Wire, now.saturating_sub(*sent_at));
        }
        self.complete(key, outcome, Some(io));
    }

    /// A part of a write has been done.
    fn written(&mut self, key: usize, part: ByteRange) {
        let op = self.jobs[key].part(Some(part));
        let is_stable = matches!(
            op,
            Op::Write { fua: true, .. }
                | Op::Trim { fua: true, .. }
                | Op::WriteZeroes { fua: true, .. }
        );
        if is_stable {
            self.kept.forget(part);
        } else if self.keeps() {
            self.kept.add(&op, part);
        } else {
            self.unkept += u64::from(self.promised.info.can.flush);
        }
    }

    fn flushed(&mut self, key: usize, io: &mut dyn Io) {
        let Some(mark) = self.jobs[key].mark else { return };
        self.kept.flushed(mark.kept, |payload| io.recycle(payload));
        self.stable = self.stable.max(mark.unkept);
        let (took, now) = (io.now().saturating_sub(self.jobs[key].sent_at), io.now());
        self.early_flush_from = now.saturating_add(took.saturating_mul(EARLY_FLUSH_SHARE));
        if self.jobs[key].owner == Owner::Volume {
            self.is_flushing = false;
        }
    }

    /// Another one waits until a flush has succeeded.
    pub(super) fn early_flush_failed(&mut self) {
        self.is_flushing = false;
        self.early_flush_from = Nanos::MAX;
    }

    /// A kept write has been sent again.
    fn replayed(&mut self, key: usize, error: Option<ServerError>) {
        let job = self.jobs.remove(key);
        if let Some(range) = job.op.range() {
            self.replay_breaks.remove(&range.start());
        }
        match error {
            // A hint: nothing is lost with it.
            Some(error) if job.op.kind() == OpKind::Trim => {
                tracing::warn!("{}: a trim was not repeated: {error}", self.options.name);
            }
            Some(error) => {
                return self.lost(&format!("a write could not be repeated: {error}"));
            }
            None => {}
        }
        let Phase::Replaying { left } = &mut self.phase else { return };
        *left -= 1;
        if *left == 0 {
            self.phase = Phase::Up;
            // Callers may have ops that were refused meanwhile.
            self.wake_all(|_| true);
        }
    }
}

/// The engine has moved nothing, and nothing is wrong with the connection.
fn is_to_be_repeated(error: &io::Error) -> bool {
    use Errno as E;
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(E::CANCELED | E::INTR | E::AGAIN | E::NOBUFS | E::NOMEM))
}
