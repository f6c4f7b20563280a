//! The bodies of the fuzzers of what is stored, as plain functions: no input may make one fail, and
//! what is read is written as the same bytes. Checksums are made right first, since no fuzzer finds
//! one. Each function returns whether its bytes were taken, so that a test can check the quality of
//! its inputs.

use super::code::Reader;
use super::codec::Codec;
use super::frame::{self, Content, FrameId, FrameReader};
use super::object::{ENTRY_BYTES, Entry, HEADER_BYTES, Header, LEAF_BLOCKS, ObjectId};
use super::page::{self, PAGE_BYTES, Page};
use super::record::{Record, SEALED};
use super::root::{Root, SIZE_MAX};
use super::segment::{Seed, SegmentHeader};
use super::superblock::Superblock;
use super::{Directory, directory};
use crate::cipher::TAG_BYTES;
use crate::ids::{Epoch, Lba, Seq, VolumeId};

const VOLUME: VolumeId = VolumeId([1; 16]);
/// The object that parts of the map are in.
const OBJECT: ObjectId = ObjectId { epoch: Epoch(7), seq: Seq(46) };
/// The place of a frame in its object.
const AT: u32 = 176;

/// A root. Its length is made right too.
#[must_use]
pub fn root(data: &[u8]) -> bool {
    let mut bytes = data.to_vec();
    let len = bytes.len() as u32;
    if let Some(stated) = bytes.get_mut(16..20) {
        stated.copy_from_slice(&len.to_le_bytes());
    }
    if let Some((body, crc)) = bytes.split_last_chunk_mut() {
        *crc = crc32fast::hash(body).to_le_bytes();
    }
    let Ok(root) = Root::decode(&bytes) else { return false };
    let again = root.encode();
    assert_eq!(Root::decode(&again).as_ref(), Ok(&root), "what is written is read");
    // Fields of later versions are not kept, so the length and the checksum may differ.
    let end = again.len() - 4;
    assert_eq!((&again[..16], &again[20..end]), (&bytes[..16], &bytes[20..end]));
    true
}

/// A log object: its header, and its index behind it.
#[must_use]
pub fn object(data: &[u8]) -> bool {
    let mut bytes = data.to_vec();
    if let Some((header, rest)) = bytes.split_at_mut_checked(HEADER_BYTES) {
        let entries = u32::from_le_bytes([header[104], header[105], header[106], header[107]]);
        let index = rest.get(..(entries as usize).saturating_mul(ENTRY_BYTES));
        let crc = crc32fast::hash(index.unwrap_or_default());
        header[112..116].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32fast::hash(&header[..HEADER_BYTES - 4]);
        header[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    }
    let Ok(header) = Header::decode(&bytes) else { return false };
    assert_eq!(header.encode(), bytes[..HEADER_BYTES]);
    let Some(index) = bytes.get(HEADER_BYTES..header.index_end()) else { return false };
    let Ok(entries) = header.decode_index(index) else { return false };
    let mut again = Vec::with_capacity(index.len());
    entries.iter().for_each(|entry: &Entry| entry.put(&mut again));
    assert_eq!(again, index);
    true
}

/// A frame.
#[must_use]
pub fn frame(data: &[u8]) -> bool {
    let id = FrameId { volume: VOLUME, object: OBJECT, at: AT, lba: Lba(5) };
    let mut bytes = data.to_vec();
    if let Some((crc, rest)) = bytes.split_first_chunk_mut() {
        *crc = frame::checksum(id, rest).to_le_bytes();
    }
    let mut reader = FrameReader::new(VOLUME, OBJECT, None);
    let Ok((blocks, content)) = reader.decode(id, &bytes) else { return false };
    // Others may have compressed it better.
    if Codec::of(bytes[8]) == Ok(Codec::Plain) {
        let content = Content { codec: Codec::Plain, blocks, bytes: &content };
        let mut again = Vec::new();
        frame::put(&mut again, id, None, &content);
        assert_eq!(again, bytes);
    }
    true
}

/// The content of a directory's frame.
#[must_use]
pub fn directory(data: &[u8]) -> bool {
    let Ok(directory) = Directory::decode(data, OBJECT.seq) else { return false };
    assert_eq!(directory.encode(), data);
    true
}

/// The content of a leaf's frame, behind two bytes that say which leaf it is.
#[must_use]
pub fn leaf(data: &[u8]) -> bool {
    let mut reader = Reader::new(data);
    let number = match reader.u16().map(u64::from) {
        Ok(number @ ..0x8000) => number,
        // Those at the end of the largest volume.
        Ok(number) => SIZE_MAX / LEAF_BLOCKS - (number - 0x8000),
        Err(_) => return false,
    };
    let content = reader.rest();
    let Ok(runs) = directory::decode_leaf(number, OBJECT.seq, content) else { return false };
    assert_eq!(directory::encode_leaf(number, &runs), content);
    true
}

/// The first page of a record of the journal.
#[must_use]
pub fn record(data: &[u8]) -> bool {
    let mut page = page_of(data);
    let number = page::u64_at(&page, 64);
    let seed = Seed::new(VOLUME, page::bytes_at(&page, 48), number, None);
    let crc = seed.crc(&page[12..]);
    page::put_u32(&mut page, 8, crc);
    let found = Record::decode(&page, 9, &seed);
    assert_eq!(Record::decode_any(&page, VOLUME), found.clone().map(|record| (number, record)));
    let Some(record) = found else { return false };
    // Tags are left out without a key.
    let end = PAGE_BYTES - TAG_BYTES;
    if page::u32_at(&page, 12) != SEALED {
        assert_eq!(record.encode(&seed, 9)[12..end], page[12..end]);
    }
    true
}

/// The first page of a segment of the journal.
#[must_use]
pub fn segment(data: &[u8]) -> bool {
    let mut page = page_of(data);
    let crc = crc32fast::hash(&page[12..]);
    page::put_u32(&mut page, 8, crc);
    let Ok(header) = SegmentHeader::decode(&page) else { return false };
    assert_eq!(header.encode(), page);
    true
}

/// The first line of the superblock of a journal.
#[must_use]
pub fn superblock(data: &[u8]) -> bool {
    let line: Vec<u8> = data.iter().copied().take_while(|byte| *byte != b'\n').collect();
    let crc = format!("\n{:08x}\n", crc32fast::hash(&line));
    let text = [line, crc.into_bytes()].concat();
    let parse = |text: &[u8]| {
        let stored = sheave_durable::of_text(text).ok()?;
        Superblock::of_stored("superblock".as_ref(), stored).ok()
    };
    let Some(superblock) = parse(&text) else { return false };
    let again = sheave_durable::to_text(&superblock.to_stored()).expect("it is written as text");
    assert_eq!(parse(again.as_bytes()), Some(superblock));
    true
}

fn page_of(data: &[u8]) -> Page {
    let mut page = [0; PAGE_BYTES];
    let count = data.len().min(PAGE_BYTES);
    page[..count].copy_from_slice(&data[..count]);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tests as example;
    use crate::format::{FRAME_HEADER_BYTES, record};
    use crate::ids::{Incarnation, Lsn, Opening};

    const RUNS: u64 = 20_000;

    /// A small generator of random numbers (splitmix64).
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ z >> 31) % bound as u64) as usize
        }
    }

    /// The same bytes, changed in up to three places of their first `reach`.
    fn changed(random: &mut Random, bytes: &[u8], reach: usize) -> Vec<u8> {
        let mut out = bytes.to_vec();
        for _ in 0..random.below(4) {
            let at = random.below(out.len().clamp(1, reach));
            let len = random.below(8).min(out.len() - at);
            match random.below(6) {
                0 => out.truncate(at),
                1 => drop(out.drain(at..at + len)),
                2 => drop(out.splice(at..at, vec![0; len])),
                3 => drop(out.splice(at..at, out[at..at + len].to_vec())),
                _ if at == out.len() => out.push(random.below(256) as u8),
                4 => out[at] ^= 1 << random.below(8),
                _ => out[at] = random.below(256) as u8,
            }
        }
        out
    }

    fn run(body: fn(&[u8]) -> bool, bytes: &[u8], reach: usize) {
        assert!(body(bytes), "as it is, it is taken");
        let taken = (0..RUNS)
            .filter(|seed| {
                let input = changed(&mut Random(*seed), bytes, reach);
                std::panic::catch_unwind(|| body(&input)).unwrap_or_else(|_| panic!("seed {seed}"))
            })
            .count() as u64;
        assert!(taken > RUNS / 10 && taken < RUNS, "{taken} inputs were taken");
    }

    #[test]
    fn changed_roots_and_objects_are_refused_or_read_as_they_are() {
        run(root, &example::root().encode(), usize::MAX);
        let built = example::object();
        run(object, &built.body, built.header.index_end());
        let built = example::moves();
        run(object, &built.body, built.header.index_end());
        run(frame, &built.body[built.header.index_end()..][..16 + 4096], 20);
    }

    #[test]
    fn changed_parts_of_the_map_are_refused_or_read_as_they_are() {
        run(directory, &example::directory().encode(), usize::MAX);
        let mut runs = directory::encode_leaf(1, &example::leaf_runs());
        // Their addresses are relative to the leaf.
        runs.splice(0..0, [0, 0]);
        run(leaf, &runs, usize::MAX);
        const { assert!(FRAME_HEADER_BYTES < 20, "changes reach the content of a frame") };
    }

    #[test]
    fn changed_journals_are_refused_or_read_as_they_are() {
        let opening = Opening { epoch: Epoch(7), incarnation: Incarnation([9; 16]) };
        let header = SegmentHeader {
            volume: VOLUME,
            opening,
            number: 3,
            salt: [7; 16],
            first: Lsn(4),
            durable: Lsn(3),
            committed: Lsn(2),
        };
        run(segment, &header.encode(), 120);
        let span = crate::extents::Span { start: 9, blocks: 2 };
        let entry = record::Entry::Write { span, checks: vec![record::Check::default(); 2] };
        let write = Record { lsn: Lsn(5), durable: Lsn(4), entry };
        run(record, &write.encode(&header.seed(None), 9), 120);
        let current = Superblock { volume: VOLUME, current: Some(opening), adopting: None };
        let text = sheave_durable::to_text(&current.to_stored()).unwrap();
        run(superblock, text.as_bytes(), usize::MAX);
    }
}
