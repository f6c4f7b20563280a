//! Accepts clients as the admission policy allows.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::accept_errors::{AcceptErrors, is_table_full};
use crate::admission::{Admission, Bounds, Source, Verdict};
use crate::listener::Listener;
use crate::stream::Stream;

/// The least time between two lines of the log about clients at fault.
const FAULT_INTERVAL_MS: u64 = 1000;

/// Milliseconds since the server's start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Uptime(Instant);

impl Uptime {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now_ms(self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Accepts clients for all listeners of a server.
pub(crate) struct Acceptor {
    admission: Mutex<Admission<AbortHandle>>,
    /// A slot may be free.
    changed: Notify,
    /// Held while a listener waits for a slot. It is fair, so listeners take turns.
    turn: tokio::sync::Mutex<()>,
    uptime: Uptime,
    faults: Mutex<Faults>,
}

#[derive(Default)]
struct Faults {
    logged_ms: Option<u64>,
    more: u64,
}

/// A slot of a client; freed on drop.
pub(crate) struct ClientSlot {
    acceptor: Arc<Acceptor>,
    source: Source,
    phase: Phase,
}

enum Phase {
    Negotiating {
        id: u64,
        in_order: bool,
    },
    Established,
    /// Lost to another client.
    Evicted,
}

impl Acceptor {
    pub(crate) fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            admission: Mutex::new(Admission::new(bounds)),
            changed: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
            uptime: Uptime::start(),
            faults: Mutex::default(),
        })
    }

    /// The next client that gets a slot. Call [`Acceptor::attach`] with the client's task.
    pub(crate) async fn next(
        self: &Arc<Self>,
        listener: &Listener,
        errors: &mut AcceptErrors,
    ) -> (Stream, ClientSlot) {
        loop {
            match self.accept(listener).await {
                Ok(stream) => {
                    if let Some(slot) = self.admit(&stream).await {
                        return (stream, slot);
                    }
                }
                Err(error) if is_table_full(&error) && self.evict_silent() => {
                    // Its descriptor is closed when its task has run.
                    tokio::task::yield_now().await;
                }
                Err(error) => {
                    let wait = errors.failed(&error, |cx| listener.poll_accept(cx, self.uptime));
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// Accepts a client. Reports that become due meanwhile are logged.
    async fn accept(&self, listener: &Listener) -> io::Result<Stream> {
        loop {
            self.report();
            let due = self.lock().report_due();
            tokio::select! {
                biased;
                accepted = listener.accept(self.uptime) => return accepted,
                () = self.sleep_until(due.unwrap_or(u64::MAX)), if due.is_some() => {}
            }
        }
    }

    /// Waits for a slot; others stay in the listen queue meanwhile. `None` when the client is to
    /// be closed.
    async fn admit(self: &Arc<Self>, stream: &Stream) -> Option<ClientSlot> {
        let source = stream.source();
        let mut turn = Some(self.turn.lock().await);
        let mut is_first = true;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let verdict = self.lock().admit(source, stream.moved(), self.now());
            let until = match verdict {
                Verdict::In { id, evicted } => {
                    if let Some(evicted) = evicted {
                        evicted.abort();
                    }
                    let phase = Phase::Negotiating { id, in_order: false };
                    return Some(ClientSlot { acceptor: Arc::clone(self), source, phase });
                }
                Verdict::Refused => {
                    tracing::debug!(peer = stream.peer(), "closed: its address has its share");
                    return None;
                }
                Verdict::Full(until) => until,
                Verdict::OverShare(until) => {
                    // One address at its share holds up this listener only.
                    drop(turn.take());
                    Some(until)
                }
            };
            if std::mem::take(&mut is_first) {
                self.lock().paused();
            }
            self.report();
            tokio::select! {
                () = changed => {}
                () = self.sleep_until(until.unwrap_or(u64::MAX)), if until.is_some() => {}
            }
        }
    }

    /// Sets the task of a slot's client; it is aborted when another client gets the slot.
    pub(crate) fn attach(&self, id: u64, task: AbortHandle) {
        if !self.lock().attach(id, task.clone()) {
            // It has ended, or has lost its slot already.
            task.abort();
        }
    }

    fn evict_silent(&self) -> bool {
        let evicted = self.lock().evict_silent(self.now());
        let is_evicted = evicted.is_some();
        if let Some(evicted) = evicted {
            evicted.abort();
        }
        is_evicted
    }

    fn report(&self) {
        let mut admission = self.lock();
        let Some(events) = admission.report(self.now()) else { return };
        let (negotiating, connections) = admission.counts();
        drop(admission);
        tracing::warn!(
            negotiating,
            connections,
            silent_closed = events.silent_closed,
            over_share_closed = events.over_share_closed,
            "more clients than slots; others wait in the listen queue"
        );
    }

    /// Whether to log a client's fault, at most once a second; the answer is the number of faults
    /// that were not logged since the last one.
    pub(crate) fn fault(&self) -> Option<u64> {
        let now = self.now();
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.logged_ms.is_some_and(|at| now < at + FAULT_INTERVAL_MS) {
            faults.more += 1;
            return None;
        }
        faults.logged_ms = Some(now);
        Some(std::mem::take(&mut faults.more))
    }

    async fn sleep_until(&self, at_ms: u64) {
        // A millisecond more, since the clock counts whole milliseconds.
        let wait_ms = at_ms.saturating_sub(self.now()).saturating_add(1);
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
    }

    fn now(&self) -> u64 {
        self.uptime.now_ms()
    }

    fn lock(&self) -> MutexGuard<'_, Admission<AbortHandle>> {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientSlot {
    /// For [`Acceptor::attach`].
    pub(crate) fn id(&self) -> u64 {
        match self.phase {
            Phase::Negotiating { id, .. } => id,
            Phase::Established | Phase::Evicted => u64::MAX,
        }
    }

    /// The client leaves in order.
    pub(crate) fn leaves_in_order(&mut self) {
        if let Phase::Negotiating { in_order, .. } = &mut self.phase {
            *in_order = true;
        }
    }

    /// The client has negotiated. False when it has lost its slot.
    pub(crate) fn establish(&mut self) -> bool {
        let Phase::Negotiating { id, .. } = self.phase else { return false };
        let is_kept = self.acceptor.lock().establish(id, self.acceptor.now());
        self.phase = if is_kept { Phase::Established } else { Phase::Evicted };
        // Its slot among those that negotiate is free.
        self.acceptor.changed.notify_waiters();
        is_kept
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        let mut admission = self.acceptor.lock();
        match self.phase {
            Phase::Negotiating { id, in_order } => {
                admission.leave(id, in_order, self.acceptor.now());
            }
            Phase::Established => admission.closed(self.source),
            Phase::Evicted => return,
        }
        drop(admission);
        self.acceptor.changed.notify_waiters();
    }
}
