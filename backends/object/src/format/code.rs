//! Numbers and bytes in a fixed order: little-endian, without padding.

use std::fmt;

/// What is wrong with stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// They are not what was written.
    Damaged(&'static str),
    /// A newer program has written them.
    Newer(&'static str),
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged(why) => f.write_str(why),
            Self::Newer(why) => write!(f, "{why}; it needs a newer version of sheave"),
        }
    }
}

impl std::error::Error for Wrong {}

/// Takes numbers from the front of bytes.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Wrong> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(TOO_SHORT)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Wrong> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(TOO_SHORT)?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Wrong> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Wrong> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Wrong> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Wrong> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes a number that [`put_number`] has written.
    pub(crate) fn number(&mut self) -> Result<u64, Wrong> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let digit = u64::from(byte & 0x7f);
            let is_last = byte & 0x80 == 0;
            let is_short =
                digit << shift >> shift == digit && (digit > 0 || !is_last || shift == 0);
            if !is_short {
                break;
            }
            number |= digit << shift;
            if is_last {
                return Ok(number);
            }
        }
        Err(Wrong::Damaged("a number is written as none is"))
    }

    /// Takes all that is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Takes bytes that must be zero.
    pub(crate) fn zeroes(&mut self, count: usize) -> Result<(), Wrong> {
        match self.bytes(count)?.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(Wrong::Damaged("reserved bytes are not zero")),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

const TOO_SHORT: Wrong = Wrong::Damaged("it ends too early");

/// Appends a number in as few bytes as it needs: 7 bits in each, the low ones first; all but the
/// last byte have their high bit set.
pub(crate) fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// The begin of every stored header: what it is, its version, and the features that its reader must
/// know.
pub(crate) fn put_kind(out: &mut Vec<u8>, magic: [u8; 8]) {
    out.extend(magic);
    out.extend(VERSION.to_le_bytes());
    out.extend([0; 2]);
    out.extend(0_u32.to_le_bytes());
}

/// Checks what [`put_kind`] has written.
pub(crate) fn take_kind(reader: &mut Reader<'_>, magic: [u8; 8]) -> Result<(), Wrong> {
    if reader.array::<8>()? != magic {
        return Err(Wrong::Damaged("it does not begin as it must"));
    }
    if reader.u16()? != VERSION {
        return Err(Wrong::Newer("its version is unknown"));
    }
    reader.zeroes(2)?;
    match reader.u32()? {
        0 => Ok(()),
        _ => Err(Wrong::Newer("it uses unknown features")),
    }
}

/// The version of roots and log objects.
const VERSION: u16 = 1;
