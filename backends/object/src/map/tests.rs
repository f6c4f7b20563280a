//! A map answers like an array, whatever is in which layer and leaf, and a checkpoint has what it
//! was.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::format::{
    Author, Coding, Committed, Directory, Form, FrameReader, HEADER_BYTES, Header, ObjectBuilder,
    ObjectId, Reach, decode_directory, decode_leaf,
};
use crate::gc::{Counts, each_frame};
use crate::ids::{Epoch, Incarnation, Lba, Lsn, VolumeId};

const LEAVES: u64 = 4;
const BLOCKS: u64 = LEAVES * LEAF_BLOCKS;

#[derive(Clone, Debug)]
enum Step {
    Fold {
        lba: u64,
        blocks: u64,
        is_zero: bool,
    },
    /// Moves blocks that are in one object to another one, after others were written.
    Move {
        lba: u64,
        blocks: u64,
        written: (u64, u64),
    },
    Freeze,
    Settle(MergeLimits),
    /// Reads a leaf into memory.
    Load(u64),
    /// Leaves in memory may take so many bytes.
    Bound(usize),
    /// The map is opened again from its last checkpoint.
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    // Often at the borders of leaves.
    let near = (0..=LEAVES, 0..12_u64)
        .prop_map(|(leaf, at)| (leaf * LEAF_BLOCKS + at).saturating_sub(6).min(BLOCKS - 1));
    let lba = prop_oneof![3 => near, 1 => 0..BLOCKS];
    let blocks = prop_oneof![4 => 1..8_u64, 1 => 1..BLOCKS];
    let fold = (lba, blocks, any::<bool>()).prop_map(|(lba, blocks, is_zero)| {
        let most = if is_zero { BLOCKS } else { 16_000 };
        Step::Fold { lba, blocks: blocks.min(BLOCKS - lba).min(most), is_zero }
    });
    let limits = (0..6_usize, 1..10_usize, 100..2000_u64).prop_map(|(min, max, bytes)| {
        Step::Settle(MergeLimits { runs_min: min, runs_max: max, leaf_bytes_max: bytes })
    });
    let moved = (0..BLOCKS, 1..40_u64, (0..60_u64, 1..20_u64)).prop_map(|(lba, blocks, at)| {
        let lba = lba / LEAF_BLOCKS * LEAF_BLOCKS + lba % 8;
        Step::Move { lba, blocks, written: (lba + at.0 % 12, at.1) }
    });
    prop_oneof![
        8 => fold,
        4 => moved,
        2 => Just(Step::Freeze),
        2 => limits,
        2 => (0..LEAVES).prop_map(Step::Load),
        1 => (0..3000_usize).prop_map(Step::Bound),
        1 => Just(Step::Reopen),
    ]
}

/// A store of checkpoints.
struct Bucket {
    objects: HashMap<Seq, bytes::Bytes>,
    next: u64,
    last: Option<(FramePlace, Vec<Option<Place>>)>,
    counts: Counts,
}

impl Default for Bucket {
    fn default() -> Self {
        let (objects, next, last) = Default::default();
        Self { objects, next, last, counts: Counts::new(Seq(1)) }
    }
}

const VOLUME: VolumeId = VolumeId([1; 16]);
const EPOCH: Epoch = Epoch(1);

impl Bucket {
    fn load(&self, leaf: LeafRef) -> Arc<Leaf> {
        let LeafRef { number, place } = leaf;
        let frame = self.frame(place);
        let object = ObjectId { epoch: EPOCH, seq: place.seq };
        let reader = FrameReader::new(VOLUME, object, None);
        let runs = decode_leaf(reader, (number, place.at), frame).unwrap();
        Arc::new(Leaf::new(number, &runs))
    }

    /// A merge of all that the map has.
    fn merge(&self, map: &mut Map, limits: MergeLimits) -> Merge {
        map.freeze().merge(limits, self.counts.up_to(Seq(u64::MAX)))
    }

    fn frame(&self, place: FramePlace) -> &[u8] {
        &self.objects[&place.seq][place.at as usize..][..place.bytes as usize]
    }

    fn directory(&self, place: FramePlace) -> Directory {
        let object = ObjectId { epoch: EPOCH, seq: place.seq };
        let reader = FrameReader::new(VOLUME, object, None);
        decode_directory(reader, place.at, self.frame(place)).unwrap().0
    }

    /// Makes the checkpoint of a merged map, as an upload does.
    fn put(&mut self, merge: Merge, map: &Map, was: Vec<Option<Place>>) -> Settled {
        let most = merge.bytes_max() + 4096;
        let mut old: BTreeMap<_, _> = merge
            .needed()
            .map(|leaf| (leaf, map.leaf(leaf.number).unwrap_or_else(|| self.load(leaf))))
            .collect();
        old.extend(merge.dropped().iter().map(|leaf| (*leaf, self.load(*leaf))));
        let covered = Seq(self.next + 9_999);
        let Merged { runs, mut leaves, changed, counts } = merge.finish(covered, &old);
        self.next += 10_000;
        let seq = Seq(self.next);
        let author = Author {
            volume: VOLUME,
            reach: Reach { epoch: EPOCH, first: Seq(1) },
            previous: None,
            incarnation: Incarnation([1; 16]),
            coding: Coding::default(),
        };
        let mut builder = ObjectBuilder::new(&author, seq, changed.len() + 1, 0);
        let mut new = Vec::new();
        for (number, runs) in changed {
            leaves.insert(number, builder.leaf(number, &runs));
            new.push((number, Arc::new(Leaf::new(number, &runs))));
        }
        let refs = leaves.iter().map(|(&number, &place)| LeafRef { number, place }).collect();
        let covered = Committed { seq: Seq(seq.0 - 1), lsn: Lsn(1) };
        let epochs = vec![author.reach];
        let (snapshots, (objects, dropped)) = (Vec::new(), counts.table());
        let directory =
            Directory { covered, epochs, leaves: refs, runs, snapshots, objects, dropped };
        let place = builder.directory(&directory, &[]);
        let body = builder.finish(Lsn(2), Lsn(1)).body;
        assert!(body.len() as u64 <= most, "{} bytes, and {most} at most", body.len());
        let header = Header::decode(&body).unwrap();
        let entries = header.decode_index(&body[HEADER_BYTES..header.index_end()]).unwrap();
        assert_eq!(entries.len(), new.len() + 1);
        self.objects.insert(seq, body);
        assert_eq!(self.directory(place), directory);
        self.counts.adopt(counts, place, &leaves);
        self.counts.add(seq, u64::from(header.bytes));
        self.check_counts(&directory, &was);
        self.last = Some((place, was));
        Settled { runs: directory.runs, leaves, changed: new }
    }

    /// Counts are what leaves have, and never less than what the map refers to.
    fn check_counts(&self, directory: &Directory, was: &[Option<Place>]) {
        let mut by_leaves = HashMap::<Seq, u64>::new();
        for leaf in directory.leaves.iter().chain(&directory.dropped) {
            let content = self.load(*leaf);
            each_frame(content.within(LeafRef::span_of(leaf.number)), |seq, bytes| {
                *by_leaves.entry(seq).or_default() += bytes;
            });
        }
        let mut live = by_leaves.clone();
        each_frame(directory.runs.iter().copied(), |seq, bytes| {
            *live.entry(seq).or_default() += bytes;
        });
        let mut needed = HashMap::<Seq, u64>::new();
        for place in was.iter().flatten() {
            let Place::Object { seq, .. } = place else { continue };
            *needed.entry(*seq).or_default() += 4096 + 16;
        }
        let is_exact = directory.runs.is_empty() && directory.dropped.is_empty();
        for counted in &directory.objects {
            let of = |bytes: &HashMap<Seq, u64>| bytes.get(&counted.seq).copied().unwrap_or(0);
            assert_eq!(u64::from(counted.by_leaves), of(&by_leaves), "{counted:?}");
            let [live, needed] = [of(&live), of(&needed)];
            assert!(live >= needed && (live == needed || !is_exact), "{counted:?}: {live}");
            assert!(counted.death.is_none() || needed == 0, "{counted:?} is needed");
        }
    }

    fn blocks_of(&self, map: &Map, span: Span) -> Vec<Option<Place>> {
        let mut found = Vec::new();
        for (span, at) in map.cover(span) {
            assert!(!span.is_empty());
            let begin = found.len();
            match at {
                Found::Zero => found.extend((0..span.blocks).map(|_| None)),
                Found::At(place) => {
                    found.extend((0..span.blocks).map(|skip| Some(place.advance(skip))));
                }
                Found::In(leaf) => {
                    found.extend((0..span.blocks).map(|_| None));
                    for run in self.load(leaf).within(span) {
                        for skip in 0..run.span.blocks {
                            let at = begin as u64 + run.span.start - span.start + skip;
                            found[at as usize] = Some(run.place.advance(skip));
                        }
                    }
                }
            }
        }
        found
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_map_answers_like_an_array_and_a_checkpoint_has_what_it_was(
        steps in prop::collection::vec(step(), 1..60),
        asked in (0..BLOCKS, 1..BLOCKS),
    ) {
        let whole = Span { start: 0, blocks: BLOCKS };
        let (mut map, mut model) = (Map::default(), vec![None; BLOCKS as usize]);
        let (mut bucket, mut is_bounding) = (Bucket::default(), false);
        let mut frozen: Option<(Frozen, Counts, Vec<Option<Place>>)> = None;
        for (number, step) in steps.into_iter().enumerate() {
            // A new bound holds from the next leaf on.
            is_bounding |= matches!(step, Step::Bound(_));
            match step {
                Step::Fold { lba, blocks, is_zero } => {
                    let place = match is_zero {
                        true => Place::Zero,
                        false => {
                            let (seq, run) = (Seq(number as u64 + 1), blocks as u32);
                            Place::Object { seq, frame: 152, form: Form::Plain, skip: 0, run }
                        }
                    };
                    map.fold(&Placed { lba: Lba(lba), blocks, place, from: None });
                    bucket.counts.add(Seq(number as u64 + 1), 1 << 20);
                    for skip in 0..blocks {
                        let place = place.advance(skip);
                        let place = (place != Place::Zero).then_some(place);
                        model[(lba + skip) as usize] = place;
                    }
                }
                Step::Move { lba, blocks, written } => {
                    let seq = Seq(1000 + 2 * number as u64);
                    let Some(from) = model[lba as usize].and_then(seq_of) else { continue };
                    let object = |seq, run: u64| Place::Object {
                        seq,
                        frame: 152,
                        form: Form::Plain,
                        skip: 0,
                        run: run as u32,
                    };
                    let span = Span { start: lba, blocks: blocks.min(BLOCKS - lba) };
                    let was = model.clone();
                    let is_live = |at: &u64| was[*at as usize].and_then(seq_of) == Some(from);
                    let live: Vec<_> = (span.start..span.end()).filter(is_live).collect();
                    // Others are written after it was looked up, and committed before.
                    let (start, count) = (written.0.min(BLOCKS - 1), written.1);
                    let count = count.min(BLOCKS - start);
                    let (lba, place) = (Lba(start), object(seq, count));
                    map.fold(&Placed { lba, blocks: count, place, from: None });
                    for skip in 0..count {
                        model[(start + skip) as usize] = Some(place.advance(skip));
                    }
                    let place = object(Seq(seq.0 + 1), live.len() as u64);
                    for (skip, at) in live.into_iter().enumerate() {
                        let (lba, place) = (Lba(at), place.advance(skip as u64));
                        map.fold(&Placed { lba, blocks: 1, place, from: Some(from) });
                        if model[at as usize] == was[at as usize] {
                            model[at as usize] = Some(place);
                        }
                    }
                    bucket.counts.add(seq, 1 << 20);
                    bucket.counts.add(Seq(seq.0 + 1), 1 << 20);
                }
                Step::Freeze if frozen.is_none() => {
                    let counts = bucket.counts.up_to(Seq(u64::MAX));
                    frozen = Some((map.freeze(), counts, model.clone()));
                }
                Step::Freeze => {}
                Step::Settle(limits) => {
                    let Some((frozen, counts, was)) = frozen.take() else { continue };
                    let settled = bucket.put(frozen.merge(limits, counts), &map, was);
                    drop(map.settle(settled));
                }
                Step::Load(number) => {
                    if let Some(&place) = map.leaves.get(&number) {
                        let leaf = LeafRef { number, place };
                        map.keep(leaf, &bucket.load(leaf));
                        is_bounding = false;
                        // One that is no leaf of the map any more is not kept.
                        let seq = Seq(place.seq.0 + 1);
                        let other = LeafRef { number, place: FramePlace { seq, ..place } };
                        prop_assert!(map.keep(other, &Arc::new(Leaf::new(number, &[]))).is_empty());
                    }
                }
                Step::Bound(bytes) => map.loaded.keep_within(bytes),
                Step::Reopen => {
                    let Some((place, was)) = bucket.last.clone() else { continue };
                    let directory = bucket.directory(place);
                    bucket.counts = Counts::of_directory(Seq(1), &directory, place);
                    (map, model, frozen) = (Map::of_directory(directory), was, None);
                }
            }
            prop_assert!(bucket.blocks_of(&map, whole) == model);
            let most = map.loaded.bytes_max();
            prop_assert!(is_bounding || map.loaded.bytes() <= most || map.loaded.len() <= 1);
        }
        let asked = Span { start: asked.0, blocks: asked.1.min(BLOCKS - asked.0) };
        let want = &model[asked.start as usize..asked.end() as usize];
        prop_assert!(bucket.blocks_of(&map, asked) == want);
    }
}

fn seq_of(place: Place) -> Option<Seq> {
    match place {
        Place::Zero => None,
        Place::Object { seq, .. } => Some(seq),
    }
}

/// Small writes all over a volume: what is above the leaves, the leaves in memory and the bytes of
/// checkpoints stay within their bounds.
#[test]
fn a_map_of_any_fragmentation_stays_within_its_bounds() {
    let limits = MergeLimits { runs_min: 500, runs_max: 4000, leaf_bytes_max: 1 << 20 };
    let mut map = Map::default();
    map.loaded.keep_within(100_000);
    let mut bucket = Bucket::default();
    let leaves = 64;
    let (mut random, mut most, mut written) = (1_u64, 0, 0);
    let rounds = 100;
    for round in 0..rounds {
        for number in 0..1000_u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let lba = Lba((random >> 33) % (leaves * LEAF_BLOCKS));
            let seq = Seq(1 + round * 10_000 / 2 + number / 100);
            let place = Place::Object { seq, frame: 152, form: Form::Packed(99), skip: 0, run: 1 };
            map.fold(&Placed { lba, blocks: 1, place, from: None });
        }
        let settled = bucket.put(bucket.merge(&mut map, limits), &map, Vec::new());
        assert!(settled.runs.len() <= limits.runs_max, "{} runs", settled.runs.len());
        drop(map.settle(settled));
        written += bucket.objects[&Seq(bucket.next)].len();
        most = most.max(map.bytes());
    }
    assert!(most < 700_000, "{most} bytes in memory");
    let data = rounds as usize * 1000 * 4096;
    assert!(written < data / 5, "{written} bytes of checkpoints for {data}");
}

/// Why no checkpoint may begin between the look at the map and the move: a block that was written
/// between is in a leaf then, and not above it.
#[test]
fn a_move_across_a_checkpoint_would_bring_an_old_block_back() {
    for is_across in [false, true] {
        let (mut map, mut bucket) = (Map::default(), Bucket::default());
        map.keep_within(1 << 20);
        let place = |seq| {
            let (seq, form) = (Seq(seq), Form::Plain);
            Place::Object { seq, frame: 152, form, skip: 0, run: 1 }
        };
        let fold = |map: &mut Map, seq, from: Option<u64>| {
            let (place, from) = (place(seq), from.map(Seq));
            map.fold(&Placed { lba: Lba(5), blocks: 1, place, from });
        };
        fold(&mut map, 1, None);
        fold(&mut map, 2, None);
        if is_across {
            let limits = MergeLimits { runs_min: 0, ..MergeLimits::of_bytes(1 << 28) };
            let settled = bucket.put(bucket.merge(&mut map, limits), &map, Vec::new());
            drop(map.settle(settled));
        }
        fold(&mut map, 3, Some(1));
        let found = bucket.blocks_of(&map, Span { start: 5, blocks: 1 });
        assert_eq!(found, [Some(place(if is_across { 3 } else { 2 }))]);
    }
}

/// A trim of a whole volume takes its leaves away at once, whatever its size.
#[test]
fn zeroes_take_leaves_away() {
    let mut map = Map::default();
    map.keep_within(16 << 20);
    let mut bucket = Bucket::default();
    let limits = MergeLimits { runs_min: 0, ..MergeLimits::of_bytes(1 << 28) };
    let (seq, form) = (Seq(1), Form::Plain);
    let place = Place::Object { seq, frame: 152, form, skip: 0, run: 16_000 };
    for number in 0..1000 {
        map.fold(&Placed { lba: Lba(number * 16_000), blocks: 16_000, place, from: None });
    }
    let settled = bucket.put(bucket.merge(&mut map, limits), &map, Vec::new());
    assert!(settled.leaves.len() > 3900 && settled.runs.is_empty());
    drop(map.settle(settled));
    map.fold(&Placed { lba: Lba(5), blocks: 1 << 40, place: Place::Zero, from: None });
    let merge = bucket.merge(&mut map, MergeLimits::of_bytes(1 << 28));
    let settled = bucket.put(merge, &map, Vec::new());
    assert_eq!((settled.leaves.len(), settled.runs.len()), (1, 1), "a part of the first is left");
    drop(map.settle(settled));
    let found = map.cover(Span { start: 0, blocks: 1 << 40 });
    assert_eq!(found[0], (Span { start: 0, blocks: 5 }, Found::At(place)));
    assert!(found[1..].iter().all(|(_, found)| *found == Found::Zero));
}
