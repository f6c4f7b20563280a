//! Ops that a backend had no room for: one FIFO per volume and thread.

use std::collections::VecDeque;

use sheave_core::{Backend, Error, ErrorKind, Io, Op, Outcome, Submitted, Tag, memory};

use crate::tags::untag;

/// The most ops that a connection, or a queue of a device, has in flight, those that wait for room
/// included. It bounds the ops that wait for a volume, per user.
pub const IN_FLIGHT_MAX: usize = 1024;

/// From so many bytes of writes on that wait for a volume its connections receive nothing.
const CROWD_BYTES: usize = 8 << 20;

/// The ops of one volume that wait for room in its backend.
#[derive(Default)]
pub(crate) struct Waiting {
    ops: VecDeque<(Tag, Op)>,
    /// Bytes that they are to write.
    bytes: usize,
}

impl Waiting {
    pub(crate) fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether so much waits that no more is to be received.
    pub(crate) fn is_crowd(&self) -> bool {
        self.bytes >= CROWD_BYTES
    }

    /// Starts an op, or queues it behind those that wait. Returns the outcome if the op has
    /// completed.
    pub(crate) fn submit(
        &mut self,
        op: Op,
        tag: Tag,
        backend: &mut dyn Backend,
        io: &mut dyn Io,
    ) -> Option<Outcome> {
        if !self.ops.is_empty() {
            return self.push(op, tag);
        }
        match backend.submit(op, tag, io) {
            Submitted::Done(outcome) => Some(outcome),
            Submitted::Queued => None,
            Submitted::Full(op) => self.push(op, tag),
        }
    }

    #[cold]
    fn push(&mut self, op: Op, tag: Tag) -> Option<Outcome> {
        if let Err(error) = memory::attempt(|| self.ops.try_reserve(1)) {
            return Some(Err(error));
        }
        self.bytes += written_len(&op);
        self.ops.push_back((tag, op));
        None
    }

    /// Submits the first op to the backend. If the backend takes it, returns its tag, and its
    /// outcome if it has completed.
    pub(crate) fn offer(
        &mut self,
        backend: &mut dyn Backend,
        io: &mut dyn Io,
    ) -> Option<(Tag, Option<Outcome>)> {
        let (tag, op) = self.ops.pop_front()?;
        let bytes = written_len(&op);
        let outcome = match backend.submit(op, tag, io) {
            Submitted::Done(outcome) => Some(outcome),
            Submitted::Queued => None,
            Submitted::Full(op) => {
                self.ops.push_front((tag, op));
                return None;
            }
        };
        self.bytes -= bytes;
        Some((tag, outcome))
    }

    /// Removes the ops of a connection or queue, which the backend never got. Returns their
    /// requests, each with an error.
    pub(crate) fn withdraw(&mut self, owner: u32) -> Vec<(u32, Outcome)> {
        let mut withdrawn = Vec::new();
        self.ops.retain(|(tag, op)| {
            let (of, request) = untag(*tag);
            if of == owner {
                let why = "withdrawn: its connection or device has ended";
                let error = Error::new(ErrorKind::Shutdown, op.kind().name(), why);
                withdrawn.push((request, Err(error)));
                self.bytes -= written_len(op);
            }
            of != owner
        });
        withdrawn
    }
}

/// Bytes of memory that an op holds while it waits.
fn written_len(op: &Op) -> usize {
    match op {
        Op::Write { data, .. } => data.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use sheave_core::{
        Buf, Completion, Destination, IoDone, IoRequest, IoToken, Nanos, Reply, Result, VolumeInfo,
    };

    use super::*;
    use crate::tags::tag;

    /// A backend with room for this many ops; those with an even tag complete at once.
    struct Room(usize);

    impl Backend for Room {
        fn info(&self) -> &VolumeInfo {
            unreachable!("not asked")
        }

        fn submit(&mut self, op: Op, tag: Tag, _: &mut dyn Io) -> Submitted {
            if self.0 == 0 {
                return Submitted::Full(op);
            }
            self.0 -= 1;
            match tag.0 % 2 {
                0 => Submitted::Done(Ok(Reply::Done)),
                _ => Submitted::Queued,
            }
        }

        fn io_done(&mut self, _: IoDone, _: &mut dyn Io) {}

        fn reap(&mut self, _: &mut dyn Io) -> Option<Completion> {
            None
        }
    }

    struct NoIo;

    impl Io for NoIo {
        fn now(&self) -> Nanos {
            1
        }

        fn buffer(&mut self, len: usize) -> Result<Buf> {
            Buf::try_zeroed(len)
        }

        fn waker(&self) -> std::task::Waker {
            std::task::Waker::noop().clone()
        }

        fn start(
            &mut self,
            request: IoRequest,
            _: IoToken,
            _: Destination,
        ) -> std::result::Result<(), IoRequest> {
            Err(request)
        }
    }

    #[test]
    fn ops_are_taken_in_the_order_in_which_they_came() {
        let (mut waiting, mut room) = (Waiting::default(), Room(1));
        let submit = |waiting: &mut Waiting, room: &mut Room, request| {
            waiting.submit(Op::Flush, tag(3, request), room, &mut NoIo).is_some()
        };
        assert!(submit(&mut waiting, &mut room, 0), "ended at once");
        assert!(!submit(&mut waiting, &mut room, 1) && !submit(&mut waiting, &mut room, 2));
        room.0 = 1;
        assert!(
            !submit(&mut waiting, &mut room, 4),
            "behind those that wait, though there is room"
        );
        assert_eq!((room.0, waiting.len()), (1, 3));
        room.0 = 3;
        let mut next =
            || waiting.offer(&mut room, &mut NoIo).map(|(tag, end)| (tag, end.is_some()));
        let taken = [next(), next(), next(), next()];
        let want = [(tag(3, 1), false), (tag(3, 2), true), (tag(3, 4), true)];
        assert_eq!(taken[..3], want.map(Some));
        assert_eq!(taken[3], None);
    }

    #[test]
    fn an_op_that_finds_no_room_again_stays_the_first() {
        let (mut waiting, mut room) = (Waiting::default(), Room(0));
        for request in [1, 3] {
            assert!(waiting.submit(Op::Flush, tag(0, request), &mut room, &mut NoIo).is_none());
        }
        assert!(waiting.offer(&mut room, &mut NoIo).is_none());
        room.0 = 1;
        let (first, _) = waiting.offer(&mut room, &mut NoIo).expect("room");
        assert_eq!(first, tag(0, 1));
    }

    #[test]
    fn writes_that_wait_are_a_crowd_until_they_are_taken_or_withdrawn() {
        let (mut waiting, mut room) = (Waiting::default(), Room(0));
        let len = CROWD_BYTES as u64 / 2;
        let range = sheave_core::ByteRange::within(0, len, len).unwrap();
        let mut write = |waiting: &mut Waiting, owner| {
            let op = Op::Write { range, data: Buf::zeroed(len as usize).into(), fua: false };
            assert!(waiting.submit(op, tag(owner, 1), &mut room, &mut NoIo).is_none());
            waiting.is_crowd()
        };
        assert!(!write(&mut waiting, 1) && write(&mut waiting, 2));
        waiting.withdraw(1);
        assert!(!waiting.is_crowd());
        assert!(write(&mut waiting, 1));
        room.0 = 1;
        waiting.offer(&mut room, &mut NoIo).expect("room");
        assert!(!waiting.is_crowd());
        assert!(waiting.offer(&mut room, &mut NoIo).is_none() && waiting.bytes == len as usize);
    }

    #[test]
    fn only_the_ops_of_one_connection_are_withdrawn() {
        let (mut waiting, mut room) = (Waiting::default(), Room(0));
        for (owner, request) in [(1, 10), (2, 20), (1, 11)] {
            assert!(waiting.submit(Op::Flush, tag(owner, request), &mut room, &mut NoIo).is_none());
        }
        let requests: Vec<u32> = waiting.withdraw(1).iter().map(|(request, _)| *request).collect();
        assert_eq!((requests, waiting.len()), (vec![10, 11], 1));
        assert!(waiting.withdraw(1).is_empty());
    }
}
