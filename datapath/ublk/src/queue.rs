//! One queue of a device: a slot for each request that the kernel may have out.

use std::collections::VecDeque;
use std::io;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use sheave_core::{Buf, ByteRange, Error, ErrorKind, Nanos, Op, OpKind, Outcome, Reply};
use sheave_ring::{Descriptor, Descriptors, DeviceCommand};
use sheave_shard::{DeviceQueue, QueueCx};
use sheave_telemetry::Recorder;

use crate::device::IO_MAX_BYTES;
use crate::uapi::{
    DeviceInfo, SECTOR_SHIFT, auto_buf_reg, commit_and_fetch, fetch, flag, operation, position,
};

/// The driver has a request.
const OK: i32 = 0;
/// The result when the kernel is short of memory.
const EAGAIN: i32 = -11;
const ENOMEM: i32 = -12;
/// The result when the device is being stopped.
const ENODEV: i32 = -19;

/// The most bytes of data in memory; more requests wait in the kernel's memory.
const HELD_BYTES_MAX: u64 = 32 << 20;
const _: () = assert!(HELD_BYTES_MAX >= IO_MAX_BYTES as u64);

/// A queue, see [`DeviceQueue`].
pub(crate) struct UblkQueue {
    number: u16,
    descriptors: Descriptors,
    /// The driver registers the memory of requests with the ring.
    registers: bool,
    /// The first slot's index in the ring's table; `None` without entries, or when they are not
    /// used any more.
    first_buffer: Option<u16>,
    slots: Vec<Slot>,
    /// Slots that will get no more requests from the kernel.
    ended: usize,
    /// Slots that wait for memory for their data.
    waiting: VecDeque<u32>,
    /// Bytes of data in memory.
    held_bytes: u64,
    times: Vec<Timed>,
    /// All requests are answered with an error, and the backend gets no more ops.
    abandoned: bool,
    /// Ops that were in the backend at that time and have not completed.
    orphans: usize,
    /// See [`shed_privilege`].
    shed_privilege: bool,
}

/// The owner of a slot.
enum Slot {
    /// The kernel, or nothing any more. This result was sent with its last commit, if any.
    Away(Option<i32>),
    /// The backend.
    Busy { kind: OpKind, bytes: u64, in_place: bool, start: Nanos, submitted: Nanos },
}

/// An op that completed in this turn.
struct Timed {
    kind: OpKind,
    start: Nanos,
    submitted: Nanos,
}

impl UblkQueue {
    pub(crate) fn new(
        number: u16,
        descriptors: Descriptors,
        info: &DeviceInfo,
        shed_privilege: bool,
    ) -> Self {
        Self {
            number,
            descriptors,
            registers: info.registers(),
            first_buffer: None,
            slots: (0..info.depth).map(|_| Slot::Away(None)).collect(),
            ended: 0,
            waiting: VecDeque::with_capacity(info.depth.into()),
            held_bytes: 0,
            times: Vec::new(),
            abandoned: false,
            orphans: 0,
            shed_privilege,
        }
    }

    /// Handles the request that has arrived in this slot.
    fn begin(&mut self, slot: u32, cx: &mut QueueCx<'_>) {
        let Descriptor { op_flags, sectors, start_sector, .. } =
            self.descriptors.get(slot as usize);
        if self.abandoned {
            return self.fail(slot, cx);
        }
        let fua = op_flags & flag::FUA != 0;
        let operation = op_flags as u8;
        if operation == operation::FLUSH {
            return self.submit(slot, Op::Flush, cx);
        }
        let start = start_sector.checked_mul(1 << SECTOR_SHIFT);
        let len = u64::from(sectors) << SECTOR_SHIFT;
        let range = start.and_then(|start| ByteRange::within(start, len, cx.size()).ok());
        let Some(range) = range else {
            return self.refuse(slot, ErrorKind::Invalid, "request beyond the volume", cx);
        };
        let own = self.registered_buffer(slot, op_flags, range, cx);
        if own.is_none() && matches!(operation, operation::READ | operation::WRITE) {
            if self.held_bytes + len > HELD_BYTES_MAX {
                return self.waiting.push_front(slot);
            }
            self.held_bytes += len;
        }
        let op = match (operation, own) {
            (operation::READ, into) => Op::Read { range, into },
            (operation::WRITE, Some(own)) => Op::Write { range, data: own.into(), fua },
            (operation::WRITE, None) => return self.fill(slot, range, fua, cx),
            (operation::DISCARD, _) => Op::Trim { range, fua },
            (operation::WRITE_ZEROES, _) => {
                let no_hole = op_flags & flag::NOUNMAP != 0;
                Op::WriteZeroes { range, fua, no_hole, fast: false }
            }
            _ => return self.refuse(slot, ErrorKind::Unsupported, "unknown operation", cx),
        };
        self.submit(slot, op, cx);
    }

    /// The memory of the request, if its data can stay there.
    fn registered_buffer(
        &self,
        slot: u32,
        op_flags: u32,
        range: ByteRange,
        cx: &QueueCx<'_>,
    ) -> Option<Buf> {
        if op_flags & flag::NEED_REG_BUF != 0 {
            return None;
        }
        let index = self.index(slot)?;
        let kind = match op_flags as u8 {
            operation::READ => OpKind::Read,
            operation::WRITE => OpKind::Write,
            _ => return None,
        };
        let takes = cx.takes_registered(kind, range);
        takes.then(|| Buf::registered(index, range.len() as usize))
    }

    /// Begins requests that waited for memory, in the order in which they came.
    fn begin_waiting(&mut self, cx: &mut QueueCx<'_>) {
        while let Some(slot) = self.waiting.pop_front() {
            let left = self.waiting.len();
            self.begin(slot, cx);
            if self.waiting.len() > left {
                return;
            }
        }
    }

    /// Fetches the data of a write.
    fn fill(&mut self, slot: u32, range: ByteRange, fua: bool, cx: &mut QueueCx<'_>) {
        let data = match cx.write_buffer(range) {
            Ok(data) => data,
            Err(error) => {
                self.held_bytes -= range.len();
                return self.end_failed(slot, OpKind::Write, &error, cx);
            }
        };
        if let Err(error) = cx.copy_from_device(position(self.number, slot as u16), &data) {
            cx.recycle(data);
            self.held_bytes -= range.len();
            return self.end_failed(slot, OpKind::Write, &not_copied(error), cx);
        }
        self.submit(slot, Op::Write { range, data, fua }, cx);
    }

    fn submit(&mut self, slot: u32, op: Op, cx: &mut QueueCx<'_>) {
        let bytes = op.range().map_or(0, ByteRange::len);
        let (kind, start) = (op.kind(), cx.now());
        let in_place = op.is_in_place();
        self.slots[slot as usize] = Slot::Busy { kind, bytes, in_place, start, submitted: start };
        if let Some(outcome) = cx.submit(op, slot) {
            self.complete(slot, outcome, cx);
        }
    }

    /// Answers a request whose op has completed.
    fn complete(&mut self, slot: u32, outcome: Outcome, cx: &mut QueueCx<'_>) {
        if self.abandoned {
            // The slot's request was answered when the queue was abandoned.
            self.orphans -= 1;
            return;
        }
        let was = std::mem::replace(&mut self.slots[slot as usize], Slot::Away(None));
        let Slot::Busy { kind, bytes, in_place, start, submitted } = was else {
            unreachable!("a backend ends what it was given, once")
        };
        if in_place && outcome.as_ref().is_err_and(is_about_memory) {
            tracing::warn!(?outcome, queue = self.number, "data is copied from now on");
            self.first_buffer = None;
            return self.begin(slot, cx);
        }
        self.times.push(Timed { kind, start, submitted });
        if matches!(kind, OpKind::Read | OpKind::Write) && !in_place {
            self.held_bytes -= bytes;
        }
        // The result of a read or a write is the number of bytes.
        let done = i32::try_from(bytes).unwrap_or(0);
        match outcome {
            Ok(Reply::Data(payload)) if payload.len() as u64 == bytes => {
                let copied = cx.copy_to_device(position(self.number, slot as u16), &payload);
                cx.recycle(payload);
                if let Err(error) = copied {
                    return self.end_failed(slot, kind, &not_copied(error), cx);
                }
                cx.recorder().add_bytes(kind, bytes);
                self.answer(slot, done, cx);
            }
            Ok(Reply::Done) if kind != OpKind::Read || in_place => {
                cx.recorder().add_bytes(kind, bytes);
                self.answer(slot, done, cx);
            }
            Ok(_) => {
                debug_assert!(false, "a backend answers what it was asked");
                self.refuse(slot, ErrorKind::Io, "the volume gave a wrong answer", cx);
            }
            Err(error) => self.end_failed(slot, kind, &error, cx),
        }
    }

    fn end_failed(&mut self, slot: u32, kind: OpKind, error: &Error, cx: &mut QueueCx<'_>) {
        cx.failed(kind, error);
        self.answer(slot, -error.kind().linux_errno(), cx);
    }

    fn refuse(&mut self, slot: u32, kind: ErrorKind, why: &str, cx: &mut QueueCx<'_>) {
        let error = Error::new(kind, "ublk", format!("queue {}: {why}", self.number));
        tracing::warn!(%error, "request refused");
        self.answer(slot, -kind.linux_errno(), cx);
    }

    fn fail(&mut self, slot: u32, cx: &mut QueueCx<'_>) {
        self.answer(slot, -ErrorKind::Io.linux_errno(), cx);
    }

    /// Sends the result of the slot's request to the kernel, and fetches the next one.
    fn answer(&mut self, slot: u32, result: i32, cx: &mut QueueCx<'_>) {
        self.slots[slot as usize] = Slot::Away(Some(result));
        let command = commit_and_fetch(self.number, slot as u16, result, self.addr(slot));
        cx.command(&command, slot);
    }

    fn fetching(&self, slot: u32) -> DeviceCommand {
        fetch(self.number, slot as u16, self.addr(slot))
    }

    /// How the driver is to register the memory of the slot's next request.
    fn addr(&self, slot: u32) -> [u8; 8] {
        if self.registers { auto_buf_reg(self.index(slot)) } else { [0; 8] }
    }

    fn index(&self, slot: u32) -> Option<u16> {
        Some(self.first_buffer? + slot as u16)
    }
}

impl DeviceQueue for UblkQueue {
    fn buffers(&self) -> u16 {
        if self.registers { self.slots.len() as u16 } else { 0 }
    }

    fn start(&mut self, first_buffer: Option<u16>, cx: &mut QueueCx<'_>) {
        self.first_buffer = first_buffer;
        if self.shed_privilege {
            shed_privilege();
        }
        for slot in 0..self.slots.len() {
            cx.command(&self.fetching(slot as u32), slot as u32);
        }
    }

    fn commanded(&mut self, slot: u32, result: i32, cx: &mut QueueCx<'_>) {
        match result {
            // Not before those that wait.
            OK if !self.waiting.is_empty() => self.waiting.push_back(slot),
            OK => self.begin(slot, cx),
            // The request must be answered all the same.
            EAGAIN | ENOMEM if let Slot::Away(told) = self.slots[slot as usize] => match told {
                Some(told) => self.answer(slot, told, cx),
                None => cx.command(&self.fetching(slot), slot),
            },
            _ => {
                self.ended += 1;
                if result != ENODEV {
                    let error = io::Error::from_raw_os_error(-result);
                    tracing::error!(%error, queue = self.number, slot, "slot given up");
                }
            }
        }
    }

    fn completed(&mut self, slot: u32, outcome: Outcome, cx: &mut QueueCx<'_>) {
        self.complete(slot, outcome, cx);
        self.begin_waiting(cx);
    }

    fn taken(&mut self, slot: u32, now: Nanos) {
        if let Slot::Busy { submitted, .. } = &mut self.slots[slot as usize] {
            *submitted = now;
        }
    }

    fn abandon(&mut self, cx: &mut QueueCx<'_>) {
        self.abandoned = true;
        tracing::info!(queue = self.number, "requests fail from now on");
        // The backend's ops in flight must not use the memory of a later request.
        self.first_buffer = None;
        for slot in 0..self.slots.len() {
            if let Slot::Busy { .. } = self.slots[slot] {
                self.orphans += 1;
                self.fail(slot as u32, cx);
            }
        }
        for slot in std::mem::take(&mut self.waiting) {
            self.fail(slot, cx);
        }
    }

    fn turn_ended(&mut self, now: Nanos, recorder: &Recorder) {
        for Timed { kind, start, submitted } in self.times.drain(..) {
            recorder.record_op(kind, start, submitted, now, 1);
        }
    }

    fn is_finished(&self) -> bool {
        self.ended == self.slots.len() && self.orphans == 0
    }
}

fn not_copied(error: io::Error) -> Error {
    Error::new(ErrorKind::Io, "copy", "data of a request").because(error)
}

/// Whether an error may come from registered memory: from a file system that does not support it,
/// or that needs another alignment for direct I/O.
fn is_about_memory(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unsupported)
}

/// Drops `CAP_SYS_ADMIN` from this thread permanently. The thread does not need it, and the kernel
/// reads no partition table of a device whose queues fetch their first requests without it.
fn shed_privilege() {
    let shed = capabilities(None).and_then(|mut sets| {
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        set_capabilities(None, sets)
    });
    if let Err(error) = shed {
        tracing::warn!(%error, "a shard keeps CAP_SYS_ADMIN");
    }
}
