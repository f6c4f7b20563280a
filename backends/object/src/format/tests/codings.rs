//! Blocks that are compressed and encrypted.

use super::*;
use crate::cipher::VolumeKey;

/// Blocks of which some have much in common and others nothing, by the bits of a number.
fn mixed(count: u64, noisy: u64, seed: u64) -> Vec<u8> {
    let mut random = seed | 1;
    let mut noise = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 56) as u8
    };
    let mut block = |index: u64| -> Vec<u8> {
        let is_noisy = noisy >> (index % 64) & 1 == 1;
        (0..BLOCK_BYTES)
            .map(|at| if is_noisy { noise() } else { (at / 64 + index) as u8 })
            .collect()
    };
    (0..count).flat_map(&mut block).collect()
}

fn codings() -> [Coding; 4] {
    let key = || Some(VolumeKey::new([3; 32]));
    [(Codec::Plain, None), (Codec::Lz4, None), (Codec::Plain, key()), (Codec::Lz4, key())]
        .map(|(codec, key)| Coding { codec, key })
}

/// An object with these blocks from an address on.
fn coded(coding: &Coding, lba: Lba, data: &[u8]) -> Built {
    let author = Author { coding: coding.clone(), ..author() };
    let entries = coding.entries(lba, data.len() as u64 / BLOCK_BYTES);
    let mut builder = ObjectBuilder::new(&author, Seq(45), entries, 0);
    builder.write(lba, data);
    builder.finish(Lsn(1001), Lsn(1001))
}

fn reader<'a>(of: &Built, key: Option<&'a VolumeKey>) -> FrameReader<'a> {
    FrameReader::new(of.header.volume, of.header.id, key)
}

/// The part of an object that has the whole run of a piece, and the bytes of that.
fn part(built: &Built, placed: &Placed) -> (RunPart, Vec<u8>) {
    let Place::Object { frame, form, skip, run, .. } = placed.place else { panic!() };
    let part = RunPart { frame, form, run, skip, blocks: placed.blocks as u32 };
    let range = part.bytes();
    (part, built.body[range.start as usize..range.end as usize].to_vec())
}

/// Makes the checksum of the only frame of an object right.
fn mend_checksum(built: &Built, lba: Lba, at: u32, frame: &mut [u8]) {
    let Header { volume, id, .. } = built.header;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&volume.0);
    for number in [id.epoch.0, id.seq.0, u64::from(at), lba.0] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(&frame[4..]);
    frame[..4].copy_from_slice(&hasher.finalize().to_le_bytes());
}

#[test]
fn what_shrinks_is_in_frames_of_four_blocks() {
    for coding in codings() {
        // Two blocks, a whole group, one of noise, and one of noise but for its first block.
        let data = mixed(14, 0xff << 6 & !(1 << 10), 7);
        let built = coded(&coding, Lba(6), &data);
        let index = &built.body[HEADER_BYTES..built.header.index_end()];
        let entries = built.header.decode_index(index).unwrap();
        let forms: Vec<_> = entries
            .iter()
            .map(|entry| match entry {
                Entry::Write { lba, blocks, form: Form::Packed(_), .. } => (lba.0, *blocks, true),
                Entry::Write { lba, blocks, .. } => (lba.0, *blocks, false),
                other => panic!("{other:?}"),
            })
            .collect();
        match coding.codec {
            Codec::Lz4 => {
                assert_eq!(forms, [(6, 2, true), (8, 4, true), (12, 4, false), (16, 4, true)])
            }
            Codec::Plain => assert_eq!(forms, [(6, 14, false)]),
        }
    }
}

#[test]
fn no_frame_is_read_without_its_key_or_in_the_place_of_an_encrypted_one() {
    let [plain, packed, sealed, both] = codings();
    let other = VolumeKey::new([4; 32]);
    for coding in [plain, packed, sealed, both] {
        let built = coded(&coding, Lba(0), &mixed(1, 0, 1));
        let (part, stored) = part(&built, &built.placed[0]);
        let read = |key| reader(&built, key).read(part, Lba(0), &stored).is_ok();
        let is_encrypted = coding.key.is_some();
        assert_eq!(read(None), !is_encrypted);
        assert!(read(coding.key.as_ref()));
        assert!(!read(Some(&other)));
        let shown = built.body.windows(64).any(|bytes| bytes == [9; 64]);
        assert_eq!(shown, coding == Coding::default(), "what is stored");
    }
}

#[test]
fn each_object_has_a_key_of_its_own() {
    let [.., coding, _] = codings();
    let data = mixed(1, 0, 1);
    let [one, two] = [0, 1].map(|_| coded(&coding, Lba(0), &data));
    let (part_of_one, one) = part(&one, &one.placed[0]);
    let (_, two) = part(&two, &two.placed[0]);
    let blocks = |frame: &[u8]| frame[32..32 + BLOCK_BYTES as usize].to_vec();
    assert_ne!(blocks(&one), blocks(&two), "the same blocks at the same place");
    assert_eq!(part_of_one.bytes().end - part_of_one.bytes().start, 16 + 16 + 4096 + 16);
}

#[test]
fn leaves_and_directories_are_encrypted() {
    let coding = Coding { key: Some(VolumeKey::new([3; 32])), ..Coding::default() };
    let author = Author { coding: coding.clone(), ..author() };
    let mut builder = ObjectBuilder::new(&author, Seq(46), 2, 0);
    let leaf = builder.leaf(1, &leaf_runs());
    let place = builder.directory(&directory(), &[object_between().head()]);
    let built = builder.finish(Lsn(1004), Lsn(1003));
    let frame = |of: FramePlace| &built.body[of.at as usize..(of.at + of.bytes) as usize];
    let key = coding.key.as_ref();
    let found = decode_directory(reader(&built, key), place.at, frame(place));
    assert_eq!(found.map(|(found, heads)| (found, heads.len())), Ok((directory(), 1)));
    let found = decode_leaf(reader(&built, key), (1, leaf.at), frame(leaf));
    assert_eq!(found, Ok(leaf_runs()));
    assert!(decode_directory(reader(&built, None), place.at, frame(place)).is_err());
    assert!(decode_leaf(reader(&built, None), (1, leaf.at), frame(leaf)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_piece_is_read_as_written(
        lba in 0_u64..20,
        blocks in 1_u64..30,
        noisy: u64,
        seed: u64,
        skip in 0_u64..30,
        count in 1_u64..30,
    ) {
        let data = mixed(blocks, noisy, seed);
        for coding in codings() {
            let built = coded(&coding, Lba(lba), &data);
            let mut out = Vec::new();
            let wanted = Span { start: lba + skip, blocks: count };
            for Placed { lba, blocks, place, from } in &built.placed {
                let common = Span { start: lba.0, blocks: *blocks }.common(wanted);
                if !common.is_empty() {
                    let place = place.advance(common.start - lba.0);
                    let (lba, blocks) = (Lba(common.start), common.blocks);
                    let (part, stored) = part(&built, &Placed { lba, blocks, place, from: *from });
                    out.extend(reader(&built, coding.key.as_ref()).read(part, lba, &stored)?);
                }
            }
            let wanted = skip.min(blocks)..(skip + count).min(blocks);
            let [begin, end] = [wanted.start, wanted.end].map(|at| (at * BLOCK_BYTES) as usize);
            prop_assert!(out == data[begin..end.max(begin)]);
        }
    }

    /// Also one that has made the checksum right again, of an encrypted frame.
    #[test]
    fn every_flipped_bit_is_refused(noisy in 0_u64..2, at: prop::sample::Index, bit in 0..8) {
        for coding in codings() {
            let built = coded(&coding, Lba(5), &mixed(1, noisy, 9));
            let (part, mut stored) = part(&built, &built.placed[0]);
            let at = at.index(stored.len());
            stored[at] ^= 1_u8 << bit;
            let read = |stored: &[u8]| {
                reader(&built, coding.key.as_ref()).read(part, Lba(5), stored).is_ok()
            };
            prop_assert!(!read(&stored));
            if coding.key.is_some() && at >= 4 {
                mend_checksum(&built, Lba(5), part.frame, &mut stored);
                prop_assert!(!read(&stored));
            }
        }
    }

    /// The same for a frame of any content with a right checksum: no reader panics.
    #[test]
    fn no_frame_panics(at: prop::sample::Index, change in vec(any::<u8>(), 1..20)) {
        for coding in codings() {
            let built = coded(&coding, Lba(8), &mixed(4, 0, 9));
            let (part, mut stored) = part(&built, &built.placed[0]);
            let at = at.index(stored.len());
            for (into, change) in stored[at..].iter_mut().zip(&change) {
                *into = *change;
            }
            let len = part.frames().next().map_or(0, |frame| frame.bytes().end) as usize;
            let len = len - part.frame as usize;
            mend_checksum(&built, Lba(8), part.frame, &mut stored[..len]);
            let _ = reader(&built, coding.key.as_ref()).read(part, Lba(8), &stored);
        }
    }
}
