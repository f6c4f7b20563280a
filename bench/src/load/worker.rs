//! The thread that drives some connections.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::job::{Job, Phase};
use super::recorder::Recorder;
use super::session::Session;
use super::stream::{SILENCE_MAX, Wait};

/// Deepest queue at which a writer may sleep in send: the replies to so many writes fit into any
/// socket buffer, so the server never waits for us while we wait for it.
const SLEEPING_SEND_DEPTH_MAX: usize = 128;
/// Events taken at once.
const EVENTS_MAX: usize = 64;
/// How long a thread may sleep before it looks at the phase again.
const NAP: Duration = Duration::from_millis(20);

/// Drives `sessions` until they are finished.
///
/// # Errors
/// When a connection fails or a server breaks the protocol.
pub(crate) fn drive(
    job: &Job,
    sessions: &mut [Session<'_>],
    recorder: &mut Recorder,
) -> Result<()> {
    match sessions {
        [only] if may_sleep(job) => drive_one(job, only, recorder),
        several => drive_several(job, several, recorder),
    }
}

/// One connection, sleeping in send and receive: the fewest system calls.
fn drive_one(job: &Job, session: &mut Session<'_>, recorder: &mut Recorder) -> Result<()> {
    let mut now_ns = job.now_ns();
    loop {
        recorder.is_measuring = job.phase() == Phase::Measure;
        session.issue(now_ns, Wait::Sleep)?;
        if session.is_finished() {
            return Ok(());
        }
        if let Some(later_ns) = session.receive(Wait::Sleep, recorder)? {
            now_ns = later_ns;
        }
    }
}

/// Whether both sides can never sleep in send at the same time.
fn may_sleep(job: &Job) -> bool {
    let workload = &job.workload;
    let one_way = matches!(workload.read_percent, 0 | 100);
    one_way
        && workload.rate_per_connection.is_none()
        && (workload.read_percent == 100 || workload.queue_depth <= SLEEPING_SEND_DEPTH_MAX)
}

/// Any number of connections, never sleeping but in epoll.
fn drive_several(job: &Job, sessions: &mut [Session<'_>], recorder: &mut Recorder) -> Result<()> {
    let mut watch = Watch::new(sessions)?;
    let mut ready: Vec<usize> = (0..sessions.len()).collect();
    let is_paced = job.workload.rate_per_connection.is_some();
    if is_paced {
        // The kernel may otherwise wake us 50 µs late, and the server would be charged for it.
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    }
    let mut now_ns = job.now_ns();
    let mut heard_ns = now_ns;
    loop {
        recorder.is_measuring = job.phase() == Phase::Measure;
        for &index in &ready {
            let session = &mut sessions[index];
            if let Some(later_ns) = session.receive(Wait::No, recorder)? {
                now_ns = later_ns;
                heard_ns = later_ns;
            }
            session.issue(now_ns, Wait::No)?;
            watch.update(index, session)?;
        }
        if sessions.iter().all(Session::is_finished) {
            return Ok(());
        }
        let in_flight: usize = sessions.iter().map(Session::in_flight).sum();
        if in_flight == 0 {
            heard_ns = now_ns;
        }
        let silence = Duration::from_nanos(now_ns - heard_ns);
        ensure!(silence < SILENCE_MAX, "no reply for 30 s, {in_flight} in flight");
        let nap = if is_paced { nap(job, sessions) } else { NAP };
        watch.wait(nap, &mut ready)?;
        now_ns = job.now_ns();
        if is_paced || job.phase() == Phase::Stop {
            // Time itself may have given any of them something to do.
            ready.clear();
            ready.extend(0..sessions.len());
        }
    }
}

/// What epoll watches.
struct Watch {
    poll: OwnedFd,
    events: Vec<Event>,
    watches_send: Vec<bool>,
}

impl Watch {
    fn new(sessions: &[Session<'_>]) -> Result<Self> {
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        for (index, session) in sessions.iter().enumerate() {
            let data = EventData::new_u64(index as u64);
            epoll::add(&poll, session.stream().fd(), data, EventFlags::IN)?;
        }
        let events = Vec::with_capacity(EVENTS_MAX);
        Ok(Self { poll, events, watches_send: vec![false; sessions.len()] })
    }

    /// Watches for room to send only while something is to be sent.
    fn update(&mut self, index: usize, session: &Session<'_>) -> Result<()> {
        let wants_to_send = session.wants_to_send();
        if self.watches_send[index] != wants_to_send {
            self.watches_send[index] = wants_to_send;
            let send = if wants_to_send { EventFlags::OUT } else { EventFlags::empty() };
            let data = EventData::new_u64(index as u64);
            epoll::modify(&self.poll, session.stream().fd(), data, EventFlags::IN | send)?;
        }
        Ok(())
    }

    /// Sleeps until connections are ready, or for `nap`.
    fn wait(&mut self, nap: Duration, ready: &mut Vec<usize>) -> Result<()> {
        let timeout = Timespec::try_from(nap)?;
        ready.clear();
        self.events.clear();
        if nap < NAP {
            // The timeout of epoll is rounded up to milliseconds, that of poll is not.
            match poll(&mut [PollFd::new(&self.poll, PollFlags::IN)], Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => return Ok(()),
                ended => ended?,
            };
        }
        match epoll::wait(&self.poll, spare_capacity(&mut self.events), Some(&timeout)) {
            Err(Errno::INTR) | Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let index = |event: Event| usize::try_from(event.data.u64()).expect("one of our indexes");
        ready.extend(self.events.drain(..).map(index));
        Ok(())
    }
}

/// How long to sleep at most: until a request is due, or the phase may have changed.
fn nap(job: &Job, sessions: &[Session<'_>]) -> Duration {
    let due_ns = sessions.iter().filter_map(Session::due_ns).min();
    let until_due = due_ns.map(|due| Duration::from_nanos(due.saturating_sub(job.now_ns())));
    until_due.map_or(NAP, |until| until.min(NAP))
}
