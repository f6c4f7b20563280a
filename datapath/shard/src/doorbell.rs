//! Wakes a sleeping thread from another one, at one system call per sleep.
//!
//! The owner announces that it is about to sleep, then checks once more for work; a caller adds
//! work, then takes the announcement back. Both exchange the flag `asleep`, and exchanges of one
//! flag have one order: either the caller is first, and the owner sees the work, or the owner is
//! first, and the caller sees that it has to wake the owner. The loom test below runs all
//! interleavings.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use smallvec::SmallVec;

/// The flag that [`Handshake`] needs; loom has one of its own.
pub(crate) trait Flag {
    fn get(&self) -> bool;
    fn swap(&self, value: bool) -> bool;
}

impl Flag for AtomicBool {
    fn get(&self) -> bool {
        self.load(Acquire)
    }

    fn swap(&self, value: bool) -> bool {
        Self::swap(self, value, AcqRel)
    }
}

/// The two flags of the handshake.
#[derive(Default)]
pub(crate) struct Handshake<F> {
    /// A caller sets it after it has added work; the owner clears it before it takes work.
    rung: F,
    /// The owner sets it before it sleeps; the first caller after that clears it.
    asleep: F,
}

impl<F: Flag> Handshake<F> {
    /// Call it after adding work. True if the caller must wake the owner.
    fn ring(&self) -> bool {
        // If it has rung already, the owner has not taken work since, and will see this work too.
        !self.rung.swap(true) && self.asleep.swap(false)
    }

    /// Whether work was added since the last call. The owner then takes all work.
    fn answer(&self) -> bool {
        self.rung.get() && self.rung.swap(false)
    }

    /// Announces sleep. False if there is work, and the owner must not sleep.
    fn lie_down(&self) -> bool {
        self.asleep.swap(true);
        let may_sleep = !self.rung.get();
        if !may_sleep {
            self.asleep.swap(false);
        }
        may_sleep
    }

    /// The owner is awake, for whatever reason.
    fn get_up(&self) {
        if self.asleep.get() {
            self.asleep.swap(false);
        }
    }
}

/// Wakes one thread, which waits for an eventfd and other descriptors.
pub(crate) struct Doorbell {
    handshake: Handshake<AtomicBool>,
    eventfd: OwnedFd,
}

impl Doorbell {
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { handshake: Handshake::default(), eventfd })
    }

    /// Notifies the owner of work that was added before.
    pub(crate) fn ring(&self) {
        if self.handshake.ring() {
            // The counter overflows, and the write fails, after 2^64 - 1 wakes.
            let _ = rustix::io::write(&self.eventfd, &1u64.to_le_bytes());
        }
    }

    /// Whether it rang since the last call; cheap enough for every turn.
    pub(crate) fn answer(&self) -> bool {
        self.handshake.answer()
    }

    /// Whether it has rung and has not been answered.
    pub(crate) fn has_rung(&self) -> bool {
        self.handshake.rung.get()
    }

    /// Announces sleep; see [`Handshake::lie_down`].
    pub(crate) fn lie_down(&self) -> bool {
        self.handshake.lie_down()
    }

    /// Ends the announced sleep.
    pub(crate) fn get_up(&self) {
        self.handshake.get_up();
    }

    /// Sleeps until it rings, one of the others is ready, or the time is over; `None` is for ever.
    /// For an owner without a ring. Returns which of the others are ready.
    pub(crate) fn wait<'a>(
        &'a self,
        others: impl Iterator<Item = PollFd<'a>>,
        within: Option<Duration>,
    ) -> SmallVec<[bool; 8]> {
        let within = if self.lie_down() { within } else { Some(Duration::ZERO) };
        let within = within.map(|within| Timespec {
            tv_sec: within.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: within.subsec_nanos().into(),
        });
        let bell = PollFd::new(self, PollFlags::IN);
        let mut fds: SmallVec<[_; 8]> = [bell].into_iter().chain(others).collect();
        let polled = poll(&mut fds, within.as_ref());
        self.get_up();
        self.answer();
        if polled.is_err() {
            // A signal, or no kernel memory: the owner checks for work and calls again.
            std::thread::yield_now();
            return SmallVec::new();
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if is_ready(&fds[0]) {
            let _ = rustix::io::read(&self.eventfd, &mut [0; 8]);
        }
        fds[1..].iter().map(is_ready).collect()
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use loom::sync::{Arc, Notify};

    use super::*;

    type LoomFlag = loom::sync::atomic::AtomicBool;

    impl Flag for LoomFlag {
        fn get(&self) -> bool {
            self.load(Acquire)
        }

        fn swap(&self, value: bool) -> bool {
            Self::swap(self, value, AcqRel)
        }
    }

    /// The owner, its callers, and their work.
    struct Model {
        handshake: Handshake<LoomFlag>,
        left: AtomicUsize,
        /// The eventfd.
        wake: Notify,
        wakes: AtomicUsize,
    }

    impl Model {
        fn leave_one(&self) {
            self.left.fetch_add(1, Relaxed);
            if self.handshake.ring() {
                self.wakes.fetch_add(1, Relaxed);
                self.wake.notify();
            }
        }

        /// Takes work until `count` pieces have come, and returns how often it announced sleep.
        /// Loom fails if it sleeps for ever.
        fn take(&self, count: usize) -> usize {
            let (mut taken, mut announced) = (0, 0);
            while taken < count {
                if self.handshake.answer() {
                    taken += self.left.swap(0, Relaxed);
                    continue;
                }
                announced += 1;
                if self.handshake.lie_down() {
                    self.wake.wait();
                    self.handshake.get_up();
                }
            }
            announced
        }
    }

    #[test]
    fn no_interleaving_loses_a_wake_up() {
        let mut builder = loom::model::Builder::new();
        // All interleavings of up to three preemptions; without a bound it takes hours.
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let model = Arc::new(Model {
                handshake: Handshake { rung: LoomFlag::new(false), asleep: LoomFlag::new(false) },
                left: AtomicUsize::new(0),
                wake: Notify::new(),
                wakes: AtomicUsize::new(0),
            });
            let callers = [(); 2].map(|()| {
                let model = Arc::clone(&model);
                loom::thread::spawn(move || model.leave_one())
            });
            let announced = model.take(2);
            for caller in callers {
                caller.join().unwrap();
            }
            assert!(model.wakes.load(Relaxed) <= announced, "one write for each sleep");
        });
    }

    fn has_rung(bell: &Doorbell) -> bool {
        let at_once = Timespec::default();
        let mut fds = [PollFd::new(bell, PollFlags::IN)];
        poll(&mut fds, Some(&at_once)).unwrap() > 0
    }

    #[test]
    fn only_a_sleeper_costs_a_system_call() {
        let bell = Doorbell::new().unwrap();
        bell.ring();
        assert!(!has_rung(&bell), "the owner is awake and will look");
        assert!(!bell.lie_down(), "it has");
        assert!(bell.answer() && !bell.answer());
        assert!(bell.lie_down());
        bell.ring();
        bell.ring();
        assert!(has_rung(&bell));
        let nothing = std::iter::empty();
        bell.wait(nothing, Some(Duration::MAX)); // Returns at once, since it has rung.
        assert!(!has_rung(&bell), "the second ring has written nothing");
        assert!(!bell.answer(), "the wait has answered");
    }
}
