//! Short ways to write ops, and to read their answers.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use sheave_core::{Buf, ByteRange, IoRequest, Op, Outcome, Payload, Reply, Volume};
use tempfile::TempDir;

use crate::{Driver, Mishap, PlainEngine};

/// A driver on an engine without mishaps.
#[must_use]
pub fn driver(volume: &dyn Volume) -> Driver<PlainEngine> {
    Driver::new(volume.backend().expect("a backend"), PlainEngine::new(64))
}

/// An image of a given size without a hole, filled with 0x11.
pub fn image(dir: &TempDir, size: u64) -> PathBuf {
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0x11; size as usize]).expect("an image");
    path
}

/// On a disk, since /tmp may be a tmpfs, which has no direct I/O on some kernels.
#[must_use]
pub fn disk_dir() -> TempDir {
    TempDir::new_in("/var/tmp").expect("a directory")
}

/// The bytes from `start` on.
#[must_use]
pub fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::within(start, len, u64::MAX).expect("a range")
}

/// A write without FUA.
#[must_use]
pub fn write(start: u64, bytes: &[u8]) -> Op {
    let data = Payload::from(Buf::from_bytes(bytes));
    Op::Write { range: range(start, bytes.len() as u64), data, fua: false }
}

/// The same op with FUA, if its kind has that field.
#[must_use]
pub fn with_fua(op: Op) -> Op {
    match op {
        Op::Write { range, data, .. } => Op::Write { range, data, fua: true },
        Op::Trim { range, .. } => Op::Trim { range, fua: true },
        Op::WriteZeroes { range, no_hole, fast, .. } => {
            Op::WriteZeroes { range, fua: true, no_hole, fast }
        }
        op => op,
    }
}

/// A write of zeroes that may make a hole.
#[must_use]
pub fn zeroes(start: u64, len: u64) -> Op {
    Op::WriteZeroes { range: range(start, len), fua: false, no_hole: false, fast: false }
}

/// A trim without FUA.
#[must_use]
pub fn trim(start: u64, len: u64) -> Op {
    Op::Trim { range: range(start, len), fua: false }
}

/// A read.
#[must_use]
pub fn read(start: u64, len: u64) -> Op {
    Op::Read { range: range(start, len), into: None }
}

/// The bytes that a read returned.
#[must_use]
pub fn bytes(outcome: Outcome) -> Vec<u8> {
    match outcome {
        Ok(Reply::Data(data)) => data.to_vec(),
        other => panic!("not data: {other:?}"),
    }
}

/// Extents as (length, hole, zero).
#[must_use]
pub fn extents(outcome: Outcome) -> Vec<(u64, bool, bool)> {
    match outcome {
        Ok(Reply::Extents(extents)) => extents.iter().map(|e| (e.len, e.hole, e.zero)).collect(),
        other => panic!("not extents: {other:?}"),
    }
}

/// Engine requests in a short form, in the order in which they were carried out.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, request: &IoRequest) {
        let line = match request {
            IoRequest::Read { at, into, .. } => format!("read {at}+{}", into.len()),
            IoRequest::Write { at, from, dsync, .. } => {
                format!("write {at}+{}{}", from.len(), if *dsync { " dsync" } else { "" })
            }
            IoRequest::Sync { .. } => "sync".to_owned(),
            IoRequest::Allocate { mode, at, len, .. } => format!("{mode:?} {at}+{len}"),
            IoRequest::Recv { into, skip, .. } => format!("recv {}", into.len() - skip),
            IoRequest::Send { from, skip, .. } => format!("send {}", from.len() - skip),
        };
        self.0.lock().expect("the log").push(line);
    }

    /// Takes the lines so far.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("the log"))
    }

    /// A driver that logs, with mishaps by `mishap_of`.
    #[must_use]
    pub fn driver(
        &self,
        volume: &dyn Volume,
        mut mishap_of: impl FnMut(&IoRequest) -> Mishap + Send + 'static,
    ) -> Driver<PlainEngine> {
        let log = self.clone();
        let engine = PlainEngine::new(64).with_mishaps(move |request| {
            log.add(request);
            mishap_of(request)
        });
        Driver::new(volume.backend().expect("a backend"), engine)
    }
}
