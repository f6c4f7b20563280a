//! Makes log objects.

use bytes::Bytes;

use super::code::Wrong;
use super::directory::{self, Directory, Run};
use super::frame::{self, FRAME_BLOCKS, FrameId};
use super::object::{
    ENTRIES_MAX, ENTRY_BYTES, Entry, HEADER_BYTES, Header, LEAF_BLOCKS, OBJECT_BYTES_MAX, ObjectId,
};
use super::root::{FramePlace, Reach};
use crate::ids::{BLOCK_BYTES, Blocks, Incarnation, Lba, Lsn, Place, Seq, VolumeId};

/// What all objects of an opening have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Author {
    /// The volume.
    pub volume: VolumeId,
    /// The opening's part of the log.
    pub reach: Reach,
    /// The newest epoch before it which has objects.
    pub previous: Option<Reach>,
    /// The opening.
    pub incarnation: Incarnation,
}

/// Blocks, and where they are after a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The first block.
    pub lba: Lba,
    /// Their count.
    pub blocks: Blocks,
    /// Where the first one is.
    pub place: Place,
}

/// A finished object.
#[derive(Clone, Debug)]
pub struct Built {
    /// Its header.
    pub header: Header,
    /// All of it.
    pub body: Bytes,
    /// Where its blocks are, in the order of its entries.
    pub placed: Vec<Placed>,
}

/// An object that is being made.
#[derive(Debug)]
pub struct ObjectBuilder {
    header: Header,
    out: Vec<u8>,
    entries: Vec<Entry>,
    placed: Vec<Placed>,
}

impl ObjectBuilder {
    /// An object of exactly that many entries.
    ///
    /// # Panics
    /// When that are none or more than [`ENTRIES_MAX`].
    #[must_use]
    pub fn new(author: &Author, seq: Seq, entries: usize, bytes: usize) -> Self {
        assert!((1..=ENTRIES_MAX).contains(&entries), "{entries} entries");
        let id = ObjectId { epoch: author.reach.epoch, seq };
        let header = Header {
            volume: author.volume,
            id,
            incarnation: author.incarnation,
            lsn_first: Lsn(0),
            lsn_last: Lsn(0),
            epoch_first: author.reach.first,
            previous: author.previous,
            entries: entries as u32,
            bytes: 0,
            index_crc: 0,
        };
        let mut out = Vec::with_capacity(header.index_end() + bytes);
        out.resize(header.index_end(), 0);
        Self { header, out, entries: Vec::with_capacity(entries), placed: Vec::new() }
    }

    /// Appends blocks.
    ///
    /// # Panics
    /// When they are not whole blocks, or the object becomes too long.
    pub fn write(&mut self, lba: Lba, data: &[u8]) {
        let frame = self.out.len() as u32;
        let blocks = data.len() as u64 / BLOCK_BYTES;
        let mut block = lba;
        for part in data.chunks((FRAME_BLOCKS * BLOCK_BYTES) as usize) {
            let at = self.out.len() as u32;
            let id = FrameId { volume: self.header.volume, object: self.header.id, at, lba: block };
            frame::put(&mut self.out, id, part);
            block = Lba(block.0 + part.len() as u64 / BLOCK_BYTES);
        }
        assert!(self.out.len() as u64 <= OBJECT_BYTES_MAX, "an object is too long");
        let run = blocks as u32;
        self.entries.push(Entry::Write { lba, blocks: run, frame });
        let place = Place::Object { seq: self.header.id.seq, frame, skip: 0, run };
        self.placed.push(Placed { lba, blocks, place });
    }

    /// Appends blocks that are zeroes.
    pub fn zero(&mut self, lba: Lba, blocks: Blocks) {
        self.entries.push(Entry::Zero { lba, blocks });
        self.placed.push(Placed { lba, blocks, place: Place::Zero });
    }

    /// Appends a leaf. Returns where it is.
    pub fn leaf(&mut self, number: u64, runs: &[Run]) -> FramePlace {
        let content = directory::encode_leaf(number, runs);
        let place = self.map_frame(Lba(number * LEAF_BLOCKS), &content);
        self.entries.push(Entry::Leaf { number, frame: place.at, bytes: place.bytes });
        place
    }

    /// Appends the directory of a checkpoint, as its last entry. Returns where it is.
    ///
    /// # Panics
    /// When it has objects from this one on, or the object becomes too long.
    pub fn directory(&mut self, directory: &Directory) -> FramePlace {
        let covered = directory.covered.seq;
        assert!(covered < self.header.id.seq, "a checkpoint has objects before it");
        let place = self.map_frame(DIRECTORY_LBA, &directory.encode());
        self.entries.push(Entry::Directory { covered, frame: place.at, bytes: place.bytes });
        place
    }

    fn map_frame(&mut self, lba: Lba, content: &[u8]) -> FramePlace {
        let Header { volume, id, .. } = self.header;
        let at = self.out.len() as u32;
        frame::put_map(&mut self.out, FrameId { volume, object: id, at, lba }, content);
        assert!(self.out.len() as u64 <= OBJECT_BYTES_MAX, "an object is too long");
        FramePlace { seq: id.seq, at, bytes: self.out.len() as u32 - at }
    }

    /// The object, which has the writes from `lsn_first` to `lsn_last`.
    ///
    /// # Panics
    /// When it has another count of entries than it was made for.
    #[must_use]
    pub fn finish(self, lsn_first: Lsn, lsn_last: Lsn) -> Built {
        let Self { mut header, mut out, entries, placed } = self;
        assert_eq!(entries.len(), header.entries as usize, "all entries are there");
        let mut index = Vec::with_capacity(entries.len() * ENTRY_BYTES);
        entries.iter().for_each(|entry| entry.put(&mut index));
        header.index_crc = crc32fast::hash(&index);
        header.bytes = out.len() as u32;
        (header.lsn_first, header.lsn_last) = (lsn_first, lsn_last);
        out[..HEADER_BYTES].copy_from_slice(&header.encode());
        out[HEADER_BYTES..HEADER_BYTES + index.len()].copy_from_slice(&index);
        Built { header, body: out.into(), placed }
    }
}

/// The fence of an epoch at a number: no object of that epoch from there on counts. `committed` is
/// the last write before it.
#[must_use]
pub fn fence(closed: &Author, seq: Seq, committed: Lsn) -> Built {
    let mut builder = ObjectBuilder::new(closed, seq, 1, 0);
    builder.entries.push(Entry::Fence);
    builder.finish(committed.next(), committed)
}

/// The address in the frame of a directory, which no block has.
const DIRECTORY_LBA: Lba = Lba(u64::MAX);

/// The directory of a checkpoint, from the bytes of its frame.
///
/// # Errors
/// What is wrong with them.
pub fn decode_directory(
    volume: VolumeId,
    object: ObjectId,
    at: u32,
    stored: &[u8],
) -> Result<Directory, Wrong> {
    let id = FrameId { volume, object, at, lba: DIRECTORY_LBA };
    Directory::decode(frame::decode_map(id, stored)?, object.seq)
}

/// The runs of a leaf, from the bytes of its frame.
///
/// # Errors
/// What is wrong with them.
pub fn decode_leaf(
    volume: VolumeId,
    object: ObjectId,
    (number, at): (u64, u32),
    stored: &[u8],
) -> Result<Vec<Run>, Wrong> {
    let lba = Lba(number * LEAF_BLOCKS);
    directory::decode_leaf(
        number,
        object.seq,
        frame::decode_map(FrameId { volume, object, at, lba }, stored)?,
    )
}
