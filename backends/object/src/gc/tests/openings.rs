//! What openings delete of a volume.

use crate::ask::{Ask, SnapshotAsk};
use crate::check::{Options, check};
use crate::checkpoint::Cadence;
use crate::extents::Span;
use crate::fetch::Fetcher;
use crate::format::{Root, Snapshot, State, keys};
use crate::gc::Cleaning;
use crate::ids::{BLOCK_BYTES, Lsn};
use crate::life;
use crate::map::{MergeLimits, read_committed};
use crate::open::rules::{self, Rules};
use crate::open::tests::{Bucket, FakeJournal, commit_asking};
use crate::open::{Fold, Opened, find};
use crate::sources::Sources;
use crate::threads::block_on;

/// Leaves take over all.
pub(super) const ALL_IN_LEAVES: MergeLimits =
    MergeLimits { runs_min: 0, ..MergeLimits::of_bytes(1 << 20) };
/// Nothing goes to leaves.
const NO_LEAVES: MergeLimits = MergeLimits::of_bytes(1 << 28);

fn with(opened: Opened<FakeJournal>, limits: MergeLimits) -> Opened<FakeJournal> {
    let cadence = Cadence { interval: 14, limits, roots_kept: 4, cleaning: Cleaning::DEFAULT };
    Opened { upload: opened.upload.with_cadence(cadence), ..opened }
}

impl Bucket {
    /// Opens, writes batches of a block each, goes on for a while, and ends without closing.
    fn write_with(&self, journal: &FakeJournal, blocks: &[(u64, u8)]) {
        let cadence = Cadence {
            interval: 3,
            limits: ALL_IN_LEAVES,
            roots_kept: 4,
            cleaning: Cleaning::DEFAULT,
        };
        let opened = self.open(journal.clone(), false).unwrap();
        let opened = Opened { upload: opened.upload.with_cadence(cadence), ..opened };
        self.commit(opened, blocks, Vec::new(), false);
    }

    fn commit(
        &self,
        opened: Opened<FakeJournal>,
        blocks: &[(u64, u8)],
        asks: Vec<Ask>,
        closes: bool,
    ) {
        let batches: Vec<_> = blocks.iter().map(|&(lba, fill)| [(lba, 1, fill)]).collect();
        let batches: Vec<&[_]> = batches.iter().map(|batch| &batch[..]).collect();
        commit_asking(opened, &batches, asks, (closes, 500)).unwrap();
    }

    /// Writes batches, and dies when it has made a checkpoint of all, before a root names it.
    fn write_unnamed(&self, journal: &FakeJournal, limits: MergeLimits, blocks: &[(u64, u8)]) {
        let opened = with(self.open(journal.clone(), false).unwrap(), limits);
        self.commit(opened, blocks, Vec::new(), true);
        let newest = block_on(find(&self.requests)).unwrap();
        assert_eq!(newest.state, State::Closed);
        self.store.put(&keys::root(newest.number), None);
        let before = block_on(find(&self.requests)).unwrap();
        assert!(before.directory != newest.directory);
    }

    fn objects(&self) -> Vec<u64> {
        let keys = self.store.keys();
        keys.iter().filter_map(|key| keys::log_place(key)).map(|(_, seq)| seq.0).collect()
    }

    /// Reads the first blocks of a snapshot.
    fn read_snapshot(&self, snapshot: &Snapshot) -> sheave_core::Result<Vec<u8>> {
        let root = block_on(find(&self.requests))?;
        let (map, lineage) = block_on(Fold::of_snapshot(&self.requests, &root, snapshot, None))?;
        let fetcher = Fetcher::of_command(&Sources::new(&self.requests, &root, None)?, lineage);
        block_on(read_committed(&map, &fetcher, Span { start: 0, blocks: 4 }))
    }

    fn expect_no_faults(&self) {
        let options = Options { reads_data: true, repairs: false, key: None, progress: &|_| {} };
        let report = block_on(check(&self.requests, &options)).unwrap();
        assert!(report.faults.is_empty(), "{:?}", report.faults);
    }
}

#[test]
fn what_is_overwritten_is_deleted_and_what_a_killed_opening_left_by_the_next_one() {
    let (bucket, journal) = (Bucket::new(), FakeJournal::default());
    for round in 1..40 {
        let blocks: Vec<_> = (0..4).map(|lba| (lba, round)).collect();
        bucket.write_with(&journal, &blocks);
    }
    // Fences stay, and so do the objects that no checkpoint of the last opening has yet.
    let opened = bucket.open(journal, false).unwrap();
    bucket.commit(opened, &[], Vec::new(), true);
    bucket.expect_no_faults();
    let (fences, objects) = (39, bucket.objects().len());
    assert!(objects - fences < 20, "{objects} objects");
    let info = block_on(life::info(&bucket.requests, None)).unwrap();
    let live_bytes = info.live_bytes.unwrap();
    assert!(live_bytes >= 4 * BLOCK_BYTES && live_bytes <= info.stored_bytes, "{info:?}");
}

#[test]
fn old_roots_go_and_claims_stay() {
    let (bucket, journal) = (Bucket::new(), FakeJournal::default());
    for round in 1..30_u8 {
        let blocks: Vec<_> = (0..12).map(|lba| (lba, round)).collect();
        bucket.write_with(&journal, &blocks);
    }
    let roots = bucket.store.keys().into_iter().filter(|key| key.starts_with(keys::ROOTS));
    let root = |key: String| Root::decode(&bucket.store.object(&key).unwrap()).unwrap();
    let roots: Vec<_> = roots.map(root).collect();
    let claims = roots.iter().filter(|root| root.state == State::Claimed).count();
    assert_eq!(claims, 29);
    assert!(roots.len() - claims < 16, "{} roots", roots.len());
    bucket.expect_no_faults();
}

/// An opening finds a checkpoint in the log that no root names, and names it. It was made by one
/// that had found another one: the two have moved different blocks to leaves, and the opening knows
/// only the first. A snapshot of it must be of a checkpoint by which the objects are counted.
fn snapshot_of_a_found_checkpoint() -> sheave_core::Result<Vec<u8>> {
    let (bucket, journal) = (Bucket::new(), FakeJournal::default());
    let made = std::sync::Arc::new(std::sync::Mutex::new(None));
    // The first checkpoint has a leaf, and is named.
    let opened = with(bucket.open(journal.clone(), false).unwrap(), ALL_IN_LEAVES);
    bucket.commit(opened, &[(0, 1), (1, 1), (2, 1)], Vec::new(), true);
    // The second one has that leaf anew. The third one goes on from the first one: it needs the
    // leaf of that. Neither is named.
    bucket.write_unnamed(&journal, ALL_IN_LEAVES, &[(3, 2), (1, 2), (1, 3)]);
    bucket.write_unnamed(&journal, NO_LEAVES, &[(2, 4), (2, 5), (2, 6)]);
    let opened = with(bucket.open(journal.clone(), false).unwrap(), ALL_IN_LEAVES);
    let done = {
        let made = made.clone();
        Box::new(move |outcome: sheave_core::Result<_>| *made.lock().unwrap() = outcome.ok())
    };
    let (name, lsn) = ("s".to_owned(), opened.committed.lsn);
    assert_eq!(lsn, Lsn(9));
    let ask = Ask::Snapshot(SnapshotAsk { name, lsn, at_ms: 0, done });
    let blocks: Vec<_> = (10..40).map(|fill| (fill % 4, fill as u8)).collect();
    bucket.commit(opened, &blocks, vec![ask], true);
    // Another opening deletes what that one has left.
    bucket.commit(bucket.open(journal, false)?, &[], Vec::new(), true);
    let snapshot = made.lock().unwrap().take().expect("it was made");
    bucket.read_snapshot(&snapshot)
}

#[test]
fn a_snapshot_of_a_checkpoint_that_was_found_in_the_log_keeps_what_it_needs() {
    let want: Vec<u8> =
        [1, 3, 6, 2].iter().flat_map(|fill| vec![*fill; BLOCK_BYTES as usize]).collect();
    assert!(snapshot_of_a_found_checkpoint().unwrap() == want);
    rules::set(Rules { counts_named: false, ..Rules::ALL });
    let outcome = snapshot_of_a_found_checkpoint();
    rules::set(Rules::ALL);
    assert!(outcome.unwrap_err().to_string().contains("missing"));
}
