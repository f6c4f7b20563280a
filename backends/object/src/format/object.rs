//! Log objects: header, index, frames.

use super::build::Placed;
use super::code::{Reader, Wrong, put_kind, take_kind};
use super::root::{NUMBER_MAX, Reach, SIZE_MAX, put_previous, take_previous};
use super::run::Form;
use crate::ids::{BLOCK_BYTES, Blocks, Epoch, Incarnation, Lba, Lsn, Place, Seq, VolumeId};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 128;
/// Bytes of an entry of the index.
pub const ENTRY_BYTES: usize = 24;
/// The most bytes of an object.
pub const OBJECT_BYTES_MAX: u64 = 64 << 20;
/// The most entries of an object.
pub const ENTRIES_MAX: usize = 1 << 16;
const MAGIC: [u8; 8] = *b"SHVLOG\r\n";

/// The header of a log object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The volume.
    pub volume: VolumeId,
    /// Its epoch and number, as its key has them.
    pub id: ObjectId,
    /// The opening that has made it. That of a fence is a later one than that of the epoch.
    pub incarnation: Incarnation,
    /// The first write in it.
    pub lsn_first: Lsn,
    /// The last write in it. It is the one before the first in an object without writes.
    pub lsn_last: Lsn,
    /// The first object of its epoch.
    pub epoch_first: Seq,
    /// The newest epoch before its own which has objects.
    pub previous: Option<Reach>,
    /// Entries of the index.
    pub entries: u32,
    /// Bytes of the object.
    pub bytes: u32,
    /// CRC-32 of the index.
    pub index_crc: u32,
}

/// The name of a log object in its volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// The epoch that made it, or that it ends.
    pub epoch: Epoch,
    /// Its number.
    pub seq: Seq,
}

/// An entry of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Blocks that are in frames of this object, which follow one another.
    Write {
        /// The first block.
        lba: Lba,
        /// Their count.
        blocks: u32,
        /// Where the first frame begins in the object, in bytes.
        frame: u32,
        /// How they are in frames.
        form: Form,
    },
    /// The same blocks as before, which were in another object. It takes effect for those of
    /// which the map still has that, above its leaves, or has nothing there.
    Move {
        /// The first block.
        lba: Lba,
        /// Their count.
        blocks: u32,
        /// How many objects before this one that one is.
        back: u32,
        /// Where the first frame begins in this object, in bytes.
        frame: u32,
        /// How they are in frames.
        form: Form,
    },
    /// Blocks that are zeroes.
    Zero {
        /// The first block.
        lba: Lba,
        /// Their count.
        blocks: Blocks,
    },
    /// The end of its epoch, whose objects are below this one. It is the only entry.
    Fence,
    /// A leaf: where the blocks of a part of the volume are.
    Leaf {
        /// Its number: the blocks from [`LEAF_BLOCKS`] times that on.
        number: u64,
        /// Where its frame begins in the object, in bytes.
        frame: u32,
        /// The length of the frame in bytes.
        bytes: u32,
    },
    /// A directory: where all blocks are that objects up to one have. It is the last entry, and all
    /// others are leaves.
    Directory {
        /// All objects up to this one are in it.
        covered: Seq,
        /// Where its frame begins in the object, in bytes.
        frame: u32,
        /// The length of the frame in bytes.
        bytes: u32,
    },
}

/// Header and index of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The header.
    pub header: Header,
    /// The entries of the index.
    pub entries: Vec<Entry>,
}

impl Head {
    /// Takes those of an object from the front of bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(super) fn take(bytes: &mut &[u8], id: ObjectId) -> Result<Self, Wrong> {
        let header = Header::decode(bytes)?;
        let (head, rest) = bytes
            .split_at_checked(header.index_end())
            .ok_or(Wrong::Damaged("it ends too early"))?;
        *bytes = rest;
        match header.id == id {
            true => Ok(Self { header, entries: header.decode_index(&head[HEADER_BYTES..])? }),
            false => Err(Wrong::Damaged("the head of another object is in the place of one")),
        }
    }
}

/// The blocks of a leaf: 16 MiB.
pub const LEAF_BLOCKS: u64 = 4096;

const NUMBERS: Wrong = Wrong::Damaged("an entry has numbers that it must not have");

const WRITE: u8 = 1;
const ZERO: u8 = 2;
const FENCE: u8 = 3;
const MOVE: u8 = 4;
const LEAF: u8 = 5;
const DIRECTORY: u8 = 6;

impl Header {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        put_kind(&mut out, MAGIC);
        out.extend(self.volume.0);
        out.extend(self.id.epoch.0.to_le_bytes());
        out.extend(self.id.seq.0.to_le_bytes());
        out.extend(self.incarnation.0);
        for number in [self.lsn_first.0, self.lsn_last.0, self.epoch_first.0] {
            out.extend(number.to_le_bytes());
        }
        put_previous(&mut out, self.previous);
        for number in [self.entries, self.bytes, self.index_crc] {
            out.extend(number.to_le_bytes());
        }
        out.extend([0; 8]);
        out.extend(crc32fast::hash(&out).to_le_bytes());
        assert_eq!(out.len(), HEADER_BYTES, "the fields fill the header");
        out
    }

    /// Reads it from the begin of an object.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, Wrong> {
        check_header(bytes)?;
        let mut reader = Reader::new(bytes);
        take_kind(&mut reader, MAGIC)?;
        let volume = VolumeId(reader.array()?);
        let id = ObjectId { epoch: Epoch(reader.u64()?), seq: Seq(reader.u64()?) };
        let incarnation = Incarnation(reader.array()?);
        let [lsn_first, lsn_last] = [Lsn(reader.u64()?), Lsn(reader.u64()?)];
        let epoch_first = Seq(reader.u64()?);
        let previous = take_previous(&mut reader)?;
        let [entries, len, index_crc] = [reader.u32()?, reader.u32()?, reader.u32()?];
        reader.zeroes(8)?;
        let numbers = [id.epoch.0, id.seq.0, lsn_first.0, lsn_last.0, epoch_first.0];
        let before_first = Lsn(lsn_first.0.saturating_sub(1));
        let is_right = numbers.iter().all(|number| *number <= NUMBER_MAX)
            && (1..=id.seq.0).contains(&epoch_first.0)
            && lsn_last >= before_first
            && previous
                .is_none_or(|previous| previous.epoch < id.epoch && previous.first < epoch_first)
            && (1..=ENTRIES_MAX).contains(&(entries as usize))
            && (HEADER_BYTES + entries as usize * ENTRY_BYTES) as u64 <= u64::from(len)
            && u64::from(len) <= OBJECT_BYTES_MAX;
        if !is_right {
            return Err(Wrong::Damaged("the fields of its header contradict one another"));
        }
        Ok(Self {
            volume,
            id,
            incarnation,
            lsn_first,
            lsn_last,
            epoch_first,
            previous,
            entries,
            bytes: len,
            index_crc,
        })
    }

    /// Where its frames begin, which is where its index ends.
    #[must_use]
    pub fn index_end(&self) -> usize {
        HEADER_BYTES + self.entries as usize * ENTRY_BYTES
    }

    /// The part of the log that its epoch has.
    #[must_use]
    pub fn reach(&self) -> Reach {
        Reach { epoch: self.id.epoch, first: self.epoch_first }
    }

    /// Reads the entries from the index, which is behind the header.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode_index(&self, index: &[u8]) -> Result<Vec<Entry>, Wrong> {
        if index.len() != self.entries as usize * ENTRY_BYTES {
            return Err(Wrong::Damaged("its index ends too early"));
        }
        if crc32fast::hash(index) != self.index_crc {
            return Err(Wrong::Damaged("the checksum of its index is wrong"));
        }
        let mut reader = Reader::new(index);
        let mut entries = Vec::with_capacity(self.entries as usize);
        while !reader.is_empty() {
            let entry = Entry::take(&mut reader)?;
            self.check_entry(&entry)?;
            entries.push(entry);
        }
        self.check_kinds(&entries)?;
        Ok(entries)
    }

    /// Checks that fences, checkpoints and objects with moves have nothing else.
    fn check_kinds(&self, entries: &[Entry]) -> Result<(), Wrong> {
        let is_write = |entry: &Entry| matches!(entry, Entry::Write { .. } | Entry::Zero { .. });
        let is_move = |entry: &Entry| matches!(entry, Entry::Move { .. });
        let is_leaf = |entry: &Entry| matches!(entry, Entry::Leaf { .. });
        let is_right = match entries {
            [Entry::Fence] => self.lsn_last < self.lsn_first,
            [leaves @ .., Entry::Directory { .. }] => {
                self.lsn_last < self.lsn_first && leaves.iter().all(is_leaf)
            }
            [Entry::Move { .. }, ..] => {
                self.lsn_last < self.lsn_first && entries.iter().all(is_move)
            }
            _ => entries.iter().all(is_write),
        };
        match is_right {
            true => Ok(()),
            false => Err(Wrong::Damaged("its index has entries that cannot be in one object")),
        }
    }

    /// Checks that an entry is within the volume and the object.
    fn check_entry(&self, entry: &Entry) -> Result<(), Wrong> {
        let (is_right, lba, blocks) = match *entry {
            Entry::Fence => return Ok(()),
            Entry::Directory { covered, frame, bytes } => {
                let end = u64::from(frame) + u64::from(bytes);
                let is_inside = frame as usize >= self.index_end() && end <= u64::from(self.bytes);
                (is_inside && covered < self.id.seq, Lba(0), 1)
            }
            Entry::Leaf { number, frame, bytes } => {
                let end = u64::from(frame) + u64::from(bytes);
                let is_inside = frame as usize >= self.index_end() && end <= u64::from(self.bytes);
                (is_inside, Lba(number.saturating_mul(LEAF_BLOCKS)), 1)
            }
            Entry::Zero { lba, blocks } => (true, lba, blocks),
            Entry::Move { back, .. } if !(1..self.id.seq.0).contains(&u64::from(back)) => {
                (false, Lba(0), 1)
            }
            Entry::Write { lba, blocks, frame, form }
            | Entry::Move { lba, blocks, frame, form, .. } => {
                let end = u64::from(frame) + form.run_bytes(u64::from(blocks));
                let is_inside = frame as usize >= self.index_end() && end <= u64::from(self.bytes);
                (is_inside, lba, u64::from(blocks))
            }
        };
        let end = lba.0.saturating_add(blocks);
        match is_right && blocks > 0 && end <= SIZE_MAX {
            true => Ok(()),
            false => Err(Wrong::Damaged("an entry of its index leads outside")),
        }
    }
}

/// Checks that these are the bytes of a header of any version.
fn check_header(bytes: &[u8]) -> Result<(), Wrong> {
    let header = bytes.first_chunk::<HEADER_BYTES>();
    let header = header.ok_or(Wrong::Damaged("it ends too early"))?;
    let (body, crc) = header.split_at(HEADER_BYTES - 4);
    if !body.starts_with(&MAGIC) {
        return Err(Wrong::Damaged("it does not begin as it must"));
    }
    match crc32fast::hash(body).to_le_bytes() == crc {
        true => Ok(()),
        false => Err(Wrong::Damaged("the checksum of its header is wrong")),
    }
}

impl Entry {
    /// Which blocks it changes, and where they are then, in the object of that number.
    #[must_use]
    pub fn placed(&self, seq: Seq) -> Option<Placed> {
        match *self {
            Self::Fence | Self::Leaf { .. } | Self::Directory { .. } => None,
            Self::Zero { lba, blocks } => {
                Some(Placed { lba, blocks, place: Place::Zero, from: None })
            }
            Self::Write { lba, blocks: run, frame, form }
            | Self::Move { lba, blocks: run, frame, form, .. } => {
                let place = Place::Object { seq, frame, form, skip: 0, run };
                let from = match *self {
                    Self::Move { back, .. } => Some(Seq(seq.0 - u64::from(back))),
                    _ => None,
                };
                Some(Placed { lba, blocks: u64::from(run), place, from })
            }
        }
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let form = match self {
            Self::Write { form, .. } | Self::Move { form, .. } => form.number(),
            _ => 0,
        };
        let (kind, frame, lba, blocks) = match *self {
            Self::Write { lba, blocks, frame, .. } => (WRITE, frame, lba, u64::from(blocks)),
            Self::Move { lba, blocks, back, frame, .. } => {
                (MOVE, frame, lba, u64::from(back) << 32 | u64::from(blocks))
            }
            Self::Zero { lba, blocks } => (ZERO, 0, lba, blocks),
            Self::Fence => (FENCE, 0, Lba(0), 0),
            Self::Directory { covered, frame, bytes } => {
                (DIRECTORY, frame, Lba(covered.0), u64::from(bytes))
            }
            Self::Leaf { number, frame, bytes } => (LEAF, frame, Lba(number), u64::from(bytes)),
        };
        out.extend([kind, 0]);
        out.extend(form.to_le_bytes());
        out.extend(frame.to_le_bytes());
        out.extend(lba.0.to_le_bytes());
        out.extend(blocks.to_le_bytes());
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self, Wrong> {
        let kind = reader.u8()?;
        reader.zeroes(1)?;
        let form = reader.u16()?;
        let (frame, lba, blocks) = (reader.u32()?, Lba(reader.u64()?), reader.u64()?);
        match kind {
            ZERO | FENCE | LEAF | DIRECTORY if form != 0 => Err(NUMBERS),
            WRITE | MOVE => {
                let (run, back) = match kind {
                    WRITE => (blocks, 0),
                    _ => (blocks & u64::from(u32::MAX), (blocks >> 32) as u32),
                };
                // No run is longer than an object.
                let is_short = run <= OBJECT_BYTES_MAX / BLOCK_BYTES;
                let blocks = is_short.then_some(run as u32);
                let blocks = blocks.ok_or(Wrong::Damaged("a run is too long"))?;
                let form = Form::of(form, blocks.into())?;
                Ok(match kind {
                    WRITE => Self::Write { lba, blocks, frame, form },
                    _ => Self::Move { lba, blocks, back, frame, form },
                })
            }
            ZERO if frame == 0 => Ok(Self::Zero { lba, blocks }),
            FENCE if (frame, lba, blocks) == (0, Lba(0), 0) => Ok(Self::Fence),
            LEAF | DIRECTORY => {
                let bytes = u32::try_from(blocks);
                let bytes = bytes.map_err(|_| Wrong::Damaged("a part of the map is too long"))?;
                Ok(match kind {
                    LEAF => Self::Leaf { number: lba.0, frame, bytes },
                    _ => Self::Directory { covered: Seq(lba.0), frame, bytes },
                })
            }
            ZERO | FENCE => Err(NUMBERS),
            _ => Err(Wrong::Newer("it has entries of an unknown kind")),
        }
    }
}
