//! Roots: the numbered states of a volume.

use super::code::{Reader, Wrong, put_kind, take_kind};
use super::codec::Codec;
use super::durability::Durability;
use super::frame::FRAME_HEADER_BYTES;
use super::object::OBJECT_BYTES_MAX;
use super::snapshot::{Owner, SnapshotNews, put_owners, take_owners};
use crate::cipher::WrappedKey;
use crate::ids::{BLOCK_BYTES, Blocks, Epoch, Incarnation, Lsn, Opening, Seq, VolumeId};

/// The most bytes of a root.
pub const ROOT_BYTES_MAX: u64 = 4096;
/// The most bytes of the name of a node.
pub const NODE_BYTES_MAX: usize = 255;
const MAGIC: [u8; 8] = *b"SHVROOT\n";
const LEN_AT: usize = 16;

/// A root. `docs/format.md` draws its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The volume.
    pub volume: VolumeId,
    /// Its number; each root is made if there is none of that number.
    pub number: u64,
    /// What its author says of the volume.
    pub state: State,
    /// The opening that has made it.
    pub author: Opening,
    /// The node of the author.
    pub node: String,
    /// The size of the volume.
    pub size: Blocks,
    /// What is certainly committed; there may be more behind it.
    pub committed: Committed,
    /// The last opening that may have log objects.
    pub last: LastOpening,
    /// The newest epoch before that one which has objects.
    pub previous: Option<Reach>,
    /// The newest checkpoint that is known to be committed.
    pub directory: Option<FramePlace>,
    /// What flushes wait for.
    pub durability: Durability,
    /// How new blocks are compressed.
    pub codec: Codec,
    /// The key of the volume, if it is encrypted.
    pub wrapped_key: Option<WrappedKey>,
    /// The volumes that have its first objects, if it is a clone, in the order of those.
    pub owners: Vec<Owner>,
    /// Its snapshots, beside those that the checkpoint has.
    pub snapshots: SnapshotNews,
}

/// Where a directory or a leaf is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FramePlace {
    /// Its object.
    pub seq: Seq,
    /// Where its frame begins in the object, in bytes.
    pub at: u32,
    /// The length of the frame in bytes.
    pub bytes: u32,
}

/// The state of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The author is going to open it. The last opening has made its last root, and its log is
    /// frozen but for objects in flight.
    Claimed = 1,
    /// The author writes to it.
    Open = 2,
    /// The author has written all, and has ended.
    Closed = 3,
    /// It is deleted. This root stays for ever.
    Deleted = 4,
}

impl State {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Deleted => "deleted",
        }
    }

    fn of(number: u8) -> Result<Self, Wrong> {
        match number {
            1 => Ok(Self::Claimed),
            2 => Ok(Self::Open),
            3 => Ok(Self::Closed),
            4 => Ok(Self::Deleted),
            _ => Err(Wrong::Newer("its state is unknown")),
        }
    }
}

/// A prefix of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Its last object.
    pub seq: Seq,
    /// The last write in it.
    pub lsn: Lsn,
}

/// The last opening whose open root counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastOpening {
    /// Its epoch and incarnation.
    pub opening: Opening,
    /// Its node.
    pub node: String,
    /// The number of its first object.
    pub first: Seq,
    /// Whether it has closed the volume: it has no object above the committed one.
    pub is_closed: bool,
}

/// An epoch, and the number of its first object. Its objects end where those of the next epoch
/// begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The epoch.
    pub epoch: Epoch,
    /// The number of its first object.
    pub first: Seq,
}

impl Root {
    /// Its bytes.
    ///
    /// # Panics
    /// When the name of a node is longer than [`NODE_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.body();
        let len = out.len() as u32 + 4;
        out[LEN_AT..LEN_AT + 4].copy_from_slice(&len.to_le_bytes());
        out.extend(crc32fast::hash(&out).to_le_bytes());
        assert!(out.len() as u64 <= ROOT_BYTES_MAX, "a root of {} bytes", out.len());
        out
    }

    /// Whether it is short enough with that many bytes more, also with the longest names of nodes:
    /// others take it over.
    #[must_use]
    pub fn fits(&self, more: usize) -> bool {
        let names = self.node.len() + self.last.node.len();
        let longest = self.body().len() - names + 2 * NODE_BYTES_MAX + 4 + more;
        longest as u64 <= ROOT_BYTES_MAX
    }

    /// All but its length and its checksum.
    fn body(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        put_kind(&mut out, MAGIC);
        out.extend(0_u32.to_le_bytes());
        out.extend([self.state as u8, u8::from(self.last.is_closed), 0, 0]);
        out.extend(self.volume.0);
        out.extend(self.number.to_le_bytes());
        put_opening(&mut out, self.author);
        for number in [self.size, self.committed.seq.0, self.committed.lsn.0] {
            out.extend(number.to_le_bytes());
        }
        put_opening(&mut out, self.last.opening);
        out.extend(self.last.first.0.to_le_bytes());
        put_previous(&mut out, self.previous);
        put_directory(&mut out, self.directory);
        for node in [&self.node, &self.last.node] {
            assert!(node.len() <= NODE_BYTES_MAX, "the name of a node has {} bytes", node.len());
            out.extend((node.len() as u16).to_le_bytes());
            out.extend(node.as_bytes());
        }
        let is_encrypted = u8::from(self.wrapped_key.is_some());
        out.extend([self.durability as u8, self.codec as u8, is_encrypted, 0]);
        let key = self.wrapped_key.as_ref().map_or(&[][..], WrappedKey::bytes);
        out.extend((key.len() as u16).to_le_bytes());
        out.extend(key);
        put_owners(&mut out, &self.owners);
        self.snapshots.put(&mut out);
        out
    }

    /// Reads it from its bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, Wrong> {
        check_bytes(bytes)?;
        let mut reader = Reader::new(bytes);
        take_kind(&mut reader, MAGIC)?;
        reader.u32()?;
        let state = State::of(reader.u8()?)?;
        let is_closed = take_flag(&mut reader)?;
        reader.zeroes(2)?;
        let volume = VolumeId(reader.array()?);
        let number = reader.u64()?;
        let author = take_opening(&mut reader)?;
        let size = reader.u64()?;
        let committed = Committed { seq: Seq(reader.u64()?), lsn: Lsn(reader.u64()?) };
        let opening = take_opening(&mut reader)?;
        let first = Seq(reader.u64()?);
        let previous = take_previous(&mut reader)?;
        let directory = take_directory(&mut reader)?;
        let node = take_node(&mut reader)?;
        let last = LastOpening { opening, node: take_node(&mut reader)?, first, is_closed };
        let durability = Durability::of(reader.u8()?)?;
        let (codec, wrapped_key) = (Codec::of(reader.u8()?)?, take_key(&mut reader)?);
        let owners = take_owners(&mut reader)?;
        let snapshots = SnapshotNews::take(&mut reader, committed)?;
        // What follows are fields of later versions that this one need not know.
        let root = Self {
            volume,
            number,
            state,
            author,
            node,
            size,
            committed,
            last,
            previous,
            directory,
            durability,
            codec,
            wrapped_key,
            owners,
            snapshots,
        };
        root.check()?;
        Ok(root)
    }

    /// Checks what its fields say of one another.
    fn check(&self) -> Result<(), Wrong> {
        let Self { state, author, last, committed, previous, directory, owners, .. } = self;
        let is_authors = match state {
            State::Open => last.opening == *author && !last.is_closed,
            State::Closed => last.opening == *author && last.is_closed,
            State::Claimed | State::Deleted => last.opening.epoch < author.epoch,
        };
        // So that the number after any of these is a number.
        let numbers = [self.number, author.epoch.0, committed.seq.0, committed.lsn.0, last.first.0];
        let is_small = numbers.iter().all(|number| *number <= NUMBER_MAX);
        let follows = is_small
            && committed.seq.next() >= last.first
            && last.first.0 > 0
            && previous.is_none_or(|previous| {
                previous.epoch < last.opening.epoch && previous.first < last.first
            })
            && directory.is_none_or(|directory| directory.seq <= committed.seq)
            && owners.last().is_none_or(|owner| owner.end <= last.first);
        match is_authors && follows && self.size <= SIZE_MAX {
            true => Ok(()),
            false => Err(Wrong::Damaged("its fields contradict one another")),
        }
    }

    /// The size of the volume in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size * BLOCK_BYTES
    }

    /// The part of the log that its last opening has.
    #[must_use]
    pub fn reach(&self) -> Reach {
        Reach { epoch: self.last.opening.epoch, first: self.last.first }
    }
}

/// The most blocks of a volume: its bytes are an offset in a file.
pub const SIZE_MAX: Blocks = i64::MAX as u64 / BLOCK_BYTES;

/// No count of openings, objects or writes reaches it.
pub(crate) const NUMBER_MAX: u64 = u64::MAX >> 1;

/// Checks that these are the bytes of a root of any version.
fn check_bytes(bytes: &[u8]) -> Result<(), Wrong> {
    if !bytes.starts_with(&MAGIC) {
        return Err(Wrong::Damaged("it does not begin as it must"));
    }
    let len = bytes.get(LEN_AT..).and_then(|rest| rest.first_chunk());
    let len = len.map(|len| u64::from(u32::from_le_bytes(*len)));
    if len != Some(bytes.len() as u64) || bytes.len() as u64 > ROOT_BYTES_MAX {
        return Err(Wrong::Damaged("its length is wrong"));
    }
    let (body, crc) = bytes.split_last_chunk().ok_or(Wrong::Damaged("it ends too early"))?;
    match crc32fast::hash(body) == u32::from_le_bytes(*crc) {
        true => Ok(()),
        false => Err(Wrong::Damaged("its checksum is wrong")),
    }
}

fn put_opening(out: &mut Vec<u8>, opening: Opening) {
    out.extend(opening.epoch.0.to_le_bytes());
    out.extend(opening.incarnation.0);
}

fn take_opening(reader: &mut Reader<'_>) -> Result<Opening, Wrong> {
    let epoch = Epoch(reader.u64()?);
    Ok(Opening { epoch, incarnation: Incarnation(reader.array()?) })
}

fn take_flag(reader: &mut Reader<'_>) -> Result<bool, Wrong> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Wrong::Damaged("a flag is neither 0 nor 1")),
    }
}

/// Where the objects before those of an epoch are; zeroes if there are none.
pub(super) fn put_previous(out: &mut Vec<u8>, previous: Option<Reach>) {
    let Reach { epoch, first } = previous.unwrap_or(Reach { epoch: Epoch(0), first: Seq(0) });
    out.extend(epoch.0.to_le_bytes());
    out.extend(first.0.to_le_bytes());
}

pub(super) fn take_previous(reader: &mut Reader<'_>) -> Result<Option<Reach>, Wrong> {
    let reach = Reach { epoch: Epoch(reader.u64()?), first: Seq(reader.u64()?) };
    match (reach.epoch.0, reach.first.0) {
        (0, 0) => Ok(None),
        (_, 0) => Err(Wrong::Damaged("an epoch begins with object 0")),
        _ => Ok(Some(reach)),
    }
}

/// Zeroes if there is none.
pub(super) fn put_directory(out: &mut Vec<u8>, directory: Option<FramePlace>) {
    let none = FramePlace { seq: Seq(0), at: 0, bytes: 0 };
    let FramePlace { seq, at, bytes } = directory.unwrap_or(none);
    out.extend(seq.0.to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend(bytes.to_le_bytes());
}

pub(super) fn take_directory(reader: &mut Reader<'_>) -> Result<Option<FramePlace>, Wrong> {
    let (seq, at, bytes) = (reader.u64()?, reader.u32()?, reader.u32()?);
    let end = u64::from(at) + u64::from(bytes);
    match (seq, at, bytes) {
        (0, 0, 0) => Ok(None),
        (0, ..) => Err(Wrong::Damaged("a directory is in object 0")),
        _ if u64::from(bytes) < FRAME_HEADER_BYTES || end > OBJECT_BYTES_MAX => {
            Err(Wrong::Damaged("the place of its directory leads outside"))
        }
        _ => Ok(Some(FramePlace { seq: Seq(seq), at, bytes })),
    }
}

/// Whether the volume is encrypted, and its key.
fn take_key(reader: &mut Reader<'_>) -> Result<Option<WrappedKey>, Wrong> {
    let cipher = reader.u8()?;
    reader.zeroes(1)?;
    let len = usize::from(reader.u16()?);
    match (cipher, reader.bytes(len)?) {
        (0, []) => Ok(None),
        (1, bytes) => match bytes.try_into() {
            Ok(bytes) => Ok(Some(WrappedKey::new(bytes))),
            Err(_) => Err(Wrong::Damaged("its key has another length than a key")),
        },
        (0, _) => Err(Wrong::Damaged("it has a key, and is not encrypted")),
        _ => Err(Wrong::Newer("it is encrypted in an unknown way")),
    }
}

fn take_node(reader: &mut Reader<'_>) -> Result<String, Wrong> {
    let len = usize::from(reader.u16()?);
    if len > NODE_BYTES_MAX {
        return Err(Wrong::Damaged("the name of its node is too long"));
    }
    let text = std::str::from_utf8(reader.bytes(len)?);
    text.map(str::to_owned).map_err(|_| Wrong::Damaged("the name of its node is no text"))
}
