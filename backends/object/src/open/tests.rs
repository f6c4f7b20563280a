//! Opening, committing and closing on a store without faults, and damaged stores.

mod batches;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::*;
use crate::extents::Span;
use crate::format::{Codec, Placed, keys};
use crate::ids::{BLOCK_BYTES, Epoch, Lba, Lsn, Seq};
use crate::life::{self, NewVolume};
use crate::map::read_committed;
use crate::memory_store::{Faults, MemoryStore, Random, TurnClock};
use crate::threads::block_on;
pub(crate) use batches::{commit, commit_asking};

pub(crate) const SIZE: Blocks = 1000;

pub(crate) struct Bucket {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) requests: Requests,
}

impl Bucket {
    pub(crate) fn new() -> Self {
        Self::with_seed(1)
    }

    fn with_seed(seed: u64) -> Self {
        let random = Arc::new(Random::new(seed));
        let store = Arc::new(MemoryStore::new(random, Faults::default()));
        let requests = Requests::new(store.clone(), Arc::new(TurnClock), "dir:///s/v");
        let bucket = Self { store, requests };
        block_on(life::create(&bucket.requests, &new_volume())).unwrap();
        bucket
    }

    pub(crate) fn open(
        &self,
        journal: FakeJournal,
        take_over: bool,
    ) -> Result<Opened<FakeJournal>> {
        let incarnation = Incarnation(self.store.random.bytes());
        let request = Request { node: "a".to_owned(), incarnation, take_over, key: None };
        block_on(open(&self.requests, &request, |_| Ok(journal.clone())))
    }

    /// Opens, writes batches and closes, or does not.
    pub(crate) fn write(&self, journal: &FakeJournal, batches: &[&[(u64, u64, u8)]], closes: bool) {
        let opened = self.open(journal.clone(), false).unwrap();
        commit(opened, batches, closes).unwrap();
    }

    pub(crate) fn read(
        &self,
        opened: &Opened<FakeJournal>,
        lba: u64,
        blocks: u64,
    ) -> Result<Vec<u8>> {
        let span = Span { start: lba, blocks };
        block_on(read_committed(&opened.map, &opened.fetcher, span))
    }
}

pub(crate) fn new_volume() -> NewVolume {
    NewVolume {
        volume: VolumeId([7; 16]),
        incarnation: Incarnation([8; 16]),
        node: "a".to_owned(),
        size: SIZE,
        durability: Durability::Local,
        codec: Codec::Plain,
        key: None,
    }
}

/// A journal's superblock; clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeJournal(Arc<Mutex<Fake>>);

#[derive(Debug, Default)]
struct Fake {
    superblock: Option<Superblock>,
    summary: Option<Summary>,
    set_aside: usize,
}

impl Journal for FakeJournal {
    fn prepare(&mut self, _: VolumeId) -> Result<()> {
        Ok(())
    }

    fn superblock(&self) -> Result<Option<Superblock>> {
        Ok(self.0.lock().unwrap().superblock)
    }

    fn summary(&self) -> Result<Option<Summary>> {
        Ok(self.0.lock().unwrap().summary)
    }

    fn set_aside(&mut self) -> Result<PathBuf> {
        self.0.lock().unwrap().set_aside += 1;
        Ok(PathBuf::from("x.orphan"))
    }

    fn adopt(
        &mut self,
        volume: VolumeId,
        current: Option<Opening>,
        opening: Opening,
    ) -> Result<Adopted> {
        let superblock = Superblock { volume, current, adopting: Some(opening) };
        self.0.lock().unwrap().superblock = Some(superblock);
        Ok(Adopted::without_journal(opening))
    }
}

fn filled(runs: &[(u64, u8)]) -> Vec<u8> {
    runs.iter().flat_map(|&(blocks, fill)| vec![fill; (blocks * BLOCK_BYTES) as usize]).collect()
}

#[test]
fn what_was_committed_is_found_by_the_next_opening() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write(&journal, &[&[(0, 20, 1), (100, 1, 2)], &[(5, 3, 3), (7, 2, 0)]], true);
    let opened = bucket.open(journal.clone(), false).unwrap();
    assert_eq!(opened.committed, Committed { seq: Seq(3), lsn: Lsn(4) });
    assert_eq!(opened.size, SIZE);
    assert_eq!(journal.0.lock().unwrap().superblock.unwrap().adopting, Some(opened.opening));
    let want = filled(&[(5, 1), (2, 3), (2, 0), (11, 1), (80, 0), (1, 2), (1, 0)]);
    assert!(bucket.read(&opened, 0, 102).unwrap() == want);
    assert!(bucket.read(&opened, 3, 3).unwrap() == filled(&[(2, 1), (1, 3)]), "in the middle");
    // The next epoch overwrites a part.
    commit(opened, &[&[(0, 1, 9)]], true).unwrap();
    let opened = bucket.open(journal, false).unwrap();
    assert_eq!(opened.committed, Committed { seq: Seq(5), lsn: Lsn(5) });
    assert!(bucket.read(&opened, 0, 2).unwrap() == filled(&[(1, 9), (1, 1)]));
}

#[test]
fn a_volume_commits_although_others_have_the_whole_budget() {
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _whole = block_on(crate::budget::take_whole_budget());
        let bucket = Bucket::new();
        let batches: [&[_]; 3] = [&[(0, 20, 1)], &[(5, 3, 3)], &[(9, 1, 4)]];
        bucket.write(&FakeJournal::default(), &batches, true);
        done.send(()).expect("the test waits");
    });
    is_done.recv_timeout(std::time::Duration::from_secs(60)).expect("it is committed");
}

#[test]
fn a_volume_lives_through_any_count_of_openings() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    // A root of 4 KiB has no room for a table of so many epochs.
    for round in 0..300_u64 {
        let closes = round % 3 != 0;
        bucket.write(&journal, &[&[(round % 200, 1, round as u8 | 1)]], closes);
    }
    let opened = bucket.open(journal, false).unwrap();
    assert_eq!(opened.committed, Committed { seq: Seq(500), lsn: Lsn(300) });
    for at in [0, 99, 100, 199] {
        let last = if at < 100 { at + 200 } else { at };
        assert!(bucket.read(&opened, at, 1).unwrap() == filled(&[(1, last as u8 | 1)]), "{at}");
    }
}

#[test]
fn a_closed_volume_needs_no_fence_and_an_open_one_gets_one() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write(&journal, &[&[(0, 1, 1)]], true);
    bucket.write(&journal, &[], true);
    let is_log = |key: &String| key.starts_with(keys::LOGS);
    assert_eq!(bucket.store.keys().into_iter().filter(is_log).count(), 2);
    // Not closed: the next opening makes fences, also in epochs without objects.
    bucket.write(&journal, &[], false);
    bucket.write(&journal, &[&[(0, 1, 2)]], false);
    bucket.write(&journal, &[&[(0, 1, 3)]], true);
    let logs: Vec<_> = bucket.store.keys().into_iter().filter(is_log).collect();
    let places: Vec<_> = logs.iter().filter_map(|key| keys::log_place(key)).collect();
    let numbers: Vec<_> = places.iter().map(|(epoch, seq)| (epoch.0, seq.0)).collect();
    assert_eq!(numbers, [(1, 1), (1, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5)]);
}

#[test]
fn a_volume_that_is_open_elsewhere_is_taken_over_on_demand_only() {
    let bucket = Bucket::new();
    let here = bucket.open(FakeJournal::default(), false).unwrap();
    let error = bucket.open(FakeJournal::default(), false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("open on node a (root 2)"), "{error}");
    let there = bucket.open(FakeJournal::default(), true).unwrap();
    let error = commit(here, &[&[(0, 1, 1)]], true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fenced);
    commit(there, &[&[(0, 1, 2)]], true).unwrap();
    let opened = bucket.open(FakeJournal::default(), false).unwrap();
    assert!(bucket.read(&opened, 0, 1).unwrap() == filled(&[(1, 2)]));
}

#[test]
fn an_opening_that_wrote_nothing_cannot_close_after_a_takeover() {
    let bucket = Bucket::new();
    let here = bucket.open(FakeJournal::default(), false).unwrap();
    let there = bucket.open(FakeJournal::default(), true).unwrap();
    assert_eq!(commit(here, &[], true).unwrap_err().kind(), ErrorKind::Fenced);
    commit(there, &[&[(0, 1, 2)]], true).unwrap();
}

/// Killed behind its open root, and the next opening before its own: the journal still names the
/// opening that its writes are of.
#[test]
fn a_node_recognises_its_volume_after_two_kills_in_a_row() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    let killed = bucket.open(journal.clone(), false).unwrap();
    let newest = block_on(find(&bucket.requests)).unwrap();
    assert_eq!(newest.author, killed.opening);
    let incarnation = Incarnation([5; 16]);
    let request = Request { node: "a".to_owned(), incarnation, take_over: false, key: None };
    let next = block_on(open_until_adopted(&bucket, &request, journal.clone()));
    assert_ne!(next, killed.opening);
    bucket.open(journal.clone(), false).unwrap();
    assert_eq!(journal.0.lock().unwrap().superblock.unwrap().current, Some(killed.opening));
}

/// An opening that dies before its open root.
async fn open_until_adopted(bucket: &Bucket, request: &Request, journal: FakeJournal) -> Opening {
    let adopting = || {
        let superblock = journal.0.lock().unwrap().superblock;
        superblock.and_then(|superblock| superblock.adopting)
    };
    let before = adopting();
    let mut opening = std::pin::pin!(open(&bucket.requests, request, |_| Ok(journal.clone())));
    std::future::poll_fn(|cx| match adopting() {
        now if now != before => Poll::Ready(now.expect("an opening")),
        _ => {
            assert!(opening.as_mut().poll(cx).is_pending(), "it adopts before it is open");
            Poll::Pending
        }
    })
    .await
}

#[test]
fn a_journal_is_kept_aside_when_the_volume_was_written_elsewhere() {
    let bucket = Bucket::new();
    let (here, there) = (FakeJournal::default(), FakeJournal::default());
    bucket.write(&here, &[&[(0, 1, 1)]], false);
    let opened = bucket.open(there.clone(), true).unwrap();
    commit(opened, &[&[(0, 1, 2)]], true).unwrap();
    {
        let Fake { superblock, summary, .. } = &mut *here.0.lock().unwrap();
        let superblock = superblock.as_mut().unwrap();
        superblock.current = superblock.adopting.take();
        *summary = Some(Summary { committed: Lsn(0), first: Lsn(1), last: Lsn(9) });
    }
    bucket.open(here.clone(), false).unwrap();
    let journal = here.0.lock().unwrap();
    assert_eq!((journal.superblock.unwrap().current, journal.set_aside), (None, 1));
}

#[test]
fn a_journal_that_is_newer_than_the_bucket_is_refused() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write(&journal, &[&[(0, 1, 1)]], true);
    let superblock = Superblock {
        volume: VolumeId([7; 16]),
        current: Some(Opening { epoch: Epoch(9), incarnation: Incarnation([1; 16]) }),
        adopting: None,
    };
    let before = bucket.store.keys();
    journal.0.lock().unwrap().superblock = Some(superblock);
    let error = bucket.open(journal, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert_eq!(bucket.store.keys(), before, "nothing was claimed");
}

#[test]
fn a_store_that_lost_or_mixed_up_objects_is_refused() {
    let journal = FakeJournal::default();
    let bucket = Bucket::new();
    // Without a checkpoint, all are read.
    bucket.write(&journal, &[&[(0, 1, 1)], &[(1, 1, 2)]], false);
    bucket.write(&journal, &[&[(2, 1, 3)]], false);
    bucket.write(&journal, &[], false);
    let has_blocks = |key: &String| bucket.store.object(key).unwrap().len() > 4096;
    let logs: Vec<_> = bucket.store.keys().into_iter().filter(has_blocks).collect();
    let objects: Vec<_> = logs.iter().map(|key| bucket.store.object(key).unwrap()).collect();
    let check = |index: usize, body: Option<Bytes>| {
        bucket.store.put(&logs[index], body);
        let error = bucket.open(journal.clone(), true).unwrap_err();
        bucket.store.put(&logs[index], Some(objects[index].clone()));
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(&logs[index]), "{error}");
    };
    for index in 0..3 {
        check(index, None);
        check(index, Some(objects[(index + 1) % 3].clone()));
        check(index, Some(objects[index].slice(..100)));
        let mut changed = objects[index].to_vec();
        changed[130] ^= 1;
        check(index, Some(changed.into()));
    }
    // Blocks are checked when they are read.
    let mut changed = objects[0].to_vec();
    changed[400] ^= 1;
    bucket.store.put(&logs[0], Some(changed.into()));
    let opened = bucket.open(journal, true).unwrap();
    let error = bucket.read(&opened, 0, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(&logs[0]), "{error}");
    assert!(bucket.read(&opened, 1, 1).is_ok());
    bucket.store.put(&logs[1], None);
    let error = bucket.read(&opened, 1, 1).unwrap_err();
    assert!(error.to_string().contains("the object is missing"), "{error}");
}

#[test]
fn a_deleted_volume_is_gone_and_can_be_made_again() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write(&journal, &[&[(0, 1, 1)]], true);
    let author = (Incarnation([3; 16]), "b");
    assert_eq!(block_on(life::info(&bucket.requests, None)).unwrap().objects, 2);
    let exists = block_on(life::create(&bucket.requests, &new_volume())).unwrap_err();
    assert_eq!(exists.kind(), ErrorKind::Exists);
    let open = bucket.open(journal, false).unwrap();
    let busy = block_on(life::delete(&bucket.requests, author, false)).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    block_on(life::delete(&bucket.requests, author, true)).unwrap();
    assert_eq!(bucket.store.keys(), [keys::root(6)], "the tombstone stays");
    assert_eq!(
        block_on(life::info(&bucket.requests, None)).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    // The old opening writes where nothing reads, and a second deletion takes that away.
    let _ = commit(open, &[&[(0, 1, 1)]], true);
    block_on(life::delete(&bucket.requests, author, false)).unwrap();
    assert_eq!(bucket.store.keys(), [keys::root(6)]);
    let volume = VolumeId([9; 16]);
    block_on(life::create(&bucket.requests, &NewVolume { volume, ..new_volume() })).unwrap();
    bucket.write(&FakeJournal::default(), &[&[(1, 1, 4)]], true);
    let opened = bucket.open(FakeJournal::default(), false).unwrap();
    assert!(bucket.read(&opened, 0, 2).unwrap() == filled(&[(1, 0), (1, 4)]));
    assert_eq!(opened.volume, volume);
}

#[test]
fn a_deletion_that_was_stopped_leaves_a_volume_made_since_alone() {
    // It is stopped behind its tombstone: before it knows that this is the newest root, or after.
    (0..8).for_each(stop_a_deletion);
}

fn stop_a_deletion(seed: u64) {
    let bucket = Bucket::with_seed(seed);
    bucket.write(&FakeJournal::default(), &[&[(0, 1, 1)], &[(1, 1, 1)]], true);
    let mut deletion =
        std::pin::pin!(life::delete(&bucket.requests, (Incarnation([3; 16]), "b"), false));
    let is_deleted = || {
        let newest = block_on(find_any(&bucket.requests)).unwrap().unwrap();
        newest.state == crate::format::State::Deleted
    };
    let mut cx = Context::from_waker(std::task::Waker::noop());
    while !is_deleted() {
        assert!(deletion.as_mut().poll(&mut cx).is_pending());
    }
    let volume = VolumeId([9; 16]);
    block_on(life::create(&bucket.requests, &NewVolume { volume, ..new_volume() })).unwrap();
    bucket.write(&FakeJournal::default(), &[&[(1, 1, 4)]], true);
    block_on(deletion).unwrap();
    let opened = bucket.open(FakeJournal::default(), false).unwrap();
    assert!(bucket.read(&opened, 0, 2).unwrap() == filled(&[(1, 0), (1, 4)]));
    let logs = bucket.store.keys().into_iter().filter(|key| key.starts_with(keys::LOGS));
    assert_eq!(logs.count(), 2, "those of the deleted volume are gone");
}

mod checkpoints;
mod sizes;
