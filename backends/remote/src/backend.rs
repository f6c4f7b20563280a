//! One thread's access.

use std::collections::VecDeque;
use std::sync::Arc;

use sheave_core::extents::{ExtentList, data, empty_range_outcome};
use sheave_core::{
    Backend, Completion, Destination, Error, ErrorKind, Io, IoDone, Nanos, Op, Outcome, Reply,
    Submitted, Tag, VolumeInfo,
};

use crate::state::Starts;
use crate::volume::Shared;

pub(crate) struct RemoteBackend {
    shared: Arc<Shared>,
    user: usize,
    ended: VecDeque<Completion>,
    due: Option<Nanos>,
}

impl RemoteBackend {
    pub(crate) fn new(shared: Arc<Shared>, user: usize) -> Self {
        Self { shared, user, ended: VecDeque::new(), due: None }
    }

    /// The outcome of an op that needs no server.
    fn inline(&self, op: &Op) -> Option<Outcome> {
        if let Some(outcome) = empty_range_outcome(op) {
            return Some(outcome);
        }
        let info = &self.shared.info;
        match op {
            Op::Write { .. } | Op::Trim { .. } | Op::WriteZeroes { .. } if info.read_only => {
                let why = format!("{}: is read-only", self.shared.options.name);
                Some(Err(Error::new(ErrorKind::Permission, op.kind().name(), why)))
            }
            Op::Read { range, .. } | Op::Write { range, .. }
                if range.len() > info.block.maximum_payload.into() =>
            {
                let why = format!("{} bytes are too many at once", range.len());
                Some(Err(Error::new(ErrorKind::TooLarge, op.kind().name(), why)))
            }
            Op::Flush if info.read_only || !info.can.flush => Some(Ok(Reply::Done)),
            Op::Cache { .. } if !info.can.cache => Some(Ok(Reply::Done)),
            // A hint.
            Op::Trim { .. } if !info.can.trim => Some(Ok(Reply::Done)),
            Op::BlockStatus { range, extents_max } if !info.can.block_status => {
                let mut list = ExtentList::new(*extents_max);
                list.push(data(range.len()));
                Some(list.into_reply())
            }
            Op::WriteZeroes { .. } if !info.can.write_zeroes => {
                let why = "the server has no zeroing";
                Some(Err(Error::new(ErrorKind::Unsupported, op.kind().name(), why)))
            }
            _ => None,
        }
    }

    /// Does what can be done now.
    fn attend(&mut self, io: &mut dyn Io) {
        let (user, mut starts) = (self.user, Starts::new());
        let ended = &mut self.ended;
        self.due = self.shared.with(|state| {
            state.attend(user, io, &mut starts, ended);
            state.due(user)
        });
        for (request, token) in starts {
            if let Err(request) = io.start(request, token, Destination::Unknown) {
                let now = io.now();
                self.due = self.shared.with(|state| {
                    state.not_started(user, (request, token), now);
                    state.due(user)
                });
            }
        }
    }
}

impl Backend for RemoteBackend {
    fn info(&self) -> &VolumeInfo {
        &self.shared.info
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if let Some(outcome) = self.inline(&op) {
            return Submitted::Done(outcome);
        }
        let (user, now) = (self.user, io.now());
        self.shared.with(|state| state.submit(user, op, tag, now))
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        let user = self.user;
        self.shared.with(|state| state.io_done(user, done, io));
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        if let Some(completion) = self.ended.pop_front() {
            return Some(completion);
        }
        self.attend(io);
        self.ended.pop_front()
    }

    fn deadline(&self) -> Option<Nanos> {
        self.due
    }
}

impl Drop for RemoteBackend {
    fn drop(&mut self) {
        let user = self.user;
        self.shared.with(|state| state.leave(user));
    }
}
