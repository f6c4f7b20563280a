//! One io_uring and everything it has in flight.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use sheave_core::{IoRequest, Payload, memory};
use slab::Slab;

use crate::SendBatch;
use crate::buffers::Buffers;
use crate::config::RingConfig;
use crate::entries::{file_entry, message_entry, one_vector_entry};
use crate::iovec::IoVecs;
use crate::probe::{Probe, open};
use crate::provided::{GROUP, Provided, Received};
use crate::watch::is_hung_up;

/// What submits a file request to its storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The thread that calls the ring. Some storage makes it wait.
    Caller,
    /// A thread of the kernel (IOSQE_ASYNC).
    Worker,
}

/// A socket that a ring uses. Give it back by [`Ring::close`].
pub struct Socket {
    fd: OwnedFd,
    pub(crate) slot: Option<u32>,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What ended. `user` is what the starter gave.
pub enum Event {
    /// A [`Ring::recv`]; `None` at the end of the stream.
    Received {
        /// The starter's name.
        user: u64,
        /// The bytes.
        result: io::Result<Option<Received>>,
    },
    /// A [`Ring::recv`] found no free buffer; give some back and try again.
    NoBuffer {
        /// The starter's name.
        user: u64,
    },
    /// A [`Ring::recv_into`]; zero bytes at the end of the stream, and it may be short.
    Landed {
        /// The starter's name.
        user: u64,
        /// How many bytes.
        result: io::Result<usize>,
        /// The memory they are in.
        payload: Payload,
    },
    /// A [`Ring::send`], advanced by what was sent, which may be short.
    Sent {
        /// The starter's name.
        user: u64,
        /// How it went.
        result: io::Result<()>,
        /// The batch.
        batch: Box<SendBatch>,
    },
    /// A [`Ring::watch`].
    Watched {
        /// The starter's name.
        user: u64,
        /// Whether the other side can no longer receive anything.
        is_gone: bool,
    },
    /// A [`Ring::start`].
    File {
        /// The starter's name.
        user: (u32, u64),
        /// Bytes moved.
        result: io::Result<usize>,
        /// The request.
        request: IoRequest,
    },
    /// A [`Ring::command`].
    Command {
        /// The starter's name.
        user: (u32, u32),
        /// The driver's answer, a negative error number if it failed.
        result: i32,
    },
}

/// What the kernel holds until the completion. The slab owns it, whatever becomes of the starter.
#[expect(dead_code, reason = "only the kernel reads `message` and `vectors`")]
pub(crate) enum InFlight {
    Recv { user: u64 },
    RecvInto { user: u64, payload: Payload, message: Box<Message> },
    Send { user: u64, batch: Box<SendBatch> },
    Watch { user: u64 },
    File { user: (u32, u64), request: IoRequest, vectors: IoVecs },
    Message { user: (u32, u64), request: IoRequest, message: Box<Message> },
    Command { user: (u32, u32) },
    Cancel,
}

/// Vectors and header of a `recvmsg` or `sendmsg`, boxed because the kernel holds their address.
pub(crate) struct Message {
    #[expect(dead_code, reason = "the kernel reads it through `header`")]
    iov: IoVecs,
    pub(crate) header: libc::msghdr,
}

impl Message {
    pub(crate) fn of(mut iov: IoVecs) -> Box<Self> {
        let header = iov.header();
        Box::new(Self { iov, header })
    }
}

/// An io_uring, used by the thread that made it.
pub struct Ring {
    // Dropped by hand, in this order: the kernel may write to what follows until the ring is gone.
    pub(crate) uring: ManuallyDrop<IoUring>,
    pub(crate) in_flight: ManuallyDrop<Slab<InFlight>>,
    provided: ManuallyDrop<Provided>,
    files_in_flight: usize,
    sockets: usize,
    free_slots: Vec<u32>,
    pub(crate) buffers: Buffers,
    config: RingConfig,
}

impl Ring {
    /// A ring of the mode that [`crate::probe`] found.
    ///
    /// # Errors
    /// What the kernel says, mostly for want of memory or descriptors.
    pub fn new(probe: &Probe, config: RingConfig) -> io::Result<Self> {
        let uring = open(probe.mode, config.entries)?;
        let workers = u32::try_from(config.file_requests_max).unwrap_or(u32::MAX);
        let _ = uring.submitter().register_iowq_max_workers(&mut [workers, 0]);
        let count = if probe.registered_files { config.registered_max } else { 0 };
        let registered = count > 0 && uring.submitter().register_files_sparse(count).is_ok();
        let mut provided =
            Provided::register(&uring, config.receive_buffers_max, config.receive_buffer_len)?;
        provided.circulate(config.receive_buffers_min.into());
        Ok(Self {
            uring: ManuallyDrop::new(uring),
            in_flight: ManuallyDrop::new(Slab::new()),
            provided: ManuallyDrop::new(provided),
            files_in_flight: 0,
            sockets: 0,
            free_slots: if registered { (0..count).rev().collect() } else { Vec::new() },
            buffers: Buffers::default(),
            config,
        })
    }

    /// Makes room for what one more socket may have in flight: a receive, a send and a watch.
    ///
    /// # Errors
    /// [`ErrorKind::NoMemory`](sheave_core::ErrorKind::NoMemory) when there is no memory for it.
    pub fn make_room(&mut self) -> sheave_core::Result<()> {
        let (capacity, files_max) = (self.in_flight.capacity(), self.config.file_requests_max);
        let wanted = files_max + 3 * (self.sockets + 1);
        if wanted > capacity {
            let wanted = wanted.max(2 * capacity);
            memory::check_growth::<InFlight>(wanted, wanted / 2)?;
            let more = wanted - self.in_flight.len();
            self.in_flight.reserve(more);
        }
        Ok(())
    }

    /// Takes a socket in, registered if there is room.
    pub fn adopt(&mut self, fd: OwnedFd) -> Socket {
        self.sockets += 1;
        self.circulate();
        let Some(slot) = self.free_slots.pop() else { return Socket { fd, slot: None } };
        if self.uring.submitter().register_files_update(slot, &[fd.as_raw_fd()]).is_ok() {
            return Socket { fd, slot: Some(slot) };
        }
        self.free_slots.push(slot);
        Socket { fd, slot: None }
    }

    /// Ends what is in flight on a socket, with `ECANCELED` unless it has just ended otherwise.
    pub fn cancel(&mut self, socket: &Socket) {
        let which = match socket.slot {
            Some(slot) => CancelBuilder::fd(Fixed(slot)),
            None => CancelBuilder::fd(Fd(socket.fd.as_raw_fd())),
        };
        // Does not wait: the cancelled requests complete like any others.
        let _ = self.uring.submitter().register_sync_cancel(Some(Timespec::new()), which.all());
    }

    /// Closes a socket that has nothing in flight.
    pub fn close(&mut self, socket: Socket) {
        // The other side must see the end even if the kernel keeps the file in its table.
        let _ = rustix::net::shutdown(&socket.fd, rustix::net::Shutdown::Both);
        self.release(socket);
    }

    /// Gives a socket back that has nothing in flight.
    pub fn release(&mut self, socket: Socket) -> OwnedFd {
        if let Some(slot) = socket.slot
            && self.uring.submitter().register_files_update(slot, &[-1]).is_ok()
        {
            self.free_slots.push(slot);
        }
        self.sockets -= 1;
        self.circulate();
        socket.fd
    }

    fn circulate(&mut self) {
        // With fewer, sockets that are ready at once would have to be asked again.
        self.provided.circulate(self.sockets.max(self.config.receive_buffers_min.into()));
    }

    /// Receives what arrives next into a buffer of the ring's.
    pub fn recv(&mut self, socket: &Socket, user: u64) {
        let len = 0; // As much as the buffer that the kernel picks can hold.
        let null = std::ptr::null_mut();
        let entry = match socket.slot {
            Some(slot) => opcode::Recv::new(Fixed(slot), null, len).buf_group(GROUP).build(),
            None => {
                opcode::Recv::new(Fd(socket.fd.as_raw_fd()), null, len).buf_group(GROUP).build()
            }
        };
        self.push(entry.flags(squeue::Flags::BUFFER_SELECT), InFlight::Recv { user });
    }

    /// Receives exactly the payload's bytes from `skip` on, in place.
    pub fn recv_into(&mut self, socket: &Socket, payload: Payload, skip: usize, user: u64) {
        let mut iov = IoVecs::default();
        iov.set_payload(&payload, skip);
        let mut message = Message::of(iov);
        let header = &raw mut message.header;
        let flags = libc::MSG_WAITALL as u32;
        let entry = match socket.slot {
            Some(slot) => opcode::RecvMsg::new(Fixed(slot), header).flags(flags).build(),
            None => opcode::RecvMsg::new(Fd(socket.fd.as_raw_fd()), header).flags(flags).build(),
        };
        self.push(entry, InFlight::RecvInto { user, payload, message });
    }

    /// Sends what is unsent of the batch.
    pub fn send(&mut self, socket: &Socket, mut batch: Box<SendBatch>, user: u64) {
        let header = batch.prepare();
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = match socket.slot {
            Some(slot) => opcode::SendMsg::new(Fixed(slot), header).flags(flags).build(),
            None => opcode::SendMsg::new(Fd(socket.fd.as_raw_fd()), header).flags(flags).build(),
        };
        self.push(entry, InFlight::Send { user, batch });
    }

    /// Starts file or socket I/O. `user` names the starter and its request; `held` is how many
    /// requests it has in flight.
    ///
    /// # Errors
    /// Hands the request back when the starter has as many in flight as there is room for more, of
    /// [`RingConfig::file_requests_max`]. So whatever hangs leaves room for others: half of it
    /// beside one starter that hangs, a ninth beside eight. Requests of sockets do not count, since
    /// a receive may last as long as its connection; they are handed back for want of memory only.
    pub fn start(
        &mut self,
        request: IoRequest,
        user: (u32, u64),
        held: usize,
        by: By,
    ) -> Result<(), IoRequest> {
        if request.is_socket() {
            return self.start_on_socket(request, user);
        }
        // The bell may be beyond the bound.
        let room = self.config.file_requests_max.saturating_sub(self.files_in_flight);
        if held >= room {
            return Err(request);
        }
        self.push_file(request, user, by);
        Ok(())
    }

    /// Starts file I/O whatever else is in flight: for the few requests of the ring's owner.
    pub fn start_unbounded(&mut self, request: IoRequest, user: (u32, u64)) {
        self.push_file(request, user, By::Caller);
    }

    fn push_file(&mut self, request: IoRequest, user: (u32, u64), by: By) {
        self.files_in_flight += 1;
        let mut vectors = IoVecs::default();
        let entry = match by {
            By::Caller => file_entry(&request, &mut vectors),
            By::Worker => file_entry(&request, &mut vectors).flags(squeue::Flags::ASYNC),
        };
        self.push(entry, InFlight::File { user, request, vectors });
    }

    fn start_on_socket(&mut self, request: IoRequest, user: (u32, u64)) -> Result<(), IoRequest> {
        let (len, capacity) = (self.in_flight.len(), self.in_flight.capacity());
        if memory::check_growth::<InFlight>(len, capacity).is_err() {
            return Err(request);
        }
        let mut vectors = IoVecs::default();
        match one_vector_entry(&request, &mut vectors) {
            Some(entry) => self.push(entry, InFlight::File { user, request, vectors }),
            None => {
                let mut message = Message::of(vectors);
                let entry = message_entry(&request, &raw mut message.header);
                self.push(entry, InFlight::Message { user, request, message });
            }
        }
        Ok(())
    }

    /// Submits the pending entries now, rather than with the next wait, if there are at least
    /// `entries`.
    pub fn submit_from(&mut self, entries: usize) {
        if self.uring.submission().len() < entries {
            return;
        }
        // What the kernel does not take now stays pending, and the next wait tells what is wrong.
        let _ = self.uring.submitter().submit();
    }

    /// Whether a completion is ready now; submits what is pending, and enters the kernel only if
    /// something is pending or the kernel asks for it.
    ///
    /// # Errors
    /// What io_uring_enter(2) says.
    pub fn poll(&mut self) -> io::Result<bool> {
        let queue = self.uring.submission();
        let (pending, wanted) = (!queue.is_empty(), queue.taskrun() || queue.cq_overflow());
        drop(queue);
        if pending || wanted {
            self.enter(0, None)?;
        }
        Ok(!self.uring.completion().is_empty())
    }

    /// Submits what is pending and sleeps until a completion is ready or the time is over.
    ///
    /// # Errors
    /// What io_uring_enter(2) says.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.enter(1, timeout)
    }

    /// The next thing that ended.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            let entry = self.uring.completion().next()?;
            let key = usize::try_from(entry.user_data()).expect("user data is a slab key");
            // An unknown key would mean that the kernel still uses memory that was freed.
            let in_flight = self.in_flight.try_remove(key);
            match in_flight.expect("the kernel completes what we sent") {
                // The end of what it cancels is an event of its own.
                InFlight::Cancel => {}
                in_flight => return Some(self.event(in_flight, &entry)),
            }
        }
    }

    /// Gives the bytes of an [`Event::Received`] back to the kernel.
    pub fn give_back(&mut self, received: Received) {
        self.provided.give_back(received);
    }

    fn event(&mut self, in_flight: InFlight, entry: &cqueue::Entry) -> Event {
        let result = match usize::try_from(entry.result()) {
            Ok(count) => Ok(count),
            Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
        };
        match in_flight {
            InFlight::Recv { user } => self.received(user, result, entry.flags()),
            InFlight::RecvInto { user, payload, message: _ } => {
                Event::Landed { user, result, payload }
            }
            InFlight::Send { user, mut batch } => {
                let result = result.map(|count| batch.advance(count));
                Event::Sent { user, result, batch }
            }
            InFlight::Watch { user } => {
                Event::Watched { user, is_gone: result.is_ok_and(is_hung_up) }
            }
            InFlight::File { user, request, vectors: _ } => {
                if !request.is_socket() {
                    self.files_in_flight -= 1;
                }
                Event::File { user, result, request }
            }
            InFlight::Message { user, request, message: _ } => {
                Event::File { user, result, request }
            }
            InFlight::Command { user } => Event::Command { user, result: entry.result() },
            InFlight::Cancel => unreachable!("it has no event"),
        }
    }

    fn received(&mut self, user: u64, result: io::Result<usize>, flags: u32) -> Event {
        let taken = cqueue::buffer_select(flags)
            .map(|id| self.provided.take(id, *result.as_ref().unwrap_or(&0)));
        match result {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Event::NoBuffer { user },
            Ok(count) if count > 0 => Event::Received { user, result: Ok(taken) },
            other => {
                if let Some(buffer) = taken {
                    self.provided.give_back(buffer);
                }
                Event::Received { user, result: other.map(|_| None) }
            }
        }
    }

    pub(crate) fn push(&mut self, entry: squeue::Entry, in_flight: InFlight) {
        let key = self.in_flight.insert(in_flight);
        let entry = entry.user_data(key as u64);
        // SAFETY: whatever the entry points at is owned by the slab entry just made, at an address
        // that does not change when the slab grows, and stays there until the completion.
        // JUSTIFICATION: handing memory to the kernel is what a ring does.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            // The queue is full: the kernel takes it all and makes room.
            self.enter(0, None).expect("the kernel takes submissions");
        }
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        let submitter = self.uring.submitter();
        let entered = match timeout {
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                submitter.submit_with_args(want, &SubmitArgs::new().timespec(&timespec))
            }
            None => submitter.submit_and_wait(want),
        };
        match entered {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Time over, a signal, or completions to be taken first: the caller looks anyway.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Cancels and takes back all that the kernel holds. False if it kept something.
    fn drain(&mut self) -> bool {
        const ROUNDS_MAX: u32 = 50;
        let round = Duration::from_millis(100);
        for _ in 0..ROUNDS_MAX {
            if self.in_flight.is_empty() {
                return true;
            }
            let timeout = Some(Timespec::from(round));
            let _ = self.uring.submitter().register_sync_cancel(timeout, CancelBuilder::any());
            if self.wait(Some(round)).is_err() {
                return false;
            }
            while let Some(event) = self.next_event() {
                if let Event::Received { result: Ok(Some(received)), .. } = event {
                    self.give_back(received);
                }
            }
        }
        self.in_flight.is_empty()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let drained = self.drain();
        // SAFETY: each is dropped once, here, and not used again.
        // JUSTIFICATION: the order matters, and what the kernel keeps must be leaked, not freed.
        unsafe {
            ManuallyDrop::drop(&mut self.uring);
            if drained {
                ManuallyDrop::drop(&mut self.in_flight);
                ManuallyDrop::drop(&mut self.provided);
            }
        }
    }
}
