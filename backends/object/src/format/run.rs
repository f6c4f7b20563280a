//! Where the blocks of a run are in their object.

use std::ops::Range;

use super::code::Wrong;
use super::codec::PACK_BLOCKS_MAX;
use super::frame::{FRAME_HEADER_BYTES, SEAL_BYTES};
use crate::ids::{BLOCK_BYTES, Blocks};

/// Bytes of the frame of a block that is stored as it is, and of one that is encrypted.
const PLAIN_BYTES: u64 = FRAME_HEADER_BYTES + BLOCK_BYTES;
const SEALED_BYTES: u64 = PLAIN_BYTES + SEAL_BYTES;
/// The most bytes of a frame that has several blocks. They would not be packed for so little.
const PACKED_BYTES_MAX: u64 = SEALED_BYTES - BLOCK_BYTES + PACK_BLOCKS_MAX * BLOCK_BYTES;

const _: () = assert!(PACKED_BYTES_MAX < 1 << 16);

/// How the blocks of a run are in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Form {
    /// Each in one of its own, as it is.
    #[default]
    Plain,
    /// Each in one of its own, encrypted.
    Sealed,
    /// All in one, of so many bytes.
    Packed(u16),
}

const PLAIN: u16 = 0;
const SEALED: u16 = 1;

impl Form {
    /// That of blocks in frames of their own.
    pub(super) fn of_blocks(is_encrypted: bool) -> Self {
        if is_encrypted { Self::Sealed } else { Self::Plain }
    }

    /// Its number.
    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Plain => PLAIN,
            Self::Sealed => SEALED,
            Self::Packed(bytes) => bytes,
        }
    }

    /// That of a number, for a run of so many blocks.
    ///
    /// # Errors
    /// When no such run is made.
    pub(crate) fn of(number: u16, run: u64) -> Result<Self, Wrong> {
        match number {
            PLAIN => Ok(Self::Plain),
            SEALED => Ok(Self::Sealed),
            bytes
                if run <= PACK_BLOCKS_MAX
                    && (FRAME_HEADER_BYTES + 1..=PACKED_BYTES_MAX).contains(&u64::from(bytes)) =>
            {
                Ok(Self::Packed(bytes))
            }
            _ => Err(Wrong::Damaged("a run has a length that no frame has")),
        }
    }

    /// Blocks of each frame of a run.
    fn frame_blocks(self, run: u32) -> u32 {
        match self {
            Self::Plain | Self::Sealed => 1,
            Self::Packed(_) => run,
        }
    }

    const fn frame_bytes(self) -> u64 {
        match self {
            Self::Plain => PLAIN_BYTES,
            Self::Sealed => SEALED_BYTES,
            Self::Packed(bytes) => bytes as u64,
        }
    }

    /// Bytes of the frames of a run.
    #[must_use]
    pub const fn run_bytes(self, blocks: Blocks) -> u64 {
        match self {
            Self::Plain | Self::Sealed => blocks * self.frame_bytes(),
            Self::Packed(_) => self.frame_bytes(),
        }
    }
}

/// Blocks in the middle of a run, as a map finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunPart {
    /// Where the first frame of the run begins in the object.
    pub frame: u32,
    /// How they are stored.
    pub form: Form,
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
        let of_frame = u64::from(self.form.frame_blocks(self.run));
        let (first, end) = (skip / of_frame, (skip + blocks).div_ceil(of_frame));
        let bytes = self.form.frame_bytes();
        frame + first * bytes..frame + end * bytes
    }

    /// Its pieces, each in one frame.
    pub fn frames(self) -> impl Iterator<Item = Self> {
        let (of_frame, end) = (self.form.frame_blocks(self.run), self.skip + self.blocks);
        let mut skip = self.skip;
        std::iter::from_fn(move || {
            let blocks = (of_frame - skip % of_frame).min(end - skip);
            let piece = Self { skip, blocks, ..self };
            skip += blocks;
            (blocks > 0).then_some(piece)
        })
    }

    /// Of a piece in one frame: the blocks of the frame, and how many of them are before it.
    pub(super) fn in_frame(&self) -> (u32, u32) {
        let of_frame = self.form.frame_blocks(self.run);
        (of_frame, self.skip % of_frame)
    }
}
