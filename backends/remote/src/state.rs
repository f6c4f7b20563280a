//! What the backends of a volume share: ops, connections, and what a server may lose.

mod breaks;
mod driving;
mod replies;
mod suspects;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::Waker;
use std::time::{Duration, Instant};

use sheave_core::{
    ByteRange, Completion, Error, ErrorKind, Io, IoRequest, IoToken, LinkGauges, LinkState, Nanos,
    Op, Outcome, Result, Submitted, Tag, memory,
};
use slab::Slab;
use smallvec::SmallVec;

use crate::RemoteOptions;
use crate::job::{Job, Owner};
use crate::kept::Kept;
use crate::line::Line;

pub(crate) use self::breaks::Promised;

/// Ops that one backend may have unanswered.
const JOBS_MAX: usize = 1024;
/// Bytes of the ops that all backends may have unanswered. Beyond them a backend takes one op at a
/// time, or none while there is no server. Its caller keeps the rest, which goes when the client
/// goes.
const WAITING_BYTES_MAX: u64 = 128 << 20;
/// How soon a thread that could not be started is tried again.
const THREAD_RETRY_NS: Nanos = 100_000_000;
/// A connection that has lived for so long was a good one.
const LIVED: Duration = Duration::from_secs(1);
/// From so many kept bytes on a flush of the volume's own is worth its time if it is quick: what it
/// gives back is used again while it is still in the processor's caches.
const EARLY_FLUSH_BYTES: u64 = 8 << 20;
/// Quick flushes take one part in so many of the time.
const EARLY_FLUSH_SHARE: Nanos = 20;
/// How soon an engine that had no room or no memory is asked again.
const RETRY_NS: Nanos = 1_000_000;

/// Requests for the engine, to be started once the lock is released.
pub(crate) type Starts = SmallVec<[(IoRequest, IoToken); 4]>;

/// Where the volume stands.
#[derive(Debug)]
enum Phase {
    /// Connected.
    Up,
    /// Connected, and what the server may have lost is being sent again; ops wait.
    Replaying { left: usize },
    /// Not connected; ops wait or, when that has taken too long, fail.
    Down { has_expired: bool },
    /// Of no more use.
    Failed(Failure),
}

/// Why ops fail.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    kind: ErrorKind,
    why: String,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, why: String) -> Self {
        Self { kind, why }
    }

    pub(crate) fn error(&self, op: &'static str) -> Error {
        Error::new(self.kind, op, self.why.clone())
    }
}

/// A backend.
#[derive(Default)]
struct User {
    waker: Option<Waker>,
    /// Its ops in flight, without those in `ended`.
    jobs: usize,
    ended: VecDeque<Completion>,
    /// When it should try again what its engine had no room for.
    retry_at: Option<Nanos>,
}

/// What is to be done once the lock is released.
#[derive(Default)]
pub(crate) struct Effects {
    pub(crate) wakes: Vec<Waker>,
    /// A thread is to connect, for this epoch, after so many failures in a row.
    pub(crate) reconnect: Option<(u64, u32)>,
}

pub(crate) struct State {
    options: Arc<RemoteOptions>,
    promised: Promised,
    has_lost: Arc<AtomicBool>,
    phase: Phase,
    jobs: Slab<Job>,
    /// Jobs that no connection has, in order.
    waiting: VecDeque<usize>,
    lines: Vec<Line>,
    /// Why the connections are about to be made again. Nothing more is sent on them, but what
    /// they are owed is awaited: a request that a server still works on must not be repeated.
    ending: Option<String>,
    users: Slab<User>,
    kept: Kept,
    /// Counts writes that have completed and were not kept, and those of them that flushes cover.
    unkept: u64,
    stable: u64,
    /// Writes with the server: no other write to the same bytes is sent meanwhile, so that their
    /// order is known.
    writing: Vec<(usize, ByteRange)>,
    /// A queue waits for one of these.
    is_blocked: bool,
    /// The suspect that is with the server, or about to be; nothing else is sent meanwhile.
    alone: Option<usize>,
    /// Breaks of the writes that were being repeated, by their start.
    replay_breaks: BTreeMap<u64, u32>,
    /// The volume flushes by itself.
    is_flushing: bool,
    /// When it may do so although not much is kept: what the last flush took, many times over.
    early_flush_from: Nanos,
    next_job: u64,
    next_line: u64,
    /// Counts the times that connections were lost.
    epoch: u64,
    /// Counts the times that connections were made again.
    reconnects: u64,
    /// Bytes of the ranges of ops that have not ended.
    waiting_bytes: u64,
    /// Connections in a row that did not live for [`LIVED`].
    failures: u32,
    /// When connections were made last.
    up_since: Instant,
    /// When the server was lost that has answered nothing since but repeated writes.
    away_since: Option<Instant>,
    /// A thread to connect with that could not be started, and when to try again.
    unstarted: Option<((u64, u32), Option<Nanos>)>,
    head: Vec<u8>,
    pub(crate) effects: Effects,
}

impl State {
    pub(crate) fn new(
        options: Arc<RemoteOptions>,
        promised: Promised,
        has_lost: Arc<AtomicBool>,
    ) -> Self {
        Self {
            options,
            promised,
            has_lost,
            phase: Phase::Down { has_expired: false },
            jobs: Slab::new(),
            waiting: VecDeque::new(),
            lines: Vec::new(),
            ending: None,
            users: Slab::new(),
            kept: Kept::default(),
            unkept: 0,
            stable: 0,
            writing: Vec::new(),
            is_blocked: false,
            alone: None,
            replay_breaks: BTreeMap::new(),
            is_flushing: false,
            early_flush_from: 0,
            next_job: 0,
            next_line: 0,
            epoch: 0,
            reconnects: 0,
            waiting_bytes: 0,
            failures: 0,
            up_since: Instant::now(),
            away_since: None,
            unstarted: None,
            head: Vec::new(),
            effects: Effects::default(),
        }
    }

    /// A new backend's key.
    ///
    /// # Errors
    /// When the volume is of no more use.
    pub(crate) fn enter(&mut self) -> Result<usize> {
        match &self.phase {
            Phase::Failed(failure) => Err(failure.error("open")),
            _ => Ok(self.users.insert(User::default())),
        }
    }

    /// A backend is gone.
    pub(crate) fn leave(&mut self, user: usize) {
        for (_, job) in &mut self.jobs {
            if matches!(job.owner, Owner::User(owner, _) if owner == user) {
                job.owner = Owner::Gone;
            }
        }
        self.users.remove(user);
        for index in 0..self.lines.len() {
            let Some(line) = self.lines.get_mut(index) else { break };
            if line.driver == Some(user) {
                line.driver = None;
                // Its engine is about to lose what it receives.
                if line.is_sending || line.is_receiving {
                    self.end_line(index, "the thread that received from it has other work");
                }
            }
        }
        self.wake_the_busy();
    }

    /// Takes an op.
    pub(crate) fn submit(&mut self, user: usize, op: Op, tag: Tag, now: Nanos) -> Submitted {
        let kind = op.kind();
        match &self.phase {
            Phase::Failed(failure) => return Submitted::Done(Err(failure.error(kind.name()))),
            Phase::Down { has_expired: true } => {
                return Submitted::Done(Err(self.away().error(kind.name())));
            }
            _ => {}
        }
        let jobs = self.users[user].jobs;
        let is_first = jobs == 0 && matches!(self.phase, Phase::Up);
        if jobs >= JOBS_MAX || (!is_first && self.waiting_bytes >= WAITING_BYTES_MAX) {
            return Submitted::Full(op);
        }
        if let Err(error) = self.make_room(user) {
            return Submitted::Done(Err(error));
        }
        self.users[user].jobs += 1;
        self.waiting_bytes += op.range().map_or(0, ByteRange::len);
        let key = self.insert(Owner::User(user, tag), op, now);
        self.waiting.push_back(key);
        Submitted::Queued
    }

    fn insert(&mut self, owner: Owner, op: Op, now: Nanos) -> usize {
        self.next_job += 1;
        self.jobs.insert(Job::new(owner, op, self.next_job, now))
    }

    /// Makes sure that one more op of this backend needs no memory in any list.
    fn make_room(&mut self, user: usize) -> Result<()> {
        let count = self.jobs.len() + 1;
        memory::check_growth::<Job>(self.jobs.len(), self.jobs.capacity())?;
        memory::attempt(|| self.waiting.try_reserve(count - self.waiting.len()))?;
        memory::attempt(|| self.writing.try_reserve(count.saturating_sub(self.writing.len())))?;
        for line in &mut self.lines {
            memory::attempt(|| line.queue.try_reserve(count - line.queue.len()))?;
        }
        let User { jobs, ended, .. } = &mut self.users[user];
        memory::attempt(|| ended.try_reserve(*jobs + 1))
    }

    /// Does what this backend's thread can do now, and moves its completions to `ended`.
    pub(crate) fn attend(
        &mut self,
        user: usize,
        io: &mut dyn Io,
        starts: &mut Starts,
        ended: &mut VecDeque<Completion>,
    ) {
        self.users[user].retry_at = None;
        if self.users[user].waker.is_none() {
            self.users[user].waker = Some(io.waker());
        }
        self.start_again(io.now());
        self.distribute(user, io.now());
        for index in 0..self.lines.len() {
            self.look_after(index, user, io, starts);
            if self.lines.is_empty() {
                // They have just been given up.
                starts.clear();
                break;
            }
        }
        self.end_if_nothing_is_owed();
        std::mem::swap(ended, &mut self.users[user].ended);
    }

    /// When the backend should attend although nothing has happened.
    pub(crate) fn due(&self, user: usize) -> Option<Nanos> {
        let timeout = nanos(self.options.request_timeout);
        let owed = self
            .lines
            .iter()
            .filter(|line| line.driver == Some(user) && !line.is_over)
            .filter(|line| line.client.in_flight() > 0);
        let late = owed.map(|line| line.heard.saturating_add(timeout).min(line.check_at));
        let again = self.unstarted.and_then(|(_, at)| at);
        late.chain(self.users[user].retry_at).chain(again).min()
    }

    /// There was no thread to connect with; a backend tries again.
    pub(crate) fn not_connecting(&mut self, wanted: (u64, u32)) {
        self.unstarted = Some((wanted, None));
        self.wake_all(|_| true);
    }

    fn start_again(&mut self, now: Nanos) {
        match self.unstarted {
            Some((wanted, Some(at))) if at <= now => {
                self.unstarted = None;
                self.effects.reconnect = Some(wanted);
            }
            Some((wanted, None)) => self.unstarted = Some((wanted, Some(now + THREAD_RETRY_NS))),
            _ => {}
        }
    }

    /// The engine had no room for this request.
    pub(crate) fn not_started(&mut self, user: usize, back: (IoRequest, IoToken), now: Nanos) {
        self.users[user].retry_at = Some(now + RETRY_NS);
        self.put_back(user, back.0, back.1);
    }

    /// How it stands with the server.
    pub(crate) fn gauges(&self) -> LinkGauges {
        let state = match &self.phase {
            Phase::Up => LinkState::Up,
            Phase::Replaying { .. } => LinkState::Replaying,
            Phase::Down { .. } => LinkState::Down,
            Phase::Failed(_) => LinkState::Failed,
        };
        let (reconnects, waiting_bytes) = (self.reconnects, self.waiting_bytes);
        LinkGauges { state, reconnects, waiting_bytes, kept_bytes: self.kept.bytes() }
    }

    fn away(&self) -> Failure {
        let limit = self.options.reconnect_timeout.unwrap_or_default();
        let why = format!(
            "{}: the server has been away for more than {} s (reconnect-timeout)",
            self.options.name,
            limit.as_secs()
        );
        Failure::new(ErrorKind::TimedOut, why)
    }

    /// Gives jobs that wait to connections, in order.
    fn distribute(&mut self, user: usize, now: Nanos) {
        if !matches!(self.phase, Phase::Up) || self.ending.is_some() {
            return;
        }
        self.flush_if_worthwhile(now);
        while let Some(&key) = self.waiting.front() {
            let job = &self.jobs[key];
            if self.alone.is_some() || job.op.kind().is_write() && self.is_full() {
                return;
            }
            let is_suspect = job.is_suspect();
            if is_suspect && self.lines.iter().any(Line::has_work) {
                return;
            }
            let probe = is_suspect.then(|| self.probe_beside(key));
            let load =
                |line: &Line| (line.driver.is_some_and(|driver| driver != user), line.load());
            let Some(line) = self.lines.iter_mut().min_by_key(|line| load(line)) else { return };
            line.queue.extend(probe);
            line.queue.push_back(key);
            self.waiting.pop_front();
            self.alone = is_suspect.then_some(key);
        }
    }

    /// Whether completed writes are kept until a flush covers them: a server without flushes has
    /// no promise to keep beyond its replies.
    fn keeps(&self) -> bool {
        self.promised.info.can.flush && self.options.replay_bytes > 0
    }

    /// Whether so much is kept that no more may be written.
    fn is_full(&self) -> bool {
        self.keeps() && self.kept.bytes() >= self.options.replay_bytes
    }

    fn flush_if_worthwhile(&mut self, now: Nanos) {
        let is_early =
            self.keeps() && self.kept.bytes() > EARLY_FLUSH_BYTES && now >= self.early_flush_from;
        if (is_early || self.is_much_kept()) && !self.is_flushing {
            self.flush();
        }
    }

    /// Whether so much is kept that it is time for a flush.
    fn is_much_kept(&self) -> bool {
        self.keeps() && self.kept.bytes() > self.options.replay_bytes / 2
    }

    /// Flushes before anything else that waits.
    fn flush(&mut self) {
        self.is_flushing = true;
        let key = self.insert(Owner::Volume, Op::Flush, 0);
        self.waiting.push_front(key);
    }

    /// Ends a job.
    fn complete(&mut self, key: usize, outcome: Outcome, io: Option<&mut dyn Io>) {
        let job = self.jobs.remove(key);
        if let Owner::User(..) | Owner::Gone = job.owner {
            self.waiting_bytes -= job.op.range().map_or(0, ByteRange::len);
        }
        if let (Op::Write { data, .. }, Some(io)) = (job.op, io) {
            io.recycle(data);
        }
        if let Owner::User(user, tag) = job.owner {
            self.users[user].jobs -= 1;
            self.users[user].ended.push_back(Completion { tag, outcome });
        }
    }

    fn wake(&mut self, user: usize) {
        let waker = self.users.get(user).and_then(|user| user.waker.clone());
        self.effects.wakes.extend(waker);
    }

    /// Wakes all backends that have ops: there is a connection to be driven.
    fn wake_the_busy(&mut self) {
        if self.lines.iter().any(|line| line.driver.is_none() && line.has_work()) {
            self.wake_all(|user| user.jobs > 0);
        }
    }

    fn wake_all(&mut self, which: impl Fn(&User) -> bool) {
        let wanted = self.users.iter().filter(|(_, user)| which(user));
        self.effects.wakes.extend(wanted.filter_map(|(_, user)| user.waker.clone()));
    }
}

fn nanos(duration: Duration) -> Nanos {
    duration.as_nanos().try_into().unwrap_or(Nanos::MAX)
}
