//! Volumes whose work is done by another thread, and volumes that have nothing to do.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use sheave_core::{
    Backend, ByteRange, Completion, Io, IoDone, Nanos, Op, Payload, Reply, Result, Submitted, Tag,
    Volume, VolumeInfo,
};
use sheave_proto::ClientConfig;
use sheave_proto::wire::command;
use sheave_shard::Blocking;
use sheave_volumes::OpenOptions;

use crate::support::{Client, Link, Running, Setup, both_engines, wait_until};

const ELSEWHERE: Duration = Duration::from_millis(20);
/// Connections that have been idle for this long have begun.
const SETTLED: Duration = Duration::from_millis(100);
/// Far more than any answer here takes.
const LONG: Duration = Duration::from_secs(60);

fn memory() -> Arc<dyn Volume> {
    sheave_volumes::open("memory:?size=1M", &OpenOptions::default()).unwrap()
}

fn to_export(server: &Running, export: &str) -> Client {
    let config = ClientConfig { export: export.to_owned(), ..ClientConfig::default() };
    Client::negotiate(Link::unix(&server.socket), config, None).unwrap()
}

/// A volume whose flushes take 20 ms in a thread of their own.
struct Remote(Arc<dyn Volume>);

struct RemoteBackend {
    inner: Box<dyn Backend>,
    /// Left by the other threads.
    ended: Arc<Mutex<VecDeque<Tag>>>,
}

impl Volume for Remote {
    fn info(&self) -> &VolumeInfo {
        self.0.info()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn grow(&self) -> Result<u64> {
        self.0.grow()
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        std::slice::from_ref(&self.0)
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(RemoteBackend { inner: self.0.backend()?, ended: Arc::default() }))
    }
}

impl Backend for RemoteBackend {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        if !matches!(op, Op::Flush) {
            return self.inner.submit(op, tag, io);
        }
        let (waker, ended) = (io.waker(), Arc::clone(&self.ended));
        std::thread::spawn(move || {
            std::thread::sleep(ELSEWHERE);
            ended.lock().unwrap().push_back(tag);
            Waker::wake(waker);
        });
        Submitted::Queued
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        let ended = self.ended.lock().unwrap().pop_front();
        ended
            .map(|tag| Completion { tag, outcome: Ok(Reply::Done) })
            .or_else(|| self.inner.reap(io))
    }
}

both_engines! {
    fn what_ends_in_another_thread_is_answered_at_once(engine) {
        let server = Setup::of(engine, Arc::new(Remote(memory()))).start();
        let mut client = Client::new(&server);
        let begun = Instant::now();
        for _ in 0..20 {
            client.flush();
            assert!(client.answer().unwrap().expect("a reply").error.is_none());
        }
        assert!(begun.elapsed() >= 20 * ELSEWHERE && begun.elapsed() < LONG);
        // Many at once, whose completions race.
        let mut cookies: Vec<_> = (0..100).map(|_| client.flush()).collect();
        while !cookies.is_empty() {
            let answer = client.answer().unwrap().expect("a reply");
            cookies.retain(|cookie| *cookie != answer.request.cookie);
        }
    }

    fn volumes_that_have_nothing_to_do_cost_nothing(engine) {
        let visits = Arc::<AtomicUsize>::default();
        let mut setup = Setup::new(engine, "memory:?size=1M");
        setup.shards = 1;
        for number in 0..50 {
            let idle = Counted { inner: memory(), visits: Arc::clone(&visits) };
            setup = setup.and(&format!("idle-{number}"), Arc::new(idle));
        }
        let server = setup.start();
        let idle: Vec<_> = (0..50)
            .map(|number| to_export(&server, &format!("idle-{number}")))
            .collect();
        let mut client = to_export(&server, "disk");
        client.ask(command::READ, 0, 0, 4096);
        client.answer().unwrap().expect("a reply");
        let mut before = visits.load(Relaxed);
        wait_until("the idle ones have begun", || {
            std::thread::sleep(SETTLED);
            before == std::mem::replace(&mut before, visits.load(Relaxed))
        });
        for _ in 0..100 {
            client.ask(command::READ, 0, 0, 4096);
            client.answer().unwrap().expect("a reply");
        }
        assert_eq!(visits.load(Relaxed), before, "an idle volume was visited");
        drop(idle);
    }
}

/// Counts the calls to its backends.
struct Counted {
    inner: Arc<dyn Volume>,
    visits: Arc<AtomicUsize>,
}

struct CountedBackend {
    inner: Box<dyn Backend>,
    visits: Arc<AtomicUsize>,
}

impl Volume for Counted {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn grow(&self) -> Result<u64> {
        self.inner.grow()
    }

    fn below(&self) -> &[Arc<dyn Volume>] {
        std::slice::from_ref(&self.inner)
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        let (inner, visits) = (self.inner.backend()?, Arc::clone(&self.visits));
        Ok(Box::new(CountedBackend { inner, visits }))
    }
}

impl Backend for CountedBackend {
    fn info(&self) -> &VolumeInfo {
        self.inner.info()
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        self.inner.write_buffer(range, io)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        self.inner.submit(op, tag, io)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.inner.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.visits.fetch_add(1, Relaxed);
        self.inner.reap(io)
    }

    fn deadline(&self) -> Option<Nanos> {
        self.visits.fetch_add(1, Relaxed);
        self.inner.deadline()
    }
}

#[test]
fn one_who_waits_for_another_thread_uses_no_processor() {
    let mut blocking = Blocking::open(&Remote(memory())).unwrap();
    let used = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let (begun, before) = (Instant::now(), used());
    for _ in 0..25 {
        blocking.run(Op::Flush).unwrap();
    }
    let (waited, used) = (begun.elapsed(), used() - before);
    assert!(waited >= 25 * ELSEWHERE);
    assert!(used < waited / 10, "{used:?} of {waited:?}");
}
