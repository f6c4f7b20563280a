//! Ops that wait for room in a volume.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use sheave_core::{
    Backend, BlockSizes, Capabilities, Completion, Io, IoDone, Nanos, Op, Reply, Result, Submitted,
    Tag, Volume, VolumeInfo,
};
use sheave_proto::ReplyStyle;

use crate::support::{Client, Link, Setup, both_engines, wait_until};

/// How often the backend is visited while it holds an op.
const VISIT_NS: Nanos = 1_000_000;
/// Many visits.
const SETTLED: Duration = Duration::from_millis(200);

/// The counters of a [`Narrow`] volume.
#[derive(Default)]
struct Seen {
    /// The op that it holds may complete.
    open: AtomicBool,
    taken: AtomicUsize,
    refused: AtomicUsize,
}

/// A volume with room for one op, which completes when the test permits it.
struct Narrow {
    info: VolumeInfo,
    seen: Arc<Seen>,
}

struct NarrowBackend {
    info: VolumeInfo,
    seen: Arc<Seen>,
    held: Option<Tag>,
    due: Nanos,
}

impl Volume for Narrow {
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
        let (info, seen) = (self.info.clone(), Arc::clone(&self.seen));
        Ok(Box::new(NarrowBackend { info, seen, held: None, due: 0 }))
    }
}

impl Backend for NarrowBackend {
    fn info(&self) -> &VolumeInfo {
        &self.info
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if self.held.is_some() {
            self.seen.refused.fetch_add(1, Relaxed);
            return Submitted::Full(op);
        }
        self.seen.taken.fetch_add(1, Relaxed);
        self.held = Some(tag);
        self.due = io.now() + VISIT_NS;
        Submitted::Queued
    }

    fn io_done(&mut self, _: IoDone, _: &mut dyn Io) {
        unreachable!("it starts no file I/O")
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.due = io.now() + VISIT_NS;
        let may_end = self.seen.open.load(Relaxed);
        let tag = self.held.take_if(|_| may_end)?;
        Some(Completion { tag, outcome: Ok(Reply::Done) })
    }

    fn deadline(&self) -> Option<Nanos> {
        self.held.map(|_| self.due)
    }
}

both_engines! {
    fn ops_of_a_client_that_is_gone_never_reach_the_volume(engine) {
        let seen = Arc::<Seen>::default();
        let info = VolumeInfo {
            block: BlockSizes::default(),
            read_only: false,
            rotational: false,
            volatile: false,
            identity: None,
            can: Capabilities::default(),
        };
        let volume = Arc::new(Narrow { info, seen: Arc::clone(&seen) });
        let server = Setup { shards: 1, ..Setup::of(engine, volume) }.start();
        let mut client = Client::with(Link::tcp(server.address), ReplyStyle::Extended);
        for at in 0..5 {
            client.write(0, at, b"x");
        }
        client.link.flush().unwrap();
        wait_until("an op waits", || seen.refused.load(Relaxed) > 0);
        client.link.reset();
        // A waiting op is submitted at each visit.
        wait_until("nothing waits any more", || {
            let before = seen.refused.load(Relaxed);
            std::thread::sleep(SETTLED);
            before == seen.refused.load(Relaxed)
        });
        seen.open.store(true, Relaxed);
        wait_until("the connection is closed", || server.connections() == 0);
        assert_eq!(seen.taken.load(Relaxed), 1, "the volume was given what was withdrawn");
    }
}
