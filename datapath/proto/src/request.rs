//! Requests of the transmission phase.
//!
//! ```text
//! compact   magic u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u32   28 bytes
//! extended  magic u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u64   32 bytes
//! ```

use sheave_core::Op;

use crate::bytes::{Put, Reader};
use crate::wire::{ReplyStyle, command, command_flag, header_len, magic};

/// The fixed part of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The client's identifier of it; replies echo it.
    pub cookie: u64,
    /// [`crate::wire::command_flag`]
    pub flags: u16,
    /// [`crate::wire::command`]
    pub command: u16,
    /// Its offset in the volume.
    pub offset: u64,
    /// Bytes of the volume that it touches or, with
    /// [`crate::wire::command_flag::PAYLOAD_LEN`], bytes that follow it on the wire.
    pub length: u64,
}

/// Client and server no longer agree where requests begin; the server has to disconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request begins with {0:#010x} instead of the magic number")]
pub struct BadMagic(pub u32);

impl Request {
    /// Length of a request's fixed part in bytes.
    #[must_use]
    pub const fn header_len(style: ReplyStyle) -> usize {
        match style {
            ReplyStyle::Simple | ReplyStyle::Structured => header_len::REQUEST,
            ReplyStyle::Extended => header_len::EXTENDED_REQUEST,
        }
    }

    /// Decodes a header of exactly [`Request::header_len`] bytes.
    ///
    /// # Errors
    /// [`BadMagic`].
    ///
    /// # Panics
    /// When `header` has another length: a bug of the caller.
    #[inline]
    pub fn decode(style: ReplyStyle, header: &[u8]) -> Result<Self, BadMagic> {
        assert_eq!(header.len(), Self::header_len(style), "a whole header");
        let mut fields = Reader::new(header);
        let mut decode = || {
            let found = fields.u32()?;
            if found != magic_of(style) {
                return Some(Err(BadMagic(found)));
            }
            let flags = fields.u16()?;
            let command = fields.u16()?;
            let cookie = fields.u64()?;
            let offset = fields.u64()?;
            let length = match style {
                ReplyStyle::Simple | ReplyStyle::Structured => u64::from(fields.u32()?),
                ReplyStyle::Extended => fields.u64()?,
            };
            Some(Ok(Self { cookie, flags, command, offset, length }))
        };
        decode().expect("the header's length was checked")
    }

    /// Appends the header.
    ///
    /// # Panics
    /// When the length does not fit into a compact header: a bug of the caller.
    pub fn encode(&self, style: ReplyStyle, out: &mut Vec<u8>) {
        out.put_u32(magic_of(style));
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        match style {
            ReplyStyle::Simple | ReplyStyle::Structured => {
                out.put_u32(u32::try_from(self.length).expect("compact lengths fit into 32 bits"));
            }
            ReplyStyle::Extended => out.put_u64(self.length),
        }
    }

    /// Bytes that follow the header on the wire. They must be consumed before the next request can
    /// be read, even if the request fails.
    #[inline]
    #[must_use]
    pub fn payload_len(&self, style: ReplyStyle) -> u64 {
        let has_payload = match style {
            ReplyStyle::Simple | ReplyStyle::Structured => self.command == command::WRITE,
            ReplyStyle::Extended => self.flags & command_flag::PAYLOAD_LEN != 0,
        };
        if has_payload { self.length } else { 0 }
    }
}

impl From<&Op> for Request {
    /// The request for an op, without a cookie and without the flag that announces a payload.
    fn from(op: &Op) -> Self {
        let flag = |on: bool, flag: u16| if on { flag } else { 0 };
        let (command, flags) = match op {
            Op::Read { .. } => (command::READ, 0),
            Op::Write { fua, .. } => (command::WRITE, flag(*fua, command_flag::FUA)),
            Op::Flush => (command::FLUSH, 0),
            Op::Trim { fua, .. } => (command::TRIM, flag(*fua, command_flag::FUA)),
            Op::WriteZeroes { fua, no_hole, fast, .. } => {
                let flags = flag(*fua, command_flag::FUA)
                    | flag(*no_hole, command_flag::NO_HOLE)
                    | flag(*fast, command_flag::FAST_ZERO);
                (command::WRITE_ZEROES, flags)
            }
            Op::Cache { .. } => (command::CACHE, 0),
            Op::BlockStatus { extents_max, .. } => {
                (command::BLOCK_STATUS, flag(*extents_max == 1, command_flag::REQ_ONE))
            }
        };
        let (offset, length) = op.range().map_or((0, 0), |range| (range.start(), range.len()));
        Self { cookie: 0, flags, command, offset, length }
    }
}

fn magic_of(style: ReplyStyle) -> u32 {
    match style {
        ReplyStyle::Simple | ReplyStyle::Structured => magic::REQUEST,
        ReplyStyle::Extended => magic::EXTENDED_REQUEST,
    }
}
