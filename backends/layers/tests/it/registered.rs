//! Registered memory passes the layers that do not access data.

use std::path::Path;
use std::task::Waker;

use sheave_conformance::ops::{disk_dir, image, range};
use sheave_core::{
    Buf, Destination, Io, IoDone, IoRequest, IoToken, Nanos, Op, OpKind, Reply, Result, Submitted,
    Tag,
};
use sheave_volumes::{OpenOptions, open};

const SIZE: u64 = 1 << 20;
/// Longer than writes that are faster through this process's memory.
const LEN: u64 = 64 << 10;
const INDEX: u16 = 7;

/// An engine that keeps the one request that it was given.
#[derive(Default)]
struct Keeping(Option<(IoToken, IoRequest)>);

impl Io for Keeping {
    fn now(&self) -> Nanos {
        1
    }

    fn buffer(&mut self, _: usize) -> Result<Buf> {
        panic!("data in registered memory is copied")
    }

    fn waker(&self) -> Waker {
        Waker::noop().clone()
    }

    fn start(
        &mut self,
        request: IoRequest,
        token: IoToken,
        _: Destination,
    ) -> std::result::Result<(), IoRequest> {
        assert!(self.0.replace((token, request)).is_none(), "one request");
        Ok(())
    }
}

/// The request that an op on the image with these options starts, and the op's outcome.
fn run(path: &Path, parameters: &str, read_only: bool, op: Op) -> (IoRequest, Result<Reply>) {
    let text = format!("{}{parameters}", path.display());
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    let volume = open(&text, &options).unwrap();
    assert!(volume.takes_registered(op.kind(), op.range().unwrap()), "{text}");
    let (mut backend, mut io) = (volume.backend().unwrap(), Keeping::default());
    assert!(matches!(backend.submit(op, Tag(1), &mut io), Submitted::Queued));
    let (token, request) = io.0.take().expect("a request");
    let done = IoDone { token, request: request.clone(), result: Ok(LEN as usize) };
    backend.io_done(done, &mut io);
    let completion = backend.reap(&mut io).expect("a completion");
    assert_eq!(completion.tag, Tag(1));
    (request, completion.outcome)
}

#[test]
fn reads_of_a_read_only_or_limited_file_stay_in_place() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    for (parameters, read_only) in
        [("", true), ("?read-only=true", false), ("?limit-bps=1G", false), ("?limit-iops=9", true)]
    {
        let into = Some(Buf::registered(INDEX, LEN as usize));
        let op = Op::Read { range: range(4096, LEN), into };
        let (request, outcome) = run(&path, parameters, read_only, op);
        let IoRequest::Read { into, at: 4096, .. } = request else { panic!("{request:?}") };
        assert_eq!(into.registered_index(), Some(INDEX), "{parameters}");
        assert!(matches!(outcome, Ok(Reply::Done)), "{parameters}: {outcome:?}");
    }
}

#[test]
fn writes_to_a_limited_file_stay_in_place() {
    let dir = disk_dir();
    let path = image(&dir, SIZE);
    let data = Buf::registered(INDEX, LEN as usize).into();
    let op = Op::Write { range: range(4096, LEN), data, fua: false };
    let (request, outcome) = run(&path, "?limit-bps=1G&limit-iops=100", false, op);
    let IoRequest::Write { from, at: 4096, .. } = request else { panic!("{request:?}") };
    assert_eq!(from.registered().and_then(Buf::registered_index), Some(INDEX));
    assert!(matches!(outcome, Ok(Reply::Done)), "{outcome:?}");
}

#[test]
fn a_read_only_volume_takes_no_writes_in_place() {
    let dir = disk_dir();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let volume = open(&image(&dir, SIZE).display().to_string(), &options).unwrap();
    assert!(!volume.takes_registered(OpKind::Write, range(0, LEN)));
    assert!(volume.takes_registered(OpKind::Read, range(0, LEN)));
}
