//! Requests that get no memory.

use std::sync::Arc;

use sheave_core::{
    Backend, ByteRange, Completion, Error, ErrorKind, Io, IoDone, NbdErrno, Op, OpKind, Payload,
    Result, Submitted, Tag, Volume, VolumeInfo,
};
use sheave_local::Memory;
use sheave_proto::ReplyStyle;

use crate::support::{Client, Link, Setup, both_engines, pattern};

/// A volume without memory for anything longer than this many bytes.
struct Starved(Memory);

const LEN_MAX: u64 = 4096;

struct StarvedBackend(Box<dyn Backend>);

impl Volume for Starved {
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
        &[]
    }

    fn backend(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(StarvedBackend(self.0.backend()?)))
    }
}

impl Backend for StarvedBackend {
    fn info(&self) -> &VolumeInfo {
        self.0.info()
    }

    fn write_buffer(&mut self, range: ByteRange, io: &mut dyn Io) -> Result<Payload> {
        if range.len() > LEN_MAX {
            return Err(Error::new(ErrorKind::NoMemory, "write", "no memory, on purpose"));
        }
        self.0.write_buffer(range, io)
    }

    fn submit(&mut self, op: Op, tag: Tag, io: &mut dyn Io) -> Submitted {
        self.0.submit(op, tag, io)
    }

    fn io_done(&mut self, done: IoDone, io: &mut dyn Io) {
        self.0.io_done(done, io);
    }

    fn reap(&mut self, io: &mut dyn Io) -> Option<Completion> {
        self.0.reap(io)
    }
}

both_engines! {
    fn a_write_without_memory_fails_alone(engine) {
        let volume = Arc::new(Starved(Memory::new(64 << 20).unwrap()));
        let server = Setup::of(engine, volume).start();
        for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
            let mut client = Client::with(Link::unix(&server.socket), style);
            for len in [LEN_MAX as usize + 1, 70_000, 300_000, 32 << 20] {
                let small = pattern(len as u64, 4000);
                let before = client.write(0, 0, &small);
                let starved = client.write(0, 8192, &vec![0xff; len]);
                let after = client.write(0, 4096, &small);
                let reads = [0, 4096, 8192].map(|at| (client.read(at, 4000), at));
                for _ in 0..6 {
                    let answer = client.answer().unwrap().expect("the connection goes on");
                    let cookie = answer.request.cookie;
                    let errno = answer.error.map(|(errno, _)| errno);
                    assert_eq!(errno, (cookie == starved).then_some(NbdErrno::NoMem), "{len}");
                    assert!(cookie >= before && (cookie <= after || errno.is_none()));
                    if let Some((_, at)) = reads.iter().find(|(read, _)| *read == cookie) {
                        let want = if *at == 8192 { vec![0; 4000] } else { small.clone() };
                        assert_eq!(answer.data, want, "at {at}");
                    }
                }
            }
        }
        let writes = server.counted("disk");
        assert_eq!(writes.op(OpKind::Write).map(|op| op.errors), Some(12));
    }
}
