//! What both engines do for a backend, and nothing else, for the volumes' suite.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use sheave_conformance::{Engine, Options, check, unparker, wait_for_sockets};
use sheave_core::{Buf, Destination, Io, IoDone, IoRequest, IoToken, Nanos, PAGE_SIZE, Volume};
use sheave_ring::{By, Event, Ring, RingConfig, plain, probe};
use sheave_tests::uring_or_skip;

/// Few, so that backends find no room now and then.
const REQUESTS_MAX: usize = 3;
const TURN_MAX: Duration = Duration::from_millis(1);

/// A ring and nothing else.
struct RingEngine {
    io: RingIo,
}

struct RingIo {
    ring: Ring,
    start: Instant,
    in_flight: usize,
}

impl RingEngine {
    pub(crate) fn new() -> Self {
        let config = RingConfig {
            entries: 8,
            receive_buffers_min: 1,
            receive_buffers_max: 1,
            receive_buffer_len: 4096,
            file_requests_max: REQUESTS_MAX,
            registered_max: 1,
        };
        let ring = Ring::new(&probe().expect("io_uring"), config).expect("a ring");
        Self { io: RingIo { ring, start: Instant::now(), in_flight: 0 } }
    }
}

impl Engine for RingEngine {
    fn io(&mut self) -> &mut dyn Io {
        &mut self.io
    }

    fn in_flight(&self) -> usize {
        self.io.in_flight
    }

    fn wait(&mut self, until: Option<Nanos>, done: &mut Vec<IoDone>) {
        let left = until.map(|until| Duration::from_nanos(until.saturating_sub(self.io.now())));
        // A receive may wait for what another thread is about to do.
        let left = left.unwrap_or(TURN_MAX).min(TURN_MAX);
        self.io.ring.wait(Some(left)).expect("the ring waits");
        while let Some(event) = self.io.ring.next_event() {
            let Event::File { user: (_, token), result, request } = event else {
                panic!("only file requests were started")
            };
            self.io.in_flight -= 1;
            done.push(IoDone { token: IoToken(token), request, result });
        }
    }
}

impl Io for RingIo {
    fn now(&self) -> Nanos {
        self.start.elapsed().as_nanos() as Nanos
    }

    fn buffer(&mut self, len: usize) -> sheave_core::Result<Buf> {
        Ok(dirty(len))
    }

    fn waker(&self) -> Waker {
        unparker()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        _: Destination,
    ) -> Result<(), IoRequest> {
        self.ring.start(request, (0, token.0), self.in_flight, By::Caller)?;
        self.in_flight += 1;
        Ok(())
    }
}

/// The plain calls and nothing else.
pub(crate) struct CallsEngine {
    io: CallsIo,
}

struct CallsIo {
    start: Instant,
    done: VecDeque<IoDone>,
    /// Requests that wait for their sockets.
    waiting: Vec<(IoToken, IoRequest)>,
}

impl CallsEngine {
    pub(crate) fn new() -> Self {
        let (done, waiting) = (VecDeque::new(), Vec::new());
        Self { io: CallsIo { start: Instant::now(), done, waiting } }
    }
}

impl Engine for CallsEngine {
    fn io(&mut self) -> &mut dyn Io {
        &mut self.io
    }

    fn in_flight(&self) -> usize {
        self.io.done.len() + self.io.waiting.len()
    }

    fn wait(&mut self, until: Option<Nanos>, done: &mut Vec<IoDone>) {
        match self.io.done.pop_front() {
            Some(end) => done.push(end),
            None if !self.io.waiting.is_empty() => {
                wait_for_sockets(self.io.waiting.iter().map(|(_, request)| request));
                for (token, request) in std::mem::take(&mut self.io.waiting) {
                    self.io.carry_out(request, token);
                }
                done.extend(self.io.done.drain(..));
            }
            None => {
                let left = until.unwrap_or(0).saturating_sub(self.io.now());
                std::thread::sleep(Duration::from_nanos(left));
            }
        }
    }
}

impl Io for CallsIo {
    fn now(&self) -> Nanos {
        self.start.elapsed().as_nanos() as Nanos
    }

    fn buffer(&mut self, len: usize) -> sheave_core::Result<Buf> {
        Ok(dirty(len))
    }

    fn waker(&self) -> Waker {
        unparker()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        _: Destination,
    ) -> Result<(), IoRequest> {
        if self.done.len() >= REQUESTS_MAX {
            return Err(request);
        }
        self.carry_out(request, token);
        Ok(())
    }
}

impl CallsIo {
    fn carry_out(&mut self, request: IoRequest, token: IoToken) {
        match plain::carry_out(&request) {
            Err(error) if request.is_socket() && error.kind() == ErrorKind::WouldBlock => {
                self.waiting.push((token, request));
            }
            result => self.done.push_back(IoDone { token, request, result }),
        }
    }
}

/// A buffer with old content.
fn dirty(len: usize) -> Buf {
    let buf = Buf::zeroed(len.next_multiple_of(PAGE_SIZE));
    buf.copy_in(0, &vec![0xa5; buf.len()]);
    buf.slice(0, len)
}

/// Checks volumes on both engines.
pub(crate) fn on_both(name: &str, options: Options, make_volume: impl Fn() -> Arc<dyn Volume>) {
    check(options, &make_volume, CallsEngine::new);
    if uring_or_skip(name) {
        check(options, &make_volume, RingEngine::new);
    }
}
