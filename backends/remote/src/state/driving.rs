//! What the backend that drives a connection sends and receives.

use sheave_core::{ByteRange, Io, Nanos, Op, OpKind, Payload, Result, Segment};

use smallvec::SmallVec;

use super::{Phase, RETRY_NS, Starts, State, nanos};
use crate::job::Covered;

/// Room for the headers of one send; it bounds their number.
const HEADS_LEN: usize = 4096;
/// The longest header of a request (extended).
const HEAD_LEN_MAX: usize = 32;
/// From how many bytes on a send takes no more requests.
const SEND_LEN_FULL: usize = 2 << 20;
/// How many times longer than for any sign of life is waited for the answer to one request: a flush
/// may take long on a slow disk.
const ONE_REQUEST_PATIENCE: u64 = 10;

impl State {
    /// Drives the connection if this backend does or should; else wakes the one that does.
    pub(super) fn look_after(
        &mut self,
        index: usize,
        user: usize,
        io: &mut dyn Io,
        starts: &mut Starts,
    ) {
        let is_ending = self.ending.is_some();
        let has_own = self.is_flushing || is_ending || !matches!(self.phase, Phase::Up);
        let is_busy = self.users[user].jobs > 0 || has_own;
        let line = &mut self.lines[index];
        if line.is_over {
            return;
        }
        if line.driver.is_none() && line.has_work() && is_busy {
            line.driver = Some(user);
            // Its engine may have another clock.
            line.heard = io.now();
            line.check_at = io.now();
            for key in line.client.states() {
                self.jobs[*key].sent_at = io.now();
            }
        }
        match line.driver {
            Some(driver) if driver == user => self.drive(index, user, io, starts),
            Some(driver) if line.may_gather() && !line.queue.is_empty() && !is_ending => {
                self.wake(driver);
            }
            // This backend has no ops, and has put those of another one there.
            None if line.has_work() => self.wake_the_busy(),
            _ => {}
        }
    }

    fn drive(&mut self, index: usize, user: usize, io: &mut dyn Io, starts: &mut Starts) {
        let timeout = self.options.request_timeout;
        if self.is_overdue(index, io.now()) {
            let why = format!("no answer within {timeout:?} (request-timeout)");
            return self.line_broke(index, &why);
        }
        let line = &self.lines[index];
        let has_more = line.may_gather() && !line.queue.is_empty() && self.ending.is_none();
        if has_more && self.gather(index, io).is_err() {
            self.users[user].retry_at = Some(io.now() + RETRY_NS);
        }
        let (line, jobs) = (&mut self.lines[index], &self.jobs);
        match line.next_send(io) {
            Ok(send) => starts.extend(send),
            Err(_) => self.users[user].retry_at = Some(io.now() + RETRY_NS),
        }
        match line.next_recv(|key| jobs[key].into.clone(), io) {
            Ok(recv) => starts.extend(recv),
            Err(_) => self.users[user].retry_at = Some(io.now() + RETRY_NS),
        }
        if !line.has_work() && !line.is_sending && !line.is_receiving {
            line.driver = None;
        }
    }

    /// Whether the server owes answers and has been silent for too long, or owes one for much
    /// longer than that.
    fn is_overdue(&mut self, index: usize, now: Nanos) -> bool {
        let timeout = nanos(self.options.request_timeout);
        let line = &mut self.lines[index];
        if line.client.in_flight() == 0 {
            return false;
        }
        if now < line.check_at {
            return now >= line.heard.saturating_add(timeout);
        }
        let jobs = &self.jobs;
        let sent = line.client.states().map(|key| jobs[*key].sent_at).min();
        let patience = timeout.saturating_mul(ONE_REQUEST_PATIENCE);
        line.check_at = sent.map_or(Nanos::MAX, |sent| sent.saturating_add(patience));
        now >= line.check_at
    }

    /// Makes one send of as many requests as there are and as it takes.
    ///
    /// # Errors
    /// When there is no memory for it; nothing has changed then.
    fn gather(&mut self, index: usize, io: &mut dyn Io) -> Result<()> {
        let heads = io.buffer(HEADS_LEN)?;
        self.head.clear();
        let (mut out, mut len, mut cut) = (Payload::new(), 0, 0);
        let patience = nanos(self.options.request_timeout).saturating_mul(ONE_REQUEST_PATIENCE);
        // Writes that wait for others to the same bytes are passed over, but not by one to theirs.
        let mut aside: SmallVec<[ByteRange; 4]> = SmallVec::new();
        let mut next = 0;
        while let Some(&key) = self.lines[index].queue.get(next) {
            let is_full = self.head.len() + HEAD_LEN_MAX > HEADS_LEN || len >= SEND_LEN_FULL;
            if is_full || !self.lines[index].client.has_room() {
                break;
            }
            let (line, job) = (&mut self.lines[index], &mut self.jobs[key]);
            if job.is_suspect() && (line.client.in_flight() > 0 || !self.head.is_empty()) {
                break;
            }
            let kind = job.op.kind();
            let part = job.next_part(line.client.len_max(kind));
            if let Some(part) = part.filter(|_| kind.is_write()) {
                let mut others = self.writing.iter().map(|(_, other)| other).chain(&aside);
                if others.any(|other| other.overlaps(part)) {
                    self.is_blocked = true;
                    aside.push(part);
                    next += 1;
                    continue;
                }
                self.writing.push((key, part));
            }
            if kind == OpKind::Read {
                match io.buffer(part.map_or(0, ByteRange::len) as usize) {
                    Ok(buf) => job.into = Some(buf),
                    Err(error) if self.head.is_empty() => return Err(error),
                    // Those before it can go.
                    Err(_) => break,
                }
            }
            if kind == OpKind::Flush {
                job.mark = Some(Covered { kept: self.kept.mark(), unkept: self.unkept });
            }
            if line.client.in_flight() == 0 {
                line.heard = io.now();
                line.check_at = line.heard.saturating_add(patience);
            }
            let op = job.part(part);
            (job.sent, job.sent_at) = (part, io.now());
            line.queue.remove(next);
            line.client.submit(&op, key, &mut self.head).expect("there is room");
            if let Op::Write { data, .. } = op {
                out.push(Segment::Data(heads.slice(cut, self.head.len() - cut)));
                cut = self.head.len();
                len += data.len();
                data.into_segments().for_each(|segment| out.push(segment));
            }
        }
        out.push(Segment::Data(heads.slice(cut, self.head.len() - cut)));
        heads.copy_in(0, &self.head);
        drop(heads);
        self.lines[index].send(out);
        Ok(())
    }
}
