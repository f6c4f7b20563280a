//! Frames: a block each, with a checksum that is bound to its place.
//!
//! A read needs whole frames to check them, so a frame is as small as a read can be. Codecs that
//! need more bytes at a time will have frames of their own.

use std::ops::Range;

use super::code::{Reader, Wrong};
use super::object::ObjectId;
use crate::ids::{BLOCK_BYTES, Blocks, Lba, VolumeId};

/// The most blocks of a frame.
pub const FRAME_BLOCKS: u64 = 1;
/// Bytes of a frame before its blocks.
pub const FRAME_HEADER_BYTES: u64 = 16;
/// Bytes of the frame of a block.
pub const FRAME_BYTES: u64 = FRAME_HEADER_BYTES + FRAME_BLOCKS * BLOCK_BYTES;
/// The codec of bytes that are stored as they are.
const PLAIN: u8 = 0;

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

/// Bytes of the frames of a run of blocks.
#[must_use]
pub const fn run_bytes(blocks: Blocks) -> u64 {
    blocks * BLOCK_BYTES + blocks.div_ceil(FRAME_BLOCKS) * FRAME_HEADER_BYTES
}

/// Blocks in the middle of a run, as a map finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunPart {
    /// Where the first frame of the run begins in the object.
    pub frame: u32,
    /// Blocks of the whole run.
    pub run: u32,
    /// Blocks of the run before the piece.
    pub skip: u32,
    /// Blocks of the piece.
    pub blocks: u32,
}

impl RunPart {
    /// The bytes of the object that have it: whole frames.
    ///
    /// # Panics
    /// When it is empty, or not within its run.
    #[must_use]
    pub fn bytes(&self) -> Range<u64> {
        let [frame, run, skip, blocks] =
            [self.frame, self.run, self.skip, self.blocks].map(u64::from);
        assert!(blocks > 0 && skip + blocks <= run, "{self:?} is not within its run");
        let first = skip / FRAME_BLOCKS;
        let end = (skip + blocks).next_multiple_of(FRAME_BLOCKS).min(run);
        frame + first * FRAME_BYTES..frame + run_bytes(end)
    }

    /// The block of a piece of one block, from the bytes of the object in [`RunPart::bytes`].
    ///
    /// # Errors
    /// What is wrong with its frame.
    pub fn check<'a>(
        &self,
        volume: VolumeId,
        object: ObjectId,
        lba: Lba,
        frame: &'a [u8],
    ) -> Result<&'a [u8], Wrong> {
        let at = self.bytes().start as u32;
        decode(FrameId { volume, object, at, lba }, frame)
    }

    /// Its blocks, from the bytes of the object in [`RunPart::bytes`]. `lba` is the address of its
    /// first block.
    ///
    /// # Errors
    /// What is wrong with a frame.
    pub fn decode(
        &self,
        volume: VolumeId,
        object: ObjectId,
        lba: Lba,
        stored: &[u8],
    ) -> Result<Vec<u8>, Wrong> {
        let range = self.bytes();
        if stored.len() as u64 != range.end - range.start {
            return Err(Wrong::Damaged("it ends too early"));
        }
        let mut out = Vec::with_capacity(self.blocks as usize * BLOCK_BYTES as usize);
        let wanted = u64::from(self.skip)..u64::from(self.skip) + u64::from(self.blocks);
        let mut block = wanted.start / FRAME_BLOCKS * FRAME_BLOCKS;
        let mut at = range.start as u32;
        let mut rest = stored;
        while block < wanted.end {
            let blocks = FRAME_BLOCKS.min(u64::from(self.run) - block);
            let (frame, behind) = rest.split_at(run_bytes(blocks) as usize);
            // An address below 0 would be a mistake of the map; the checksum finds it.
            let lba = Lba((lba.0 + block).wrapping_sub(wanted.start));
            let data = decode(FrameId { volume, object, at, lba }, frame)?;
            let from = wanted.start.max(block) - block;
            let to = wanted.end.min(block + blocks) - block;
            out.extend(&data[(from * BLOCK_BYTES) as usize..(to * BLOCK_BYTES) as usize]);
            block += blocks;
            at += frame.len() as u32;
            rest = behind;
        }
        Ok(out)
    }
}

/// Appends a frame of these blocks.
pub(super) fn put(out: &mut Vec<u8>, id: FrameId, data: &[u8]) {
    let blocks = data.len() as u64 / BLOCK_BYTES;
    assert!(
        (1..=FRAME_BLOCKS).contains(&blocks) && data.len() as u64 == blocks * BLOCK_BYTES,
        "a frame of {} bytes",
        data.len()
    );
    put_any(out, id, blocks as u8, data);
}

/// Appends the frame of a leaf or a directory.
pub(super) fn put_map(out: &mut Vec<u8>, id: FrameId, content: &[u8]) {
    put_any(out, id, 0, content);
}

fn put_any(out: &mut Vec<u8>, id: FrameId, blocks: u8, content: &[u8]) {
    let begin = out.len();
    out.extend([0; 4]);
    out.extend((content.len() as u32).to_le_bytes());
    out.extend([PLAIN, blocks, 0, 0, 0, 0, 0, 0]);
    out.extend(content);
    let crc = checksum(id, &out[begin + 4..]);
    out[begin..begin + 4].copy_from_slice(&crc.to_le_bytes());
}

/// What the frame of a leaf or a directory has.
pub(super) fn decode_map(id: FrameId, frame: &[u8]) -> Result<&[u8], Wrong> {
    match decode_any(id, frame)? {
        (0, content) => Ok(content),
        _ => Err(Wrong::Damaged("it has blocks in the place of a part of the map")),
    }
}

/// The blocks of a frame.
fn decode(id: FrameId, frame: &[u8]) -> Result<&[u8], Wrong> {
    let (blocks, data) = decode_any(id, frame)?;
    match u64::from(blocks) * BLOCK_BYTES == data.len() as u64 {
        true => Ok(data),
        false => Err(Wrong::Damaged("a frame has another length than its run")),
    }
}

/// The count of blocks that a frame states, and its content.
fn decode_any(id: FrameId, frame: &[u8]) -> Result<(u8, &[u8]), Wrong> {
    let (crc, rest) = frame.split_first_chunk().ok_or(Wrong::Damaged("a frame ends too early"))?;
    if checksum(id, rest) != u32::from_le_bytes(*crc) {
        return Err(Wrong::Damaged("the checksum of a frame is wrong"));
    }
    let mut reader = Reader::new(rest);
    let (stored, codec, blocks) = (reader.u32()?, reader.u8()?, reader.u8()?);
    if codec != PLAIN {
        return Err(Wrong::Newer("a frame has an unknown codec"));
    }
    reader.zeroes(6)?;
    let data = reader.rest();
    match stored as usize == data.len() {
        true => Ok((blocks, data)),
        false => Err(Wrong::Damaged("a frame has another length than it states")),
    }
}

/// CRC-32 over the place of a frame and its bytes behind the checksum.
fn checksum(id: FrameId, rest: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&id.volume.0);
    for number in [id.object.epoch.0, id.object.seq.0, u64::from(id.at), id.lba.0] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(rest);
    hasher.finalize()
}
