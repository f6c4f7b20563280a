//! Objects that are cleaned until little enough is stored.

use super::openings::ALL_IN_LEAVES;
use crate::checkpoint::Cadence;
use crate::format::{Entry, HEADER_BYTES, Header, keys};
use crate::gc::Cleaning;
use crate::ids::BLOCK_BYTES;
use crate::life;
use crate::map::MergeLimits;
use crate::open::tests::{Bucket, FakeJournal, SIZE, commit_asking};
use crate::open::{Opened, find};
use crate::threads::block_on;

/// Turns that are enough for all cleaning.
const TURNS: usize = 20_000;

fn clean_opening(
    bucket: &Bucket,
    journal: &FakeJournal,
    limits: MergeLimits,
) -> Opened<FakeJournal> {
    let cleaning = Cleaning { space_percent: 133, move_bytes: 16 * BLOCK_BYTES };
    let cadence = Cadence { interval: 6, limits, roots_kept: 64, cleaning };
    let opened = bucket.open(journal.clone(), false).unwrap();
    Opened { upload: opened.upload.with_cadence(cadence), ..opened }
}

/// The bytes of data objects, and how many have moves.
fn stored(bucket: &Bucket) -> (u64, usize) {
    let (mut bytes, mut moves) = (0, 0);
    for key in bucket.store.keys().iter().filter(|key| key.starts_with(keys::LOGS)) {
        let body = bucket.store.object(key).unwrap();
        let header = Header::decode(&body).unwrap();
        let entries = header.decode_index(&body[HEADER_BYTES..header.index_end()]).unwrap();
        bytes += match entries[0] {
            Entry::Write { .. } | Entry::Move { .. } => u64::from(header.bytes),
            _ => 0,
        };
        moves += usize::from(matches!(entries[0], Entry::Move { .. }));
    }
    (bytes, moves)
}

/// Writes a volume, makes garbage of the given batches, and lets it rest.
fn bytes_after(garbage: &[&[(u64, u64, u8)]], limits: MergeLimits) -> (u64, usize) {
    let (bucket, journal) = (Bucket::new(), FakeJournal::default());
    let opened = clean_opening(&bucket, &journal, limits);
    let fill: Vec<_> = (0..20).map(|at| [(at * 40, 40, at as u8 + 1)]).collect();
    let mut want = vec![0_u8; SIZE as usize];
    let mut batches: Vec<&[_]> = fill.iter().map(|batch| &batch[..]).collect();
    batches.extend(garbage);
    for (lba, blocks, fill) in batches.iter().copied().flatten() {
        want[*lba as usize..(lba + blocks) as usize].fill(*fill);
    }
    commit_asking(opened, &batches, Vec::new(), (false, TURNS)).unwrap();
    let found = stored(&bucket);
    let options =
        crate::check::Options { reads_data: true, repairs: false, key: None, progress: &|_| {} };
    let report = block_on(crate::check::check(&bucket.requests, &options)).unwrap();
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    let opened = bucket.open(journal, false).unwrap();
    let data = bucket.read(&opened, 0, SIZE).unwrap();
    for (at, block) in data.chunks(BLOCK_BYTES as usize).enumerate() {
        assert!(block.iter().all(|byte| *byte == want[at]), "block {at} is not {}", want[at]);
    }
    let live: u64 = want.iter().map(|fill| u64::from(*fill > 0)).sum();
    assert_eq!(block_on(life::info(&bucket.requests, None)).unwrap().root.size, SIZE);
    let most = live * BLOCK_BYTES * 133 / 100 + 2 * 16 * BLOCK_BYTES;
    assert!(found.0 < most, "{} bytes are stored, and {most} would be enough", found.0);
    found
}

#[test]
fn what_is_trimmed_in_pieces_leaves_little_stored() {
    let holes: Vec<_> = (0..20).map(|at| [(at * 40 + 3, 30, 0_u8)]).collect();
    let holes: Vec<&[_]> = holes.iter().map(|batch| &batch[..]).collect();
    for limits in [MergeLimits::of_bytes(1 << 28), ALL_IN_LEAVES] {
        let (_, moves) = bytes_after(&holes, limits);
        assert!(moves > 5, "{moves} objects with moves");
    }
}

#[test]
fn what_is_overwritten_here_and_there_leaves_little_stored() {
    let writes: Vec<_> =
        (0..100_u64).map(|at| [(at * 7919 % 797, 1, at as u8 % 100 + 100); 1]).collect();
    let rounds: Vec<&[_]> = (0..4).flat_map(|_| writes.iter().map(|batch| &batch[..])).collect();
    for limits in [MergeLimits::of_bytes(1 << 28), ALL_IN_LEAVES] {
        bytes_after(&rounds, limits);
    }
}

#[test]
fn what_is_needed_stays_where_it_is() {
    let (_, moves) = bytes_after(&[&[(0, 1, 200)], &[(100, 9, 201)]], ALL_IN_LEAVES);
    assert_eq!(moves, 0);
}

/// Cleaning, deletions and checkpoints end, and writes go on.
#[test]
fn nothing_of_a_volume_with_a_damaged_object_is_cleaned_or_deleted() {
    let (bucket, journal) = (Bucket::new(), FakeJournal::default());
    let limits = MergeLimits::of_bytes(1 << 28);
    let fill: Vec<_> = (0..20).map(|at| [(at * 40, 40, at as u8 + 1)]).collect();
    let holes: Vec<_> = (0..20).map(|at| [(at * 40 + 3, 30, 0_u8)]).collect();
    let batches: Vec<&[_]> = fill.iter().chain(&holes).map(|batch| &batch[..]).collect();
    // Without a turn more, nothing is cleaned.
    bucket.write(&journal, &batches, true);
    let of_data = |key: &String| {
        let body = bucket.store.object(key).unwrap();
        body.len() > 40 * BLOCK_BYTES as usize
    };
    let data: Vec<_> = bucket.store.keys().into_iter().filter(of_data).collect();
    assert_eq!(data.len(), 20);
    for key in &data {
        let mut body = bucket.store.object(key).unwrap().to_vec();
        body[HEADER_BYTES + 24 + 100] ^= 1;
        bucket.store.put(key, Some(body.into()));
    }
    let directory = || block_on(find(&bucket.requests)).unwrap().directory;
    let before = directory();
    let opened = clean_opening(&bucket, &journal, limits);
    let writes: Vec<_> = (0..8).map(|at| [(at, 1, 99_u8)]).collect();
    let writes: Vec<&[_]> = writes.iter().map(|batch| &batch[..]).collect();
    // Enough for a checkpoint. It waits for what is read to be cleaned.
    commit_asking(opened, &writes, Vec::new(), (false, TURNS)).unwrap();
    assert_eq!(directory(), before, "no checkpoint");
    assert!(data.iter().all(|key| bucket.store.object(key).is_some()), "nothing is deleted");
    assert_eq!(stored(&bucket).1, 0, "nothing is moved");
    let opened = bucket.open(journal, false).unwrap();
    assert!(bucket.read(&opened, 0, 8).unwrap().iter().all(|byte| *byte == 99));
}
