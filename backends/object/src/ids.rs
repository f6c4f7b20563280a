//! The numbers and names that all parts of the engine share.

use std::fmt;

use uuid::Uuid;

use crate::format::Form;

/// Bytes of a block, the unit of all addresses in maps, records and objects.
pub const BLOCK_BYTES: u64 = 4096;

/// A count of blocks.
pub type Blocks = u64;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl $name {
            /// The one after it.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
    };
}

number!(
    /// A block's address in its volume, in blocks.
    Lba
);
number!(
    /// The number of a write in its volume: one for each entry of a journal record, from 1, without
    /// gaps. 0 is before all writes.
    Lsn
);
number!(
    /// The number of a log object in its volume, from 1, without gaps. 0 is before all objects.
    Seq
);
number!(
    /// The number of an opening of a volume. Each opening has its own, on the same node too.
    Epoch
);

/// What tells a volume from all others, also from one of the same name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VolumeId(pub [u8; 16]);

/// Random bytes that tell an opening of a volume from all others, also from one of the same epoch
/// in a copy of the bucket.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation(pub [u8; 16]);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).simple().fmt(f)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An opening of a volume: what a root and a journal know it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Opening {
    /// Its number.
    pub epoch: Epoch,
    /// Its random bytes.
    pub incarnation: Incarnation,
}

/// Where committed blocks are. A place is that of a first block; [`Place::advance`] gives that of a
/// later one of the same run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// They are zeroes.
    Zero,
    /// They are in frames of a log object, which follow one another.
    Object {
        /// The object.
        seq: Seq,
        /// Where the first frame of the run begins, in bytes from the begin of the object.
        frame: u32,
        /// How the blocks of the run are in frames.
        form: Form,
        /// Blocks of the run before this one.
        skip: u32,
        /// Blocks of the whole run.
        run: u32,
    },
}

const _: () = assert!(size_of::<Place>() == 24);

impl Place {
    /// The place of the block that is `blocks` after this one, in the same run.
    #[must_use]
    pub fn advance(self, blocks: Blocks) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Object { seq, frame, form, skip, run } => {
                let skip = u64::from(skip) + blocks;
                assert!(skip <= u64::from(run), "block {skip} of a run of {run}");
                Self::Object { seq, frame, form, skip: skip as u32, run }
            }
        }
    }
}
