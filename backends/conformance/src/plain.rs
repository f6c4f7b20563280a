//! A plain engine in safe code: blocking calls through bounce buffers, a clock that jumps to the
//! next deadline, completions in random order, and mishaps on demand.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::task::Waker;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use sheave_core::{
    Allocate, Buf, Destination, Io, IoDone, IoRequest, IoToken, Nanos, PAGE_SIZE, Result,
};

use super::{Engine, unparker};

/// The longest wait for a socket.
const SOCKET_WAIT_NS: i64 = 1_000_000;
/// Nanoseconds that pass with each wait.
const TURN_NS: Nanos = 1_000;

/// A mishap of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// Nothing.
    None,
    /// It moves at most so many bytes.
    Short(usize),
    /// It fails with this errno and changes nothing.
    Errno(i32),
    /// It is carried out and then fails with this errno.
    LateErrno(i32),
}

type MishapOf = Box<dyn FnMut(&IoRequest) -> Mishap + Send>;

/// The engine.
pub struct PlainEngine {
    io: PlainIo,
    mishap_of: MishapOf,
}

struct PlainIo {
    queue: VecDeque<(IoToken, IoRequest)>,
    queue_max: usize,
    now: Nanos,
    random: u64,
    /// One in this many starts is refused although there is room; 0 = never.
    refuse_one_in: u64,
}

impl PlainEngine {
    /// An engine without mishaps, with room for `queue_max` requests.
    #[must_use]
    pub fn new(queue_max: usize) -> Self {
        let io = PlainIo { queue: VecDeque::new(), queue_max, now: 1, random: 1, refuse_one_in: 0 };
        Self { io, mishap_of: Box::new(|_| Mishap::None) }
    }

    /// Refuses one start in `count`, at random.
    #[must_use]
    pub fn refusing_one_in(mut self, count: u64, seed: u64) -> Self {
        self.io.refuse_one_in = count;
        self.io.random = seed | 1;
        self
    }

    /// Asks `mishap_of` about every request.
    #[must_use]
    pub fn with_mishaps(
        mut self,
        mishap_of: impl FnMut(&IoRequest) -> Mishap + Send + 'static,
    ) -> Self {
        self.mishap_of = Box::new(mishap_of);
        self
    }

    fn carry_out(&mut self, request: &IoRequest) -> io::Result<usize> {
        match (self.mishap_of)(request) {
            Mishap::None => carry_out(request, usize::MAX),
            Mishap::Short(count_max) => carry_out(request, count_max),
            Mishap::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
            Mishap::LateErrno(errno) => {
                carry_out(request, usize::MAX)?;
                Err(io::Error::from_raw_os_error(errno))
            }
        }
    }
}

impl Engine for PlainEngine {
    fn io(&mut self) -> &mut dyn Io {
        &mut self.io
    }

    fn in_flight(&self) -> usize {
        self.io.queue.len()
    }

    fn wait(&mut self, until: Option<Nanos>, done: &mut Vec<IoDone>) {
        self.io.now += TURN_NS;
        if self.io.queue.is_empty() {
            self.io.now = self.io.now.max(until.unwrap_or(0));
            // The op may wait for another thread.
            std::thread::yield_now();
            return;
        }
        let count = self.io.queue.len();
        let first = self.io.next_random() as usize % count;
        for at in (0..count).map(|turn| (first + turn) % count) {
            let Some((token, request)) = self.io.queue.remove(at) else { return };
            let result = self.carry_out(&request);
            let must_wait = result.as_ref().is_err_and(|why| why.kind() == ErrorKind::WouldBlock);
            if !must_wait || !request.is_socket() {
                return done.push(IoDone { token, request, result });
            }
            self.io.queue.insert(at, (token, request));
        }
        // Peers run in real time.
        let begun = Instant::now();
        wait_for_sockets(self.io.queue.iter().map(|(_, request)| request));
        self.io.now += begun.elapsed().as_nanos() as Nanos;
    }
}

impl PlainIo {
    /// Marsaglia's xorshift64.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

impl Io for PlainIo {
    fn now(&self) -> Nanos {
        self.now
    }

    fn buffer(&mut self, len: usize) -> Result<Buf> {
        // A pool's buffers hold what was in them before; a backend must not take it for zeroes.
        let buf = Buf::try_zeroed(len)?;
        buf.copy_in(0, &vec![0xa5; len]);
        Ok(buf)
    }

    fn waker(&self) -> Waker {
        unparker()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        _: Destination,
    ) -> std::result::Result<(), IoRequest> {
        let refused =
            self.refuse_one_in > 0 && self.next_random().is_multiple_of(self.refuse_one_in);
        if refused || self.queue.len() >= self.queue_max {
            return Err(request);
        }
        self.queue.push_back((token, request));
        Ok(())
    }
}

fn carry_out(request: &IoRequest, count_max: usize) -> io::Result<usize> {
    match request {
        IoRequest::Read { file, at, into } => with_aligned(into.len().min(count_max), |bytes| {
            let count = file.read_at(bytes, *at)?;
            into.copy_in(0, &bytes[..count]);
            Ok(count)
        }),
        IoRequest::Write { file, at, from, dsync } => {
            let count = with_aligned(from.len().min(count_max), |bytes| {
                from.slice(0, bytes.len()).copy_out(bytes);
                file.write_at(bytes, *at)
            })?;
            if *dsync {
                file.sync_data()?;
            }
            Ok(count)
        }
        IoRequest::Sync { file } => file.sync_data().map(|()| 0),
        IoRequest::Allocate { file, mode, at, len } => allocate(file, *mode, *at, *len),
        IoRequest::Recv { socket, into, skip, all: _ } => {
            let mut bytes = vec![0; (into.len() - skip).min(count_max)];
            let (count, _) = recv(socket, &mut bytes[..], RecvFlags::DONTWAIT)?;
            into.copy_in(*skip, &bytes[..count]);
            Ok(count)
        }
        IoRequest::Send { socket, from, skip } => {
            let bytes = from.slice(*skip, (from.len() - skip).min(count_max)).to_vec();
            Ok(send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
        }
    }
}

/// Waits for one of the sockets of these requests, or for a short time, since another thread may
/// wake the backend, too.
pub fn wait_for_sockets<'a>(requests: impl Iterator<Item = &'a IoRequest>) {
    let of_request = |request: &'a IoRequest| match request {
        IoRequest::Recv { socket, .. } => Some(PollFd::new(socket, PollFlags::IN)),
        IoRequest::Send { socket, .. } => Some(PollFd::new(socket, PollFlags::OUT)),
        _ => None,
    };
    let mut sockets: Vec<_> = requests.filter_map(of_request).collect();
    let _ = poll(&mut sockets, Some(&Timespec { tv_sec: 0, tv_nsec: SOCKET_WAIT_NS }));
}

fn allocate(file: &File, mode: Allocate, at: u64, len: u64) -> io::Result<usize> {
    let mode = match mode {
        Allocate::PunchHole => FallocateFlags::PUNCH_HOLE,
        Allocate::ZeroRange => FallocateFlags::ZERO_RANGE,
    };
    fallocate(file, mode | FallocateFlags::KEEP_SIZE, at, len)?;
    Ok(0)
}

/// Calls with `len` bytes of memory that is aligned for `O_DIRECT`.
fn with_aligned<T>(len: usize, call: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut bytes = vec![0; len + PAGE_SIZE];
    let skip = bytes.as_ptr().align_offset(PAGE_SIZE);
    call(&mut bytes[skip..skip + len])
}
