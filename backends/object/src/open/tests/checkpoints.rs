//! What an opening reads: the newest checkpoint and the objects behind it, and no more.

use super::*;
use crate::checkpoint::{Cadence, INTERVAL, tail_max};
use crate::format::{
    Directory, Entry, Form, FramePlace, FrameReader, Header, ObjectId, decode_directory,
};
use crate::ids::Place;
use crate::map::Found;
use crate::memory_store::Counts;

/// The most requests of an opening after a crash.
const REQUESTS_MAX: u64 = 33;

impl Bucket {
    /// Opens the volume, and counts the requests.
    fn open_counted(&self, journal: &FakeJournal) -> (Opened<FakeJournal>, Counts) {
        self.store.take_counts();
        let opened = self.open(journal.clone(), false).unwrap();
        (opened, self.store.take_counts())
    }

    fn newest(&self) -> Root {
        block_on(find(&self.requests)).unwrap()
    }

    /// The key of the checkpoint that the newest root names, and its place.
    fn checkpoint(&self) -> (String, FramePlace) {
        let place = self.newest().directory.expect("a checkpoint");
        let has_seq = |key: &String| {
            let body = self.store.object(key).unwrap();
            let is_it = keys::log_place(key).is_some_and(|(_, seq)| seq == place.seq);
            is_it && !is_fence(&body)
        };
        (self.store.keys().into_iter().find(has_seq).unwrap(), place)
    }

    /// A checkpoint's content.
    fn directory(&self) -> Directory {
        let (key, place) = self.checkpoint();
        let (epoch, seq) = keys::log_place(&key).unwrap();
        let body = self.store.object(&key).unwrap();
        let frame = &body[place.at as usize..(place.at + place.bytes) as usize];
        let reader = FrameReader::new(new_volume().volume, ObjectId { epoch, seq }, None);
        decode_directory(reader, place.at, frame).unwrap().0
    }
}

fn is_fence(body: &Bytes) -> bool {
    let header = Header::decode(body).unwrap();
    let index = &body[crate::format::HEADER_BYTES..header.index_end()];
    header.decode_index(index).unwrap() == [Entry::Fence]
}

/// One block in each batch; the address and the byte of each.
fn batches(from: u64, count: u64) -> Vec<[(u64, u64, u8); 1]> {
    (from..from + count).map(|at| [(at % 200, 1, at as u8 | 1)]).collect()
}

impl Bucket {
    fn write_many(&self, journal: &FakeJournal, from: u64, count: u64, closes: bool) {
        let batches = batches(from, count);
        let batches: Vec<&[_]> = batches.iter().map(|batch| &batch[..]).collect();
        self.write(journal, &batches, closes);
    }

    /// Checks that the volume has the first so many batches.
    fn check(&self, opened: &Opened<FakeJournal>, count: u64) {
        let mut want = vec![0; 200];
        for batch in batches(0, count) {
            let [(lba, _, fill)] = batch;
            want[lba as usize] = fill;
        }
        let want: Vec<_> = want.into_iter().map(|fill| (1, fill)).collect();
        assert!(self.read(opened, 0, 200).unwrap() == filled(&want), "{count} batches");
    }
}

#[test]
fn after_a_clean_close_an_opening_needs_six_requests() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write_many(&journal, 0, 100, true);
    for _ in 0..3 {
        let (opened, counts) = bucket.open_counted(&journal);
        assert_eq!(counts, Counts { lists: 2, gets: 2, creates: 2, deletes: 0 });
        bucket.check(&opened, 100);
        // Nothing is written, so the checkpoint stays.
        let checkpoint = bucket.checkpoint();
        commit(opened, &[], true).unwrap();
        assert_eq!(bucket.checkpoint(), checkpoint);
    }
}

#[test]
fn after_a_crash_an_opening_needs_few_requests_whatever_was_written() {
    let mut most = 0;
    for count in (1..70).chain([300, 301]) {
        let bucket = Bucket::new();
        let journal = FakeJournal::default();
        bucket.write_many(&journal, 0, count, false);
        let (opened, counts) = bucket.open_counted(&journal);
        let all = counts.lists + counts.gets + counts.creates;
        assert!(counts.lists == 2 && all <= REQUESTS_MAX, "{count} objects: {counts:?}");
        most = most.max(all);
        bucket.check(&opened, count);
    }
    assert!(most > 20, "some had long tails");
}

/// A checkpoint has the heads of what is under way. If it had only what is committed, the next one
/// would have to come sooner, at 18 requests for each hundred objects.
#[test]
fn checkpoints_cost_few_requests_while_many_objects_are_under_way() {
    let bucket = Bucket::new();
    let opened = bucket.open(FakeJournal::default(), false).unwrap();
    bucket.store.take_counts();
    let batches = batches(0, 280);
    let batches: Vec<&[_]> = batches.iter().map(|batch| &batch[..]).collect();
    commit(opened, &batches, false).unwrap();
    let creates = bucket.store.take_counts().creates;
    assert!(creates > 280 && creates <= 280 * 7 / 6, "{creates} requests");
}

/// Crashes in a row, each behind one object, so that the tail has many epochs.
#[test]
fn crashes_in_a_row_do_not_lengthen_the_tail() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    for round in 0..100 {
        let (opened, counts) = bucket.open_counted(&journal);
        bucket.check(&opened, round);
        let all = counts.lists + counts.gets + counts.creates;
        assert!(counts.lists == 2 && all <= REQUESTS_MAX, "{round}: {counts:?}");
        let batches = batches(round, 1);
        commit(opened, &[&batches[0]], false).unwrap();
        let newest = bucket.newest();
        let checkpoint = newest.directory.map_or(0, |directory| directory.seq.0);
        let tail = newest.committed.seq.0.saturating_sub(checkpoint);
        assert!(tail <= tail_max(INTERVAL), "round {round}: a tail of {tail}");
    }
    // The chain is in the checkpoint.
    assert!(bucket.directory().epochs.len() > 70);
}

impl Bucket {
    fn covered(&self) -> u64 {
        self.newest().directory.map_or(0, |_| self.directory().covered.seq.0)
    }
}

#[test]
fn a_checkpoint_that_no_root_names_is_found_in_the_tail() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write_many(&journal, 0, 18, false);
    let (_, place) = bucket.checkpoint();
    // Its root has never come to be.
    let newest = bucket.newest();
    assert_eq!((newest.number, newest.committed.seq), (3, place.seq));
    bucket.store.put(&keys::root(newest.number), None);
    assert_eq!(bucket.newest().directory, None);
    let (opened, _) = bucket.open_counted(&journal);
    bucket.check(&opened, 18);
    assert_eq!(bucket.newest().directory, Some(place), "the open root names it");
    commit(opened, &[], false).unwrap();
    let (opened, counts) = bucket.open_counted(&journal);
    assert!(counts.gets < 16, "{counts:?}");
    bucket.check(&opened, 18);
}

#[test]
fn a_checkpoint_that_is_missing_damaged_or_another_one_is_refused() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write_many(&journal, 0, 40, true);
    let (key, place) = bucket.checkpoint();
    let body = bucket.store.object(&key).unwrap();
    let (_, at) = bucket.store.keys().iter().find_map(|key| keys::log_place(key)).unwrap();
    let other = keys::log(Epoch(1), at);
    let mut changed: Vec<Option<Bytes>> = vec![
        None,
        Some(bucket.store.object(&other).unwrap()),
        Some(body.slice(..place.at as usize + 8)),
        Some(body.slice(..body.len() - 1)),
    ];
    for at in (place.at as usize..body.len()).step_by(7) {
        let mut bytes = body.to_vec();
        bytes[at] ^= 4;
        changed.push(Some(bytes.into()));
    }
    for (index, body) in changed.into_iter().enumerate() {
        bucket.store.put(&key, body);
        let error = bucket.open(journal.clone(), false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{index}: {error}");
        assert!(error.to_string().contains(&key), "{index}: {error}");
    }
    bucket.store.put(&key, Some(body));
    let opened = bucket.open(journal, false).unwrap();
    bucket.check(&opened, 40);
}

/// What is in no object that is read at an opening is not believed to be there: objects behind the
/// checkpoint are needed, those before it are needed only for their blocks. It has the heads of
/// those that were under way when it was begun.
#[test]
fn objects_behind_the_checkpoint_must_be_there() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    bucket.write_many(&journal, 0, 30, false);
    bucket.write(&journal, &[], false);
    let committed = bucket.newest().committed.seq;
    let (checkpoint, place) = bucket.checkpoint();
    assert!(bucket.covered() > 1 && bucket.covered() + 1 < place.seq.0 && place.seq < committed);
    let is_needed = |key: &str| keys::log_place(key).is_some_and(|(_, seq)| seq > place.seq);
    for key in bucket.store.keys() {
        let Some((epoch, seq)) = keys::log_place(&key) else { continue };
        if epoch != Epoch(1) || seq > committed || key == checkpoint {
            continue;
        }
        let body = bucket.store.object(&key);
        bucket.store.put(&key, None);
        let outcome = bucket.open(journal.clone(), false);
        assert_eq!(outcome.is_err(), is_needed(&key), "{key}");
        if let Err(error) = outcome {
            assert!(error.to_string().contains("the object is missing"), "{error}");
        }
        bucket.store.put(&key, body);
    }
}

/// A map of a million runs, as small writes all over 1 TiB leave it: an opening reads the
/// directory, and a reading one leaf more.
#[test]
fn a_map_of_a_million_runs_is_one_request() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    let opened = bucket.open(journal.clone(), false).unwrap();
    let mut map = Map::default();
    let runs = 1_000_000_u64;
    let place_of = |at: u64| Place::Object {
        seq: Seq(1),
        frame: (152 + at % 8000 * 4112) as u32,
        form: Form::Plain,
        skip: 0,
        run: 1,
    };
    for at in 0..runs {
        let place = place_of(at);
        map.fold(&Placed { lba: Lba(at * 268), blocks: 1, place, from: None });
    }
    commit(Opened { map, ..opened }, &[&[(1, 1, 1)]], true).unwrap();
    let (key, place) = bucket.checkpoint();
    assert!(place.bytes < 16 << 20, "{key} has a directory of {} bytes", place.bytes);
    for is_crash in [false, true] {
        let (opened, counts) = bucket.open_counted(&journal);
        let gets = if is_crash { counts.gets } else { 2 };
        assert_eq!(counts, Counts { lists: 2, gets, creates: 2 + u64::from(is_crash), deletes: 0 });
        assert!(counts.lists + gets + counts.creates <= REQUESTS_MAX);
        let (mut loads, mut in_memory) = (0, 0);
        for at in (0..runs).step_by(997) {
            let span = Span { start: at * 268, blocks: 1 };
            let found = match opened.map.cover(span)[0].1 {
                Found::In(leaf) => {
                    bucket.store.take_counts();
                    let leaf = block_on(opened.fetcher.load(leaf)).unwrap();
                    assert_eq!(bucket.store.take_counts().gets, 1);
                    loads += 1;
                    leaf.within(span).next().map(|run| Found::At(run.place))
                }
                found => {
                    in_memory += 1;
                    Some(found)
                }
            };
            assert_eq!(found, Some(Found::At(place_of(at))), "run {at}");
        }
        assert!(loads > 200 && in_memory > 200, "{loads} in leaves, {in_memory} in the directory");
    }
}

#[test]
fn a_leaf_that_is_missing_or_damaged_is_refused_by_name() {
    let bucket = Bucket::new();
    let journal = FakeJournal::default();
    let opened = bucket.open(journal.clone(), false).unwrap();
    let upload = opened.upload.with_cadence(Cadence::of_bytes(0));
    commit(Opened { upload, ..opened }, &[&[(0, 9, 1), (10, 9, 2)]], true).unwrap();
    let (key, _) = bucket.checkpoint();
    let leaf = bucket.directory().leaves[0];
    let opened = bucket.open(journal, false).unwrap();
    assert!(bucket.read(&opened, 0, 20).unwrap() == filled(&[(9, 1), (1, 0), (9, 2), (1, 0)]));
    let body = bucket.store.object(&key).unwrap();
    let mut changed = body.to_vec();
    changed[leaf.place.at as usize + 20] ^= 1;
    for body in [None, Some(changed.into()), Some(body.slice(..leaf.place.at as usize))] {
        bucket.store.put(&key, body);
        let error = bucket.read(&opened, 0, 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(&key), "{error}");
    }
}
