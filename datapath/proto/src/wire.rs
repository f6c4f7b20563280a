//! Numbers of the wire protocol: "proto.md" of the NBD project, with the extended headers of its
//! `extension-ext-header` branch. Every integer on the wire is big-endian.
#![expect(missing_docs, reason = "the specification's own names say it")]

use sheave_core::NbdErrno;

/// The port that IANA gave to NBD.
pub const PORT: u16 = 10809;
/// The longest string (export name, message, query) in bytes.
pub const STRING_LEN_MAX: usize = 4096;
/// Reserved zeroes after the reply to `EXPORT_NAME`, unless both sides agreed to leave them out.
pub const EXPORT_NAME_PADDING_LEN: usize = 124;
/// The largest minimum block size in bytes.
pub const MINIMUM_BLOCK_MAX: u32 = 64 << 10;
/// The smallest preferred block size in bytes.
pub const PREFERRED_BLOCK_MIN: u32 = 512;
/// The most descriptors in one block status chunk.
pub const BLOCK_STATUS_EXTENTS_MAX: usize = 1 << 20;
/// A read of this many bytes with the DF flag is never too long, nor is any other.
pub const PAYLOAD_MAX_MIN: u32 = 64 << 10;

/// Magic numbers.
pub mod magic {
    pub const NBD: u64 = 0x4e42_444d_4147_4943;
    pub const OPTION: u64 = 0x4948_4156_454f_5054;
    pub const OLD_STYLE: u64 = 0x0000_4202_8186_1253;
    pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
    pub const REQUEST: u32 = 0x2560_9513;
    pub const SIMPLE_REPLY: u32 = 0x6744_6698;
    pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
    pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
    pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;
}

/// Lengths in bytes of what begins every message.
pub mod header_len {
    pub const GREETING: usize = 18;
    pub const CLIENT_FLAGS: usize = 4;
    pub const OPTION: usize = 16;
    pub const OPTION_REPLY: usize = 20;
    pub const REQUEST: usize = 28;
    pub const EXTENDED_REQUEST: usize = 32;
    pub const SIMPLE_REPLY: usize = 16;
    pub const STRUCTURED_REPLY: usize = 20;
    pub const EXTENDED_REPLY: usize = 32;
}

/// Flags of the server's greeting; the client's flags have the same bits.
pub mod handshake_flag {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
    pub const ALL: u16 = FIXED_NEWSTYLE | NO_ZEROES;
}

/// Options.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const PEEK_EXPORT: u32 = 4;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod reply_type {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Types of information about an export.
pub mod info_type {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod transmission_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_RESIZE: u16 = 1 << 9;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Command codes.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    pub const RESIZE: u16 = 8;
}

/// Flags of commands.
pub mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks of a structured or extended reply.
pub mod chunk_type {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT | 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Flags of chunks.
pub mod chunk_flag {
    /// The last chunk of the reply.
    pub const DONE: u16 = 1 << 0;
}

/// Bits of a status in the context `base:allocation`.
pub mod allocation_status {
    pub const HOLE: u32 = 1 << 0;
    pub const ZERO: u32 = 1 << 1;
}

/// How requests and replies look after negotiation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReplyStyle {
    /// Compact requests, one simple reply each.
    #[default]
    Simple,
    /// Compact requests; replies are chunks.
    Structured,
    /// Requests with 64-bit lengths; replies are chunks with wide headers.
    Extended,
}

/// The error that a number on the wire stands for. Numbers that do not exist count as `EINVAL`, as
/// the specification wants it; quota and file size limits count as no space.
#[must_use]
pub fn errno_from_wire(value: u32) -> NbdErrno {
    const EFBIG: u32 = 27;
    const EDQUOT: u32 = 122;
    match value {
        1 => NbdErrno::Perm,
        5 => NbdErrno::Io,
        12 => NbdErrno::NoMem,
        28 | EFBIG | EDQUOT => NbdErrno::NoSpc,
        75 => NbdErrno::Overflow,
        95 => NbdErrno::NotSup,
        108 => NbdErrno::Shutdown,
        _ => NbdErrno::Inval,
    }
}

#[cfg(test)]
mod tests {
    use sheave_core::ErrorKind;

    use super::*;

    #[test]
    fn errors_survive_the_wire() {
        for kind in ErrorKind::ALL {
            let errno = kind.nbd_errno();
            assert_eq!(errno_from_wire(errno as u32), errno);
            assert_eq!(ErrorKind::of_nbd(errno).nbd_errno(), errno);
        }
    }

    #[test]
    fn errors_unknown_numbers_are_invalid_and_quota_is_no_space() {
        assert_eq!(errno_from_wire(0), NbdErrno::Inval);
        assert_eq!(errno_from_wire(7777), NbdErrno::Inval);
        assert_eq!(errno_from_wire(122), NbdErrno::NoSpc);
        assert_eq!(errno_from_wire(27), NbdErrno::NoSpc);
    }
}
