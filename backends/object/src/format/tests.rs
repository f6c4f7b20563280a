//! What is written is read back, and no other bytes are believed.

mod snapshots;

use proptest::collection::vec;
use proptest::prelude::*;

use snapshots::snapshot;

use super::*;
use crate::cipher::{WRAPPED_BYTES, WrappedKey};
use crate::extents::Span;
use crate::ids::*;

mod codings;

pub(super) fn root() -> Root {
    let opening = Opening { epoch: Epoch(7), incarnation: Incarnation([9; 16]) };
    Root {
        volume: VolumeId([1; 16]),
        number: 12,
        state: State::Open,
        author: opening,
        node: "a".to_owned(),
        size: 1 << 18,
        committed: Committed { seq: Seq(44), lsn: Lsn(1000) },
        last: LastOpening { opening, node: "a".to_owned(), first: Seq(40), is_closed: false },
        previous: Some(Reach { epoch: Epoch(5), first: Seq(2) }),
        directory: Some(FramePlace { seq: Seq(43), at: 152, bytes: 99 }),
        durability: Durability::Remote,
        codec: Codec::Lz4,
        wrapped_key: Some(WrappedKey::new([5; WRAPPED_BYTES])),
        owners: Vec::new(),
        snapshots: SnapshotNews::default(),
    }
}

fn author() -> Author {
    Author {
        volume: VolumeId([1; 16]),
        reach: Reach { epoch: Epoch(7), first: Seq(40) },
        previous: Some(Reach { epoch: Epoch(5), first: Seq(2) }),
        incarnation: Incarnation([9; 16]),
        coding: Coding::default(),
    }
}

fn blocks(count: u64, seed: u8) -> Vec<u8> {
    (0..count * BLOCK_BYTES).map(|at| (at / 64) as u8 ^ seed).collect()
}

pub(super) fn object() -> Built {
    let mut builder = ObjectBuilder::new(&author(), Seq(45), 3, 0);
    builder.write(Lba(100), &blocks(19, 1));
    builder.zero(Lba(0), 1 << 32);
    builder.write(Lba(5), &blocks(1, 2));
    builder.finish(Lsn(1001), Lsn(1003))
}

fn reader(of: &Built) -> FrameReader<'static> {
    FrameReader::new(of.header.volume, of.header.id, None)
}

#[test]
fn a_root_has_the_bytes_of_the_drawing() {
    let bytes = root().encode();
    assert_eq!(bytes.len(), 268);
    assert_eq!(&bytes[..12], b"SHVROOT\n\x01\0\0\0");
    assert_eq!((bytes[16], bytes[17], bytes[20]), (12, 1, 2));
    assert_eq!(bytes[24..40], [1; 16]);
    assert_eq!((bytes[40], bytes[48], bytes[80], bytes[120]), (12, 7, 44, 40));
    assert_eq!(Root::decode(&bytes), Ok(root()));
}

#[test]
fn a_root_with_long_names_of_nodes_fits() {
    let node = "n".repeat(NODE_BYTES_MAX);
    let mut root = root();
    (root.node, root.last.node) = (node.clone(), node);
    let bytes = root.encode();
    assert!(bytes.len() as u64 <= ROOT_BYTES_MAX);
    assert_eq!(Root::decode(&bytes), Ok(root));
}

#[test]
fn a_root_whose_fields_contradict_one_another_is_refused() {
    let wrong: [fn(&mut Root); 10] = [
        |root| root.state = State::Closed,
        |root| root.state = State::Claimed,
        |root| root.last.is_closed = true,
        |root| root.committed.seq = Seq(38),
        |root| root.previous = Some(Reach { epoch: Epoch(7), first: Seq(2) }),
        |root| root.size = SIZE_MAX + 1,
        |root| root.number = u64::MAX,
        |root| root.directory = Some(FramePlace { seq: Seq(45), at: 152, bytes: 99 }),
        |root| root.directory = Some(FramePlace { seq: Seq(0), at: 152, bytes: 99 }),
        |root| root.directory = Some(FramePlace { seq: Seq(9), at: 152, bytes: 15 }),
    ];
    for (index, change) in wrong.into_iter().enumerate() {
        let mut root = root();
        change(&mut root);
        assert!(matches!(Root::decode(&root.encode()), Err(Wrong::Damaged(_))), "{index}");
    }
}

#[test]
fn newer_bytes_are_told_from_damaged_ones() {
    for at in [8, 12] {
        let mut bytes = root().encode();
        bytes[at] ^= 4;
        let (body, crc) = bytes.split_last_chunk_mut().unwrap();
        *crc = crc32fast::hash(body).to_le_bytes();
        let found = Root::decode(&bytes).unwrap_err();
        assert!(matches!(found, Wrong::Newer(_)), "byte {at}: {found}");
    }
    let body = object().body.to_vec();
    for at in [8, 12] {
        let newer = with_right_checksum(body.clone(), at, 4);
        assert!(matches!(Header::decode(&newer), Err(Wrong::Newer(_))), "byte {at}");
        let mut damaged = body.clone();
        damaged[at] ^= 4;
        assert!(matches!(Header::decode(&damaged), Err(Wrong::Damaged(_))), "byte {at}");
        let mut damaged = root().encode();
        damaged[at] ^= 4;
        assert!(matches!(Root::decode(&damaged), Err(Wrong::Damaged(_))), "byte {at}");
    }
}

#[test]
fn an_object_is_read_back_in_any_pieces() {
    let built = object();
    let header = Header::decode(&built.body).unwrap();
    assert_eq!(header, built.header);
    assert_eq!(header.reach(), author().reach);
    assert_eq!(&built.body[..12], b"SHVLOG\r\n\x01\0\0\0");
    let entries = header.decode_index(&built.body[HEADER_BYTES..header.index_end()]).unwrap();
    assert_eq!(entries.len(), 3);
    let Entry::Write { lba: Lba(100), blocks: 19, frame, form } = entries[0] else { panic!() };
    assert_eq!(entries[1], Entry::Zero { lba: Lba(0), blocks: 1 << 32 });
    let whole = blocks(19, 1);
    for skip in 0..19 {
        for count in 1..=19 - skip {
            let piece = RunPart { frame, form, run: 19, skip, blocks: count };
            let range = piece.bytes();
            let stored = &built.body[range.start as usize..range.end as usize];
            let lba = Lba(100 + u64::from(skip));
            let data = reader(&built).read(piece, lba, stored).unwrap();
            let at = (skip as usize) << 12;
            assert!(data == whole[at..at + ((count as usize) << 12)], "{skip} {count}");
        }
    }
}

/// A frame is bound to all that says where it belongs.
#[test]
fn a_frame_at_another_place_is_refused() {
    let built = object();
    let Header { volume, id, .. } = built.header;
    let Place::Object { frame, form, run, .. } = built.placed[0].place else { panic!() };
    let piece = RunPart { frame, form, run, skip: 8, blocks: 8 };
    let range = piece.bytes();
    let stored = &built.body[range.start as usize..range.end as usize];
    let read = |volume, id, piece, lba, stored| {
        FrameReader::new(volume, id, None).read(piece, Lba(lba), stored)
    };
    assert!(read(volume, id, piece, 108, stored).is_ok());
    let other_epoch = ObjectId { epoch: Epoch(6), ..id };
    let other_seq = ObjectId { seq: Seq(44), ..id };
    assert!(read(VolumeId([2; 16]), id, piece, 108, stored).is_err());
    assert!(read(volume, other_epoch, piece, 108, stored).is_err());
    assert!(read(volume, other_seq, piece, 108, stored).is_err());
    assert!(read(volume, id, piece, 100, stored).is_err());
    // An address that no volume has, from a map that is wrong.
    assert!(read(volume, id, piece, 0, stored).is_err());
    let first = RunPart { skip: 0, ..piece };
    assert!(read(volume, id, first, 108, stored).is_err(), "another frame");
    assert!(read(volume, id, piece, 108, &stored[1..]).is_err());
}

#[test]
fn a_fence_is_its_only_entry() {
    let built = fence(&author(), Seq(45), Lsn(1000));
    assert_eq!(built.body.len(), HEADER_BYTES + ENTRY_BYTES);
    let header = Header::decode(&built.body).unwrap();
    assert_eq!((header.lsn_first, header.lsn_last), (Lsn(1001), Lsn(1000)));
    assert_eq!(header.decode_index(&built.body[HEADER_BYTES..]), Ok(vec![Entry::Fence]));
}

/// An object with moves from two others.
pub(super) fn moves() -> Built {
    let mut builder = ObjectBuilder::new(&author(), Seq(45), 2, 0);
    builder.moved(Lba(9), &[1; 2 * BLOCK_BYTES as usize], Seq(40));
    builder.moved(Lba(30), &[2; BLOCK_BYTES as usize], Seq(44));
    builder.finish(Lsn(1001), Lsn(1000))
}

#[test]
fn moved_blocks_say_where_they_were_and_are_alone_in_their_object() {
    let built = moves();
    let header = Header::decode(&built.body).unwrap();
    let index = &built.body[HEADER_BYTES..header.index_end()];
    let entries = header.decode_index(index).unwrap();
    assert_eq!((index[0], index[8], index[16], index[20]), (4, 9, 2, 5), "two blocks, five back");
    let placed: Vec<_> = entries.iter().filter_map(|entry| entry.placed(Seq(45))).collect();
    assert_eq!(placed, built.placed);
    assert_eq!(
        placed.iter().map(|placed| placed.from).collect::<Vec<_>>(),
        [40, 44].map(|seq| Some(Seq(seq)))
    );
    // From itself, from before all, with a write beside it, and with writes of its own.
    let refused = |change: &dyn Fn(&mut Header, &mut Vec<u8>)| {
        let (mut header, mut index) = (header, index.to_vec());
        change(&mut header, &mut index);
        header.index_crc = crc32fast::hash(&index);
        assert!(matches!(header.decode_index(&index), Err(Wrong::Damaged(_))));
    };
    refused(&|_, index| index[20] = 0);
    refused(&|_, index| index[20] = 45);
    refused(&|_, index| (index[24], index[24 + 20]) = (1, 0));
    refused(&|header, _| header.lsn_last = Lsn(1001));
}

pub(super) fn directory() -> Directory {
    let reach = |epoch, first| Reach { epoch: Epoch(epoch), first: Seq(first) };
    let run = |start, blocks, seq, form, (frame, skip, run)| {
        let place = Place::Object { seq: Seq(seq), frame, form, skip, run };
        Run { span: Span { start, blocks }, place }
    };
    let zeroes = Run { span: Span { start: 700, blocks: 1 << 40 }, place: Place::Zero };
    let runs = vec![
        run(0, 1, 1, Form::Plain, (152, 0, 1)),
        run(1, 300, 44, Form::Sealed, (1 << 25, 2, 16_000)),
        zeroes,
        run(1 << 50, 1, 7, Form::Packed(300), (200, 3, 4)),
    ];
    let leaf =
        |number, seq, at| LeafRef { number, place: FramePlace { seq: Seq(seq), at, bytes: 99 } };
    let leaves = vec![leaf(0, 46, 176), leaf(7, 30, 1 << 25)];
    let covered = Committed { seq: Seq(44), lsn: Lsn(1000) };
    let epochs = vec![reach(3, 1), reach(5, 2), reach(7, 40)];
    let snapshots = vec![snapshot(2, 30, 31), snapshot(5, 44, 45)];
    let counted = |seq, bytes, by_leaves, death: Option<u64>| Counted {
        seq: Seq(seq),
        bytes,
        by_leaves,
        death: death.map(Seq),
    };
    let objects = vec![
        counted(1, 1 << 25, 300, None),
        counted(7, 5000, 0, Some(40)),
        counted(8, 6000, 0, Some(44)),
        counted(44, 1 << 26, 1 << 26, None),
    ];
    let dropped = vec![leaf(7, 20, 176), leaf(7, 22, 300), leaf(9, 20, 400)];
    Directory { covered, epochs, leaves, runs, snapshots, objects, dropped }
}

/// The object between what the directory has and its own.
fn object_between() -> Built {
    let mut builder = ObjectBuilder::new(&author(), Seq(45), 1, 0);
    builder.zero(Lba(9), 3);
    builder.finish(Lsn(1001), Lsn(1003))
}

#[test]
fn a_checkpoint_with_the_head_of_another_object_is_refused() {
    let mut builder = ObjectBuilder::new(&author(), Seq(46), 1, 0);
    let mut other = ObjectBuilder::new(&author(), Seq(44), 1, 0);
    other.zero(Lba(9), 3);
    let head = other.finish(Lsn(1001), Lsn(1003)).head();
    let FramePlace { at, .. } = builder.directory(&directory(), &[head]);
    let built = builder.finish(Lsn(1004), Lsn(1003));
    let Header { volume, id, .. } = built.header;
    let reader = FrameReader::new(volume, id, None);
    let decoded = decode_directory(reader, at, &built.body[at as usize..]);
    assert!(matches!(decoded, Err(Wrong::Damaged(_))), "{decoded:?}");
}

pub(super) fn leaf_runs() -> Vec<Run> {
    let place = |seq, skip| {
        let (seq, form) = (Seq(seq), Form::Plain);
        Place::Object { seq, frame: 152, form, skip, run: 8000 }
    };
    let run = |start, blocks, place| Run { span: Span { start, blocks }, place };
    vec![run(4096, 1, place(46, 9)), run(4100, 4092, place(1, 0))]
}

#[test]
fn a_checkpoint_has_the_bytes_of_the_drawing_and_is_read_back() {
    let mut builder = ObjectBuilder::new(&author(), Seq(46), 2, 0);
    let leaf = builder.leaf(1, &leaf_runs());
    let between = object_between();
    let place = builder.directory(&directory(), &[between.head()]);
    let built = builder.finish(Lsn(1004), Lsn(1003));
    let header = Header::decode(&built.body).unwrap();
    let entries = header.decode_index(&built.body[HEADER_BYTES..header.index_end()]).unwrap();
    let FramePlace { seq: Seq(46), at, bytes } = place else { panic!("{place:?}") };
    let of_leaf = Entry::Leaf { number: 1, frame: leaf.at, bytes: leaf.bytes };
    assert_eq!(entries, [of_leaf, Entry::Directory { covered: Seq(44), frame: at, bytes }]);
    assert_eq!((leaf.at, leaf.at + leaf.bytes), (176, at));
    assert_eq!(built.body.len(), (at + bytes) as usize);
    let frame = &built.body[at as usize..];
    assert_eq!((frame[8], frame[9]), (0, 0), "plain, and no blocks");
    // A leaf: no gap, object 46, at 176, of 99 bytes.
    assert_eq!(frame[16 + 32 + 48..][..5], [0, 46, 0xb0, 1, 99]);
    // The first run: no gap, a block, of object 1, at 152, as it is, nothing of its run before or
    // behind it.
    assert_eq!(frame[16 + 32 + 48 + 12..][..8], [0, 1, 1, 0x98, 1, 0, 0, 0]);
    let (volume, id) = (header.volume, header.id);
    let read_directory = |volume, id, at, frame: &[u8]| {
        decode_directory(FrameReader::new(volume, id, None), at, frame)
    };
    let read_leaf = |id, number, frame: &[u8]| {
        decode_leaf(FrameReader::new(volume, id, None), (number, leaf.at), frame)
    };
    let entries = vec![Entry::Zero { lba: Lba(9), blocks: 3 }];
    let head = Head { header: between.header, entries };
    assert_eq!(read_directory(volume, id, at, frame), Ok((directory(), vec![head])));
    assert_eq!(frame[frame.len() - 128 - 24..], between.body[..], "header and index");
    // It is bound to its place.
    let other = ObjectId { seq: Seq(47), ..id };
    assert!(read_directory(volume, other, at, frame).is_err());
    assert!(read_directory(volume, id, at + 1, frame).is_err());
    assert!(read_directory(VolumeId([2; 16]), id, at, frame).is_err());
    for end in 0..frame.len() {
        assert!(read_directory(volume, id, at, &frame[..end]).is_err(), "{end}");
    }
    let frame = &built.body[leaf.at as usize..at as usize];
    assert_eq!(read_leaf(id, 1, frame), Ok(leaf_runs()));
    assert!(read_leaf(id, 2, frame).is_err(), "another leaf");
    assert!(read_leaf(other, 1, frame).is_err());
}

#[test]
fn a_checkpoint_has_nothing_but_leaves_and_a_directory() {
    let mut builder = ObjectBuilder::new(&author(), Seq(46), 2, 0);
    builder.zero(Lba(1), 1);
    builder.directory(&directory(), &[object_between().head()]);
    let body = builder.finish(Lsn(1004), Lsn(1003)).body;
    let header = Header::decode(&body).unwrap();
    let index = &body[HEADER_BYTES..header.index_end()];
    assert!(matches!(header.decode_index(index), Err(Wrong::Damaged(_))));
}

#[test]
fn a_directory_that_contradicts_itself_is_refused() {
    let wrong: [fn(&mut Directory); 20] = [
        |directory| directory.covered.seq = Seq(43),
        |directory| directory.covered.seq = Seq(0),
        |directory| directory.epochs.clear(),
        |directory| directory.epochs[0].first = Seq(2),
        |directory| directory.epochs[2].epoch = Epoch(5),
        |directory| directory.epochs[2].first = Seq(45),
        |directory| directory.leaves[0].place.seq = Seq(47),
        |directory| directory.leaves[1].number = SIZE_MAX,
        |directory| directory.leaves[1].place.bytes = u32::MAX,
        |directory| directory.runs[3].span.start = SIZE_MAX,
        |directory| directory.runs[1].span.blocks = 0,
        |directory| directory.runs[0].span = Span { start: 0, blocks: 0 },
        |directory| directory.snapshots[1].id = 2,
        |directory| directory.snapshots[1] = snapshot(5, 45, 46),
        |directory| directory.snapshots[1].committed.lsn = Lsn(1001),
        |directory| directory.objects[3].seq = Seq(45),
        |directory| directory.objects[0].bytes = (1 << 26) + 1,
        |directory| directory.objects[1].by_leaves = 1,
        |directory| directory.objects[1].death = Some(Seq(6)),
        |directory| directory.dropped[1].place.seq = Seq(47),
    ];
    for (index, change) in wrong.into_iter().enumerate() {
        let mut directory = directory();
        change(&mut directory);
        let found = Directory::decode(&directory.encode(), Seq(46));
        assert!(matches!(found, Err(Wrong::Damaged(_))), "{index}");
    }
    let mut longer = directory().encode();
    longer.push(0);
    assert!(Directory::decode(&longer, Seq(46)).is_err());
}

/// Changes a byte of a header, and makes its checksum right again.
fn with_right_checksum(mut bytes: Vec<u8>, at: usize, change: u8) -> Vec<u8> {
    let end = HEADER_BYTES - 4;
    bytes[at] ^= change;
    let crc = crc32fast::hash(&bytes[..end]);
    bytes[end..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    bytes
}

proptest! {
    #[test]
    fn a_changed_root_is_refused(at in 0_usize..268, change in 1_u8..) {
        let mut bytes = root().encode();
        bytes[at] ^= change;
        prop_assert!(Root::decode(&bytes).is_err());
        prop_assert!(Root::decode(&bytes[..at]).is_err());
    }

    #[test]
    fn a_changed_object_is_refused(
        at in 0_usize..HEADER_BYTES + 3 * ENTRY_BYTES,
        change in 1_u8..,
    ) {
        let built = object();
        let mut bytes = built.body.to_vec();
        bytes[at] ^= change;
        let index = HEADER_BYTES..built.header.index_end();
        let found = Header::decode(&bytes).and_then(|header| header.decode_index(&bytes[index]));
        prop_assert!(found.is_err());
    }

    #[test]
    fn a_changed_frame_is_refused(at in 0_usize..4096 + 16, change in 1_u8..) {
        let built = object();
        let Place::Object { frame, form, run, .. } = built.placed[2].place else { panic!() };
        let piece = RunPart { frame, form, run, skip: 0, blocks: 1 };
        let mut stored = built.body[frame as usize..].to_vec();
        stored[at] ^= change;
        prop_assert!(reader(&built).read(piece, Lba(5), &stored).is_err());
    }

    /// No bytes make a reader panic, also none with a right checksum.
    #[test]
    fn no_bytes_panic(noise in vec(any::<u8>(), 0..400), at in 0_usize..124, change: u8) {
        let _ = Root::decode(&noise);
        let _ = Header::decode(&noise);
        let built = object();
        let bytes = with_right_checksum(built.body.to_vec(), at, change);
        if let Ok(header) = Header::decode(&bytes) {
            let end = header.index_end().min(bytes.len());
            let _ = header.decode_index(&bytes[HEADER_BYTES..end]);
            let _ = header.decode_index(&noise);
        }
        let mut bytes = root().encode();
        bytes[at] ^= change;
        let (body, crc) = bytes.split_last_chunk_mut().unwrap();
        *crc = crc32fast::hash(body).to_le_bytes();
        let _ = Root::decode(&bytes);
    }

    /// The same for directories, whose checksum is of the frame. What is read is written the same.
    #[test]
    fn no_directory_panics(
        noise in vec(any::<u8>(), 0..200),
        at in 0_usize..90,
        change in 1_u8..,
    ) {
        let _ = Directory::decode(&noise, Seq(46));
        let mut bytes = directory().encode();
        let at = at % bytes.len();
        bytes[at] ^= change;
        if let Ok(directory) = Directory::decode(&bytes, Seq(46)) {
            prop_assert_eq!(directory.encode(), bytes);
        }
    }

    /// The same for entries of any content.
    #[test]
    fn no_entry_panics(index in vec(any::<u8>(), 72), kind in 0_u8..8) {
        let mut index = index;
        for entry in index.chunks_mut(ENTRY_BYTES) {
            entry[..2].copy_from_slice(&[kind, 0]);
        }
        let header = Header { index_crc: crc32fast::hash(&index), ..object().header };
        let _ = header.decode_index(&index);
    }
}
