//! What is on a device, by its superblocks. Bytes in, an answer out; `disk.rs` reads them.
//!
//! A device is empty only if all of its probed regions are zero. These are the places of the
//! superblocks and signatures that are known here, their backups, the start, the end, and samples
//! in between.

mod filesystems;
mod others;
mod regions;
#[cfg(test)]
mod tests;

use std::fmt;

pub(crate) use regions::{Region, regions};

/// A part of a device that was read.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Its offset on the device.
    pub(crate) at: u64,
    pub(crate) bytes: Vec<u8>,
}

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Zeroes, in all that was probed.
    Empty,
    /// Something without a known signature; the offset is that of the first byte that is not zero.
    Unknown(u64),
    /// One kind of data, whose main signature is whole.
    One(Signature),
    /// Several kinds: one of them may be left over from an earlier use.
    Several(Vec<Signature>),
    /// Only backups of what was there.
    Backups(Vec<Signature>),
}

/// A sign of some kind of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signature {
    /// Such as `ext4` or `LUKS`.
    pub(crate) name: &'static str,
    /// Its offset on the device.
    pub(crate) at: u64,
    pub(crate) fs: Option<FsInfo>,
}

/// What a filesystem's superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FsInfo {
    /// Bytes that it takes.
    pub(crate) size: u64,
    /// Bytes of a block.
    pub(crate) block: u64,
    /// Whether it needs no check and no journal replay. Only ext says it.
    pub(crate) clean: bool,
    /// Whether it was ever mounted, as far as it says so. Only ext does.
    pub(crate) was_mounted: bool,
}

/// The parts of a device that were read.
struct Parts<'a> {
    size: u64,
    parts: &'a [Part],
}

impl Parts<'_> {
    /// Bytes at an offset, if they were read.
    fn get(&self, at: u64, len: usize) -> Option<&[u8]> {
        self.parts.iter().find_map(|part| {
            let start = usize::try_from(at.checked_sub(part.at)?).ok()?;
            part.bytes.get(start..start.checked_add(len)?)
        })
    }

    fn has(&self, at: u64, magic: &[u8]) -> bool {
        self.get(at, magic.len()) == Some(magic)
    }

    fn first_data(&self) -> Option<u64> {
        let offset = |part: &Part| {
            let index = part.bytes.iter().position(|&byte| byte != 0)?;
            Some(part.at + index as u64)
        };
        self.parts.iter().filter_map(offset).min()
    }
}

/// Tells what is on a device of `size` bytes of which all [`regions`] were read.
pub(crate) fn parse(size: u64, parts: &[Part]) -> Content {
    let parts = Parts { size, parts };
    let mut main = filesystems::main(&parts);
    main.extend(others::main(&parts));
    match main.len() {
        0 => {}
        1 => return Content::One(main.remove(0)),
        _ => return Content::Several(main),
    }
    let mut backups = filesystems::backups(&parts);
    backups.extend(others::backups(&parts));
    if !backups.is_empty() {
        return Content::Backups(backups);
    }
    parts.first_data().map_or(Content::Empty, Content::Unknown)
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name, self.at)
    }
}

/// Several signatures in a message.
pub(crate) fn list(signatures: &[Signature]) -> String {
    let texts: Vec<_> = signatures.iter().map(ToString::to_string).collect();
    texts.join(", ")
}
