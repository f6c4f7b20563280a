//! Makes log objects.

use bytes::Bytes;

use super::code::Wrong;
use super::codec::Codec;
use super::directory::{self, Directory, Run};
use super::frame::{self, Coding, Content, FrameId, FrameReader, ObjectKey};
use super::object::{
    ENTRIES_MAX, ENTRY_BYTES, Entry, HEADER_BYTES, Head, Header, LEAF_BLOCKS, OBJECT_BYTES_MAX,
    ObjectId,
};
use super::root::{FramePlace, Reach};
use super::run::Form;
use crate::ids::{BLOCK_BYTES, Blocks, Incarnation, Lba, Lsn, Place, Seq, VolumeId};

/// What all objects of an opening have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Author {
    /// The volume.
    pub volume: VolumeId,
    /// The opening's part of the log.
    pub reach: Reach,
    /// The newest epoch before it which has objects.
    pub previous: Option<Reach>,
    /// The opening.
    pub incarnation: Incarnation,
    /// How it makes frames.
    pub coding: Coding,
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
    /// The object in which they were, of blocks that are only moved.
    pub from: Option<Seq>,
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

impl Built {
    /// A copy of its header and index, for a checkpoint behind it.
    #[must_use]
    pub fn head(&self) -> Bytes {
        Bytes::copy_from_slice(&self.body[..self.header.index_end()])
    }
}

/// An object that is being made.
pub struct ObjectBuilder {
    header: Header,
    codec: Codec,
    key: Option<ObjectKey>,
    out: Vec<u8>,
    entries: Vec<Entry>,
    placed: Vec<Placed>,
    scratch: Vec<u8>,
    /// The object from which blocks are moved.
    from: Option<Seq>,
}

impl ObjectBuilder {
    /// An object of at most that many entries ([`Coding::entries`]).
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
        let Coding { codec, key } = &author.coding;
        let key = key.as_ref().map(|key| ObjectKey::new(key, author.volume, id));
        let entries = Vec::with_capacity(entries);
        let (placed, scratch) = (Vec::new(), Vec::new());
        Self { header, codec: *codec, key, out, entries, placed, scratch, from: None }
    }

    /// Appends blocks.
    ///
    /// # Panics
    /// When they are not whole blocks, or the object becomes too long.
    pub fn write(&mut self, lba: Lba, data: &[u8]) {
        let blocks = data.len() as u64 / BLOCK_BYTES;
        assert!(data.len() as u64 == blocks * BLOCK_BYTES, "{} bytes of blocks", data.len());
        let at = |block: Lba| ((block.0 - lba.0) * BLOCK_BYTES) as usize;
        let mut scratch = std::mem::take(&mut self.scratch);
        // What is not packed is one run with what is not packed before it.
        let mut begin = lba;
        for (group, blocks) in self.codec.groups(lba, blocks) {
            let next = Lba(group.0 + blocks);
            if let Some(bytes) = self.codec.pack(&data[at(group)..at(next)], &mut scratch) {
                self.put_plain(begin, &data[at(begin)..at(group)]);
                let content = Content { codec: self.codec, blocks: blocks as u8, bytes };
                let frame = self.put_frame(group, &content);
                let bytes = self.out.len() as u32 - frame;
                self.put_run(group, blocks, (frame, Form::Packed(bytes as u16)));
                begin = next;
            }
        }
        self.put_plain(begin, &data[at(begin)..]);
        self.scratch = scratch;
    }

    /// Appends blocks that were in another object. All others of this one are moved, too.
    ///
    /// # Panics
    /// As for [`Self::write`].
    pub fn moved(&mut self, lba: Lba, data: &[u8], from: Seq) {
        self.from = Some(from);
        self.write(lba, data);
    }

    /// Appends blocks that are stored as they are, each in a frame of its own.
    fn put_plain(&mut self, lba: Lba, data: &[u8]) {
        let frame = self.out.len() as u32;
        for (block, bytes) in (lba.0..).map(Lba).zip(data.chunks(BLOCK_BYTES as usize)) {
            self.put_frame(block, &Content { codec: Codec::Plain, blocks: 1, bytes });
        }
        if !data.is_empty() {
            let form = Form::of_blocks(self.key.is_some());
            self.put_run(lba, data.len() as u64 / BLOCK_BYTES, (frame, form));
        }
    }

    /// Notes a run whose frames are there.
    fn put_run(&mut self, lba: Lba, blocks: Blocks, (frame, form): (u32, Form)) {
        let (seq, from, run) = (self.header.id.seq, self.from, blocks as u32);
        self.entries.push(match from {
            None => Entry::Write { lba, blocks: run, frame, form },
            Some(from) => {
                let back = (seq.0 - from.0) as u32;
                Entry::Move { lba, blocks: run, back, frame, form }
            }
        });
        let place = Place::Object { seq, frame, form, skip: 0, run };
        self.placed.push(Placed { lba, blocks, place, from });
    }

    /// Appends a frame. Returns where it is.
    fn put_frame(&mut self, lba: Lba, content: &Content<'_>) -> u32 {
        let Header { volume, id, .. } = self.header;
        let at = self.out.len() as u32;
        let id = FrameId { volume, object: id, at, lba };
        frame::put(&mut self.out, id, self.key.as_ref(), content);
        assert!(self.out.len() as u64 <= OBJECT_BYTES_MAX, "an object is too long");
        at
    }

    /// Appends blocks that are zeroes.
    pub fn zero(&mut self, lba: Lba, blocks: Blocks) {
        self.entries.push(Entry::Zero { lba, blocks });
        self.placed.push(Placed { lba, blocks, place: Place::Zero, from: None });
    }

    /// Appends a leaf. Returns where it is.
    pub fn leaf(&mut self, number: u64, runs: &[Run]) -> FramePlace {
        let content = directory::encode_leaf(number, runs);
        let place = self.map_frame(Lba(number * LEAF_BLOCKS), &content);
        self.entries.push(Entry::Leaf { number, frame: place.at, bytes: place.bytes });
        place
    }

    /// Appends the directory of a checkpoint, as its last entry, and behind it the heads of all
    /// objects between what it has and this one, as [`Built::head`] gives them. Returns where both
    /// are.
    ///
    /// # Panics
    /// When it has objects from this one on, other heads are given, or the object becomes too long.
    pub fn directory(&mut self, directory: &Directory, heads: &[Bytes]) -> FramePlace {
        let covered = directory.covered.seq;
        let between = self.header.id.seq.0.checked_sub(covered.0 + 1);
        assert_eq!(between, Some(heads.len() as u64), "heads of the objects between");
        let mut place = self.map_frame(DIRECTORY_LBA, &directory.encode());
        heads.iter().for_each(|head| self.out.extend_from_slice(head));
        assert!(self.out.len() as u64 <= OBJECT_BYTES_MAX, "an object is too long");
        place.bytes = self.out.len() as u32 - place.at;
        self.entries.push(Entry::Directory { covered, frame: place.at, bytes: place.bytes });
        place
    }

    fn map_frame(&mut self, lba: Lba, content: &[u8]) -> FramePlace {
        let content = Content { codec: Codec::Plain, blocks: 0, bytes: content };
        let at = self.put_frame(lba, &content);
        FramePlace { seq: self.header.id.seq, at, bytes: self.out.len() as u32 - at }
    }

    /// The object, which has the writes from `lsn_first` to `lsn_last`.
    ///
    /// # Panics
    /// When it has more entries than it was made for, or none.
    #[must_use]
    pub fn finish(self, lsn_first: Lsn, lsn_last: Lsn) -> Built {
        let Self { mut header, mut out, entries, placed, .. } = self;
        let most = header.entries as usize;
        assert!((1..=most).contains(&entries.len()), "{} entries for {most}", entries.len());
        header.entries = entries.len() as u32;
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

/// The directory of a checkpoint, and the heads of the objects between what it has and itself, from
/// the bytes of both.
///
/// # Errors
/// What is wrong with them.
pub fn decode_directory(
    mut reader: FrameReader<'_>,
    at: u32,
    stored: &[u8],
) -> Result<(Directory, Vec<Head>), Wrong> {
    let object = reader.object();
    let (frame, mut rest) = frame::split_first(stored)?;
    let content = reader.read_map((at, DIRECTORY_LBA), frame)?;
    let directory = Directory::decode(&content, object.seq)?;
    let between = directory.covered.seq.0 + 1..object.seq.0;
    let id = |seq| ObjectId { epoch: object.epoch, seq: Seq(seq) };
    let heads = between.map(|seq| Head::take(&mut rest, id(seq))).collect::<Result<_, _>>()?;
    match rest.is_empty() {
        true => Ok((directory, heads)),
        false => Err(Wrong::Damaged("it has more than it states")),
    }
}

/// The runs of a leaf, from the bytes of its frame.
///
/// # Errors
/// What is wrong with them.
pub fn decode_leaf(
    mut reader: FrameReader<'_>,
    (number, at): (u64, u32),
    stored: &[u8],
) -> Result<Vec<Run>, Wrong> {
    let content = reader.read_map((at, Lba(number * LEAF_BLOCKS)), stored)?;
    directory::decode_leaf(number, reader.object().seq, &content)
}
