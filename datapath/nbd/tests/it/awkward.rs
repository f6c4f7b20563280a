//! Volumes that fulfil the contract in unusual ways.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use sheave_core::{
    Backend, BlockSizes, Capabilities, Completion, Error, ErrorKind, Io, IoDone, Nanos, Op,
    Payload, Reply, Result, Segment, Submitted, Tag, Volume, VolumeInfo,
};

use sheave_proto::ReplyStyle;

use crate::support::{Client, Link, Setup, both_engines, wait_until};

/// A volume with room for this many ops. The first op takes 100 ms; all others complete when they
/// are reaped. Every third backend cannot be made.
struct Awkward {
    info: VolumeInfo,
    room: usize,
    backends: AtomicUsize,
}

impl Awkward {
    fn new(room: usize) -> Self {
        let can = Capabilities { flush: true, ..Capabilities::default() };
        let (block, read_only) = (BlockSizes::default(), false);
        let info = VolumeInfo {
            block,
            read_only,
            rotational: false,
            volatile: false,
            identity: None,
            can,
        };
        Self { info, room, backends: AtomicUsize::new(1) }
    }
}

impl Volume for Awkward {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn size(&self) -> u64 {
        1 << 20
    }

    fn grow(&self) -> Result<u64> {
        Ok(self.size())
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        if self.backends.fetch_add(1, Relaxed).is_multiple_of(3) {
            return Err(Error::new(ErrorKind::Io, "open", "no more of these"));
        }
        let (info, room) = (self.info.clone(), self.room);
        Ok(Box::new(AwkwardBackend { info, room, work: VecDeque::new(), due: None, any: false }))
    }
}

struct AwkwardBackend {
    info: VolumeInfo,
    room: usize,
    work: VecDeque<(Tag, Op)>,
    /// When the first op completes.
    due: Option<Nanos>,
    any: bool,
}

impl Backend for AwkwardBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if self.work.len() >= self.room {
            return Submitted::Full(op);
        }
        if !self.any {
            self.any = true;
            self.due = Some(io.now() + 100_000_000);
        }
        self.work.push_back((tag, op));
        Submitted::Queued
    }

    fn io_done(&mut self, _: IoDone, _: &mut dyn Io) {
        unreachable!("it starts no file I/O")
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        if self.due.is_some_and(|due| due > io.now()) {
            return None;
        }
        self.due = None;
        let (tag, op) = self.work.pop_front()?;
        let outcome = Ok(match op {
            Op::Read { range, .. } => {
                let mut zeroes = Payload::new();
                zeroes.push(Segment::Zero(range.len() as usize));
                Reply::Data(zeroes)
            }
            _ => Reply::Done,
        });
        Some(Completion { tag, outcome })
    }

    fn deadline(&self) -> Option<Nanos> {
        self.due
    }
}

both_engines! {
    fn what_ends_as_it_is_tried_again_is_noticed(engine) {
        for room in [1, 2, 7, 2000] {
            let server = Setup::of(engine, Arc::new(Awkward::new(room))).start();
            let mut client = Client::new(&server);
            for number in 0..3000 {
                match number % 3 {
                    0 => client.read(number, 10),
                    1 => client.write(0, number, b"forgotten"),
                    _ => client.flush(),
                };
            }
            while client.in_flight() > 0 {
                let answer = client.answer().unwrap().expect("a reply");
                assert_eq!(answer.error, None);
            }
        }
    }

    /// The op that makes room belongs to a client that is gone, so no reply is sent.
    fn what_ends_as_it_is_tried_again_is_noticed_without_a_reply(engine) {
        let volume = Arc::new(Awkward::new(1));
        let server = Setup { shards: 1, ..Setup::of(engine, volume) }.start();
        let mut gone = Client::with(Link::tcp(server.address), ReplyStyle::Extended);
        let mut client = Client::new(&server);
        gone.read(0, 10);
        gone.link.flush().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        client.read(0, 10);
        client.link.flush().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        gone.link.reset();
        assert_eq!(client.only_answer().error, None);
    }

    fn who_cannot_be_served_is_sent_away(engine) {
        let volume = Arc::new(Awkward::new(5));
        let mut server = Setup { shards: 1, ..Setup::of(engine, volume) }.start();
        for round in 1..10 {
            let mut client = Client::new(&server);
            if round % 3 == 0 {
                assert!(client.answer().unwrap_or(None).is_none());
            } else {
                assert_eq!(client.bytes(0, 3), [0; 3]);
            }
            drop(client);
            wait_until("it is gone", || server.connections() == 0);
        }
        server.stop();
    }
}
