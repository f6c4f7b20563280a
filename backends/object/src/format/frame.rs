//! Frames: some blocks each, with a checksum that is bound to their place.
//!
//! A read needs whole frames to check them, so a frame is as small as a read can be, unless its
//! blocks are compressed together.

use std::borrow::Cow;
use std::ops::Range;

use super::code::{Reader, Wrong};
use super::codec::{Codec, unpack};
use super::object::ObjectId;
use super::run::{Form, RunPart};
use crate::cipher::{Key, SALT_BYTES, TAG_BYTES, VolumeKey, random};
use crate::ids::{BLOCK_BYTES, Blocks, Lba, VolumeId};

/// Bytes of a frame before its content.
pub const FRAME_HEADER_BYTES: u64 = 16;
/// Bytes of an encrypted frame beside its content: a salt before it, a tag behind it.
pub(super) const SEAL_BYTES: u64 = (SALT_BYTES + TAG_BYTES) as u64;
const HEADER: usize = FRAME_HEADER_BYTES as usize;

/// What a frame is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameId {
    /// The volume that has made the object.
    pub volume: VolumeId,
    /// The object.
    pub object: ObjectId,
    /// Where the frame begins in the object, in bytes.
    pub at: u32,
    /// The address of its first block.
    pub lba: Lba,
}

impl FrameId {
    fn bytes(&self) -> [u8; 48] {
        let mut out = [0; 48];
        out[..16].copy_from_slice(&self.volume.0);
        let numbers = [self.object.epoch.0, self.object.seq.0, u64::from(self.at), self.lba.0];
        for (into, number) in out[16..].chunks_exact_mut(8).zip(numbers) {
            into.copy_from_slice(&number.to_le_bytes());
        }
        out
    }
}

/// How the frames of new objects are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coding {
    /// How blocks are compressed.
    pub codec: Codec,
    /// The key of the volume, if it is encrypted.
    pub key: Option<VolumeKey>,
}

impl Coding {
    /// The most entries that become of blocks.
    #[must_use]
    pub fn entries(&self, lba: Lba, blocks: Blocks) -> usize {
        self.codec.groups(lba, blocks).count()
    }

    /// The most bytes that frames of blocks take.
    #[must_use]
    pub fn bytes(&self, blocks: Blocks) -> u64 {
        Form::of_blocks(self.key.is_some()).run_bytes(blocks)
    }
}

/// The key of an object, and the salt by which it is derived from that of the volume.
pub(super) struct ObjectKey {
    salt: [u8; SALT_BYTES],
    key: Key,
}

impl ObjectKey {
    /// That of a new object.
    pub(super) fn new(of: &VolumeKey, volume: VolumeId, object: ObjectId) -> Self {
        Self::of(of, volume, object, random())
    }

    fn of(of: &VolumeKey, volume: VolumeId, object: ObjectId, salt: [u8; SALT_BYTES]) -> Self {
        let [epoch, seq] = [object.epoch.0, object.seq.0].map(u64::to_le_bytes);
        let key = of.derive(&salt, &[b"sheave object", &volume.0, &epoch, &seq]);
        Self { salt, key }
    }
}

/// What a frame has.
pub(super) struct Content<'a> {
    pub(super) codec: Codec,
    /// 0 in a part of the map.
    pub(super) blocks: u8,
    pub(super) bytes: &'a [u8],
}

/// Appends a frame.
pub(super) fn put(out: &mut Vec<u8>, id: FrameId, key: Option<&ObjectKey>, content: &Content<'_>) {
    let begin = out.len();
    let seal_bytes = if key.is_some() { SEAL_BYTES as usize } else { 0 };
    out.extend([0; 4]);
    out.extend(((content.bytes.len() + seal_bytes) as u32).to_le_bytes());
    let is_sealed = u8::from(key.is_some());
    out.extend([content.codec as u8, content.blocks, is_sealed, 0, 0, 0, 0, 0]);
    if let Some(ObjectKey { salt, .. }) = key {
        out.extend(salt);
    }
    let at = out.len();
    out.extend(content.bytes);
    if let Some(ObjectKey { key, .. }) = key {
        let (head, bytes) = out.split_at_mut(at);
        let tag = key.seal(id.at, &bound_to(id, &head[begin..]), bytes);
        out.extend(tag);
    }
    let crc = checksum(id, &out[begin + 4..]);
    out[begin..begin + 4].copy_from_slice(&crc.to_le_bytes());
}

/// The first frame of bytes, and what is behind it.
pub(super) fn split_first(stored: &[u8]) -> Result<(&[u8], &[u8]), Wrong> {
    let len = stored.get(4..).and_then(<[u8]>::first_chunk).map(|len| u32::from_le_bytes(*len));
    let split = len.and_then(|len| stored.split_at_checked(HEADER + len as usize));
    split.ok_or(TOO_SHORT)
}

/// Reads the frames of an object.
pub struct FrameReader<'a> {
    volume: VolumeId,
    object: ObjectId,
    key: Option<&'a VolumeKey>,
    /// The key of the last frame; others of the object have the same.
    last: Option<ObjectKey>,
}

impl<'a> FrameReader<'a> {
    /// For an object that a volume has made, with the volume's key if it is encrypted.
    #[must_use]
    pub fn new(volume: VolumeId, object: ObjectId, key: Option<&'a VolumeKey>) -> Self {
        Self { volume, object, key, last: None }
    }

    pub(super) fn object(&self) -> ObjectId {
        self.object
    }

    /// Hands on the blocks of a piece that is in one frame, of which these are the bytes. `lba` is
    /// the address of the piece's first block.
    ///
    /// # Errors
    /// What is wrong with the frame.
    pub fn read_frame(
        &mut self,
        part: RunPart,
        lba: Lba,
        frame: &[u8],
        take: impl FnOnce(&[u8]),
    ) -> Result<(), Wrong> {
        let (of_frame, before) = part.in_frame();
        let (volume, object) = (self.volume, self.object);
        // An address below 0 would be a mistake of the map; the checksum finds it.
        let lba = Lba(lba.0.wrapping_sub(u64::from(before)));
        let id = FrameId { volume, object, at: part.bytes().start as u32, lba };
        let (blocks, data) = self.decode(id, frame)?;
        if u32::from(blocks) != of_frame || data.len() as u64 != u64::from(blocks) * BLOCK_BYTES {
            return Err(Wrong::Damaged("a frame has another length than its run"));
        }
        let [begin, end] = [before, before + part.blocks].map(|at| at as usize);
        take(&data[begin * BLOCK_BYTES as usize..end * BLOCK_BYTES as usize]);
        Ok(())
    }

    /// The blocks of a piece, from the bytes of the object in [`RunPart::bytes`]. `lba` is the
    /// address of its first block.
    ///
    /// # Errors
    /// What is wrong with a frame.
    pub fn read(&mut self, part: RunPart, lba: Lba, stored: &[u8]) -> Result<Vec<u8>, Wrong> {
        let mut out = Vec::with_capacity(part.blocks as usize * BLOCK_BYTES as usize);
        let Range { start: begin, end } = part.bytes();
        if stored.len() as u64 != end - begin {
            return Err(TOO_SHORT);
        }
        for piece in part.frames() {
            let range = piece.bytes();
            let frame = &stored[(range.start - begin) as usize..(range.end - begin) as usize];
            let lba = Lba(lba.0 + u64::from(piece.skip - part.skip));
            self.read_frame(piece, lba, frame, |blocks| out.extend(blocks))?;
        }
        Ok(out)
    }

    /// What the frame of a leaf or a directory has.
    pub(super) fn read_map<'f>(
        &mut self,
        (at, lba): (u32, Lba),
        frame: &'f [u8],
    ) -> Result<Cow<'f, [u8]>, Wrong> {
        let id = FrameId { volume: self.volume, object: self.object, at, lba };
        match self.decode(id, frame)? {
            (0, content) => Ok(content),
            _ => Err(Wrong::Damaged("it has blocks in the place of a part of the map")),
        }
    }

    /// The count of blocks that a frame states, and its content.
    pub(super) fn decode<'f>(
        &mut self,
        id: FrameId,
        frame: &'f [u8],
    ) -> Result<(u8, Cow<'f, [u8]>), Wrong> {
        let (crc, rest) = frame.split_first_chunk().ok_or(TOO_SHORT)?;
        if checksum(id, rest) != u32::from_le_bytes(*crc) {
            return Err(Wrong::Damaged("the checksum of a frame is wrong"));
        }
        let mut reader = Reader::new(rest);
        let (stored, codec, blocks) = (reader.u32()?, Codec::of(reader.u8()?)?, reader.u8()?);
        let is_sealed = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(Wrong::Newer("a frame is encrypted in an unknown way")),
        };
        reader.zeroes(5)?;
        let content = reader.rest();
        if stored as usize != content.len() {
            return Err(Wrong::Damaged("a frame has another length than it states"));
        }
        let content = match (is_sealed, self.key) {
            (false, None) => Cow::Borrowed(content),
            (true, Some(key)) => Cow::Owned(self.open(key, id, (&frame[..HEADER], content))?),
            (true, None) => {
                return Err(Wrong::Damaged("a frame is encrypted, and the volume is not"));
            }
            // Else others could put bytes of theirs in the place of encrypted ones.
            (false, Some(_)) => return Err(Wrong::Damaged("a frame is not encrypted")),
        };
        match codec {
            Codec::Plain => Ok((blocks, content)),
            Codec::Lz4 => Ok((blocks, Cow::Owned(unpack(blocks, &content)?))),
        }
    }

    /// Decrypts what a frame has behind its header.
    fn open(
        &mut self,
        key: &VolumeKey,
        id: FrameId,
        (header, content): (&[u8], &[u8]),
    ) -> Result<Vec<u8>, Wrong> {
        let (salt, sealed) = content.split_first_chunk().ok_or(TOO_SHORT)?;
        let (sealed, tag) = sealed.split_last_chunk::<TAG_BYTES>().ok_or(TOO_SHORT)?;
        let last = self.last.take().filter(|last| last.salt == *salt);
        let of = last.unwrap_or_else(|| ObjectKey::of(key, id.volume, id.object, *salt));
        let mut out = vec![0; sealed.len()];
        let opened = of.key.open(id.at, &bound_to(id, header), (sealed, tag), &mut out);
        self.last = Some(of);
        opened.ok_or(Wrong::Damaged("a frame is not what was encrypted, or by another key"))?;
        Ok(out)
    }
}

const TOO_SHORT: Wrong = Wrong::Damaged("a frame ends too early");

/// What an encrypted frame is bound to: its place, and its header but for the checksum.
fn bound_to(id: FrameId, header: &[u8]) -> [u8; 60] {
    let mut out = [0; 60];
    out[..48].copy_from_slice(&id.bytes());
    out[48..].copy_from_slice(&header[4..HEADER]);
    out
}

/// CRC-32 over the place of a frame and its bytes behind the checksum.
pub(super) fn checksum(id: FrameId, rest: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&id.bytes());
    hasher.update(rest);
    hasher.finalize()
}
