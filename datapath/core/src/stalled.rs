//! Requests of a backend for which the engine had no room.

use std::collections::VecDeque;

use crate::{Destination, Io, IoRequest, IoToken, Nanos, Result, memory};

/// The engine is asked again so much later.
const RETRY_NS: Nanos = 100_000;

/// Requests that wait for room in the engine, in their order.
#[derive(Debug, Default)]
pub struct Stalled {
    queue: VecDeque<(IoRequest, IoToken, Destination)>,
    retry_at: Option<Nanos>,
}

impl Stalled {
    /// Makes room for `count` requests in all.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoMemory`] when there is none.
    pub fn reserve(&mut self, count: usize) -> Result<()> {
        memory::attempt(|| self.queue.try_reserve(count.saturating_sub(self.queue.len())))
    }

    /// Starts a request, now or when there is room for it.
    pub fn start(&mut self, request: IoRequest, token: IoToken, to: Destination, io: &mut dyn Io) {
        if let Err(request) = io.start(request, token, to) {
            self.queue.push_back((request, token, to));
            self.retry_at = Some(io.now() + RETRY_NS);
        }
    }

    /// Starts those that wait, as far as there is room. `now_at` is where a request goes by now,
    /// which was that destination before.
    pub fn start_again(
        &mut self,
        io: &mut dyn Io,
        mut now_at: impl FnMut(Destination) -> Destination,
    ) {
        self.retry_at = None;
        while let Some((request, token, to)) = self.queue.pop_front() {
            if let Err(request) = io.start(request, token, now_at(to)) {
                self.queue.push_front((request, token, to));
                self.retry_at = Some(io.now() + RETRY_NS);
                return;
            }
        }
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// When those that wait are to be started again.
    #[must_use]
    pub fn deadline(&self) -> Option<Nanos> {
        self.retry_at
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::task::Waker;

    use super::*;
    use crate::{Buf, ErrorKind};

    /// An engine with room for so many requests, which notes where they go.
    struct Full {
        room: usize,
        started: Vec<(u64, Destination)>,
    }

    impl Io for Full {
        fn now(&self) -> Nanos {
            7
        }

        fn buffer(&mut self, _: usize) -> Result<Buf> {
            Err(crate::Error::new(ErrorKind::NoMemory, "read", "none"))
        }

        fn waker(&self) -> Waker {
            Waker::noop().clone()
        }

        fn start(
            &mut self,
            request: IoRequest,
            token: IoToken,
            to: Destination,
        ) -> std::result::Result<(), IoRequest> {
            if self.room == 0 {
                return Err(request);
            }
            self.room -= 1;
            self.started.push((token.0, to));
            Ok(())
        }
    }

    #[test]
    fn requests_keep_their_order_and_where_they_go() {
        let file = Arc::new(std::fs::File::open("/dev/null").unwrap());
        let mut stalled = Stalled::default();
        let mut io = Full { room: 1, started: Vec::new() };
        let to = [Destination::Device, Destination::Memory, Destination::BusyMemory];
        for (token, to) in to.into_iter().enumerate() {
            let request = IoRequest::Sync { file: Arc::clone(&file) };
            stalled.start(request, IoToken(token as u64), to, &mut io);
        }
        assert_eq!((stalled.is_empty(), stalled.deadline()), (false, Some(7 + RETRY_NS)));
        io.room = 1;
        stalled.start_again(&mut io, |to| to);
        assert!(stalled.deadline().is_some(), "one is left");
        io.room = 1;
        stalled.start_again(&mut io, |to| to);
        assert_eq!((stalled.is_empty(), stalled.deadline()), (true, None));
        assert_eq!(io.started, [(0, to[0]), (1, to[1]), (2, to[2])]);
    }
}
