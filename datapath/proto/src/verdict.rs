//! What is to be done with a request. On the hot path: no allocation, no surprise.

use sheave_core::{ByteRange, NbdErrno};

use crate::bytes::Reader;
use crate::context::{ContextSet, MetaContext};
use crate::negotiated::{Negotiated, minimum_block};
use crate::request::Request;
use crate::wire::{ReplyStyle, command, command_flag, transmission_flag};

/// A rejected write with a longer payload than this, in bytes, ends the connection; shorter ones
/// are consumed, so that the client can read why.
pub const PAYLOAD_SKIP_MAX: u64 = 128 << 20;

/// What is to be done with a request. Ranges lie inside the volume and are not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Answer with the bytes of the range.
    Read {
        /// What to read.
        range: ByteRange,
        /// Answer in one chunk.
        df: bool,
    },
    /// Write the payload of `range.len()` bytes, which follows on the wire.
    Write {
        /// Where to write.
        range: ByteRange,
        /// Answer only when it is stable.
        fua: bool,
    },
    /// Make all that was answered stable.
    Flush,
    /// The range is no longer needed.
    Trim {
        /// What to discard.
        range: ByteRange,
        /// Answer only when it is stable.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// What to zero.
        range: ByteRange,
        /// Answer only when it is stable.
        fua: bool,
        /// Keep it allocated.
        no_hole: bool,
        /// Fail with `ENOTSUP` where it is not faster than a write.
        fast: bool,
    },
    /// The range will be read soon.
    Cache {
        /// What to prefetch.
        range: ByteRange,
    },
    /// Answer with one block status chunk for each context.
    BlockStatus {
        /// What to describe.
        range: ByteRange,
        /// With one extent only.
        req_one: bool,
        /// The contexts, at least one.
        contexts: ContextSet,
    },
    /// Receive the payload, then ask [`Negotiated::block_status_filter`].
    BlockStatusFilter {
        /// Bytes of payload that follow on the wire; few.
        payload_len: u32,
    },
    /// Nothing to do: answer with success.
    Done,
    /// Finish what is in flight, then close the connection. There is no answer.
    Disconnect,
    /// Consume `skip` bytes, then answer with the error.
    Refuse {
        /// The error.
        error: NbdErrno,
        /// Why, for the client's user.
        message: &'static str,
        /// Bytes of payload that follow on the wire.
        skip: u64,
    },
    /// Close the connection at once, for this reason.
    Drop(&'static str),
}

/// Why a request is refused.
type Refusal = (NbdErrno, &'static str);

impl Negotiated {
    /// Decides on a request.
    #[must_use]
    pub fn check(&self, request: &Request) -> Verdict {
        let payload_len = request.payload_len(self.style);
        if payload_len > u64::from(self.info.block.maximum_payload) {
            return self.check_oversized(payload_len);
        }
        let decided = match request.command {
            command::READ => self.check_read(request),
            command::WRITE => self.check_write(request),
            command::DISC => return Verdict::Disconnect,
            command::FLUSH => self.check_flush(request),
            command::TRIM => self.check_trim(request),
            command::CACHE => self.check_cache(request),
            command::WRITE_ZEROES => self.check_write_zeroes(request),
            command::BLOCK_STATUS => self.check_block_status(request),
            _ => Err((NbdErrno::Inval, "unknown command")),
        };
        decided.unwrap_or_else(|(error, message)| Verdict::Refuse {
            error,
            message,
            skip: payload_len,
        })
    }

    /// Decides on a block status request whose payload has arrived: a range length, then the ids
    /// of the contexts that the client wants. Without ids there is nothing to tell.
    #[must_use]
    pub fn block_status_filter(&self, request: &Request, payload: &[u8]) -> Verdict {
        self.filtered(request, payload).unwrap_or_else(|(error, message)| Verdict::Refuse {
            error,
            message,
            skip: 0,
        })
    }

    fn check_oversized(&self, payload_len: u64) -> Verdict {
        if self.style == ReplyStyle::Extended || payload_len > PAYLOAD_SKIP_MAX {
            return Verdict::Drop("the payload is longer than any that is allowed");
        }
        let message = "the payload is longer than the maximum";
        Verdict::Refuse { error: NbdErrno::Inval, message, skip: payload_len }
    }

    fn check_read(&self, request: &Request) -> Result<Verdict, Refusal> {
        let df_allowed = if self.has(transmission_flag::SEND_DF) { command_flag::DF } else { 0 };
        self.check_flags(request, df_allowed)?;
        let df = request.flags & command_flag::DF != 0;
        let range = self.range(request, request.length, NbdErrno::Inval)?;
        if request.length > u64::from(self.info.block.maximum_payload) {
            let error = if df { NbdErrno::Overflow } else { NbdErrno::Inval };
            return Err((error, "the read is longer than the maximum payload"));
        }
        Ok(unless_empty(range, Verdict::Read { range, df }))
    }

    fn check_write(&self, request: &Request) -> Result<Verdict, Refusal> {
        let is_extended = self.style == ReplyStyle::Extended;
        let payload_flag = if is_extended { command_flag::PAYLOAD_LEN } else { 0 };
        self.check_flags(request, payload_flag)?;
        if request.flags & payload_flag != payload_flag {
            return Err((NbdErrno::Inval, "a write without the flag that announces its payload"));
        }
        self.check_writable()?;
        let range = self.range(request, request.length, NbdErrno::NoSpc)?;
        Ok(unless_empty(range, Verdict::Write { range, fua: is_fua(request) }))
    }

    fn check_flush(&self, request: &Request) -> Result<Verdict, Refusal> {
        self.check_flags(request, 0)?;
        self.check_advertised(transmission_flag::SEND_FLUSH)?;
        if request.offset != 0 || request.length != 0 {
            return Err((NbdErrno::Inval, "a flush has neither offset nor length"));
        }
        Ok(Verdict::Flush)
    }

    fn check_trim(&self, request: &Request) -> Result<Verdict, Refusal> {
        self.check_flags(request, 0)?;
        self.check_writable()?;
        self.check_advertised(transmission_flag::SEND_TRIM)?;
        let range = self.range(request, request.length, NbdErrno::Inval)?;
        Ok(unless_empty(range, Verdict::Trim { range, fua: is_fua(request) }))
    }

    fn check_cache(&self, request: &Request) -> Result<Verdict, Refusal> {
        self.check_flags(request, 0)?;
        self.check_advertised(transmission_flag::SEND_CACHE)?;
        let range = self.range(request, request.length, NbdErrno::Inval)?;
        Ok(unless_empty(range, Verdict::Cache { range }))
    }

    fn check_write_zeroes(&self, request: &Request) -> Result<Verdict, Refusal> {
        let fast_allowed = self.has(transmission_flag::SEND_FAST_ZERO);
        let fast_flag = if fast_allowed { command_flag::FAST_ZERO } else { 0 };
        self.check_flags(request, command_flag::NO_HOLE | fast_flag)?;
        self.check_writable()?;
        self.check_advertised(transmission_flag::SEND_WRITE_ZEROES)?;
        let range = self.range(request, request.length, NbdErrno::NoSpc)?;
        let verdict = Verdict::WriteZeroes {
            range,
            fua: is_fua(request),
            no_hole: request.flags & command_flag::NO_HOLE != 0,
            fast: request.flags & command_flag::FAST_ZERO != 0,
        };
        Ok(unless_empty(range, verdict))
    }

    fn check_block_status(&self, request: &Request) -> Result<Verdict, Refusal> {
        let filter_allowed = self.has(transmission_flag::BLOCK_STATUS_PAYLOAD);
        let filter_flag = if filter_allowed { command_flag::PAYLOAD_LEN } else { 0 };
        self.check_flags(request, command_flag::REQ_ONE | filter_flag)?;
        if self.contexts.is_empty() {
            return Err((NbdErrno::Inval, "no metadata context was negotiated"));
        }
        if request.flags & command_flag::PAYLOAD_LEN != 0 {
            return self.check_filter_len(request.length);
        }
        self.status_of(request, request.length, self.contexts)
    }

    /// A filter that names each context at most once cannot be longer than all of them.
    fn check_filter_len(&self, len: u64) -> Result<Verdict, Refusal> {
        let ids_max = self.contexts.len() as u64;
        let is_whole =
            len >= FILTER_HEAD_LEN && (len - FILTER_HEAD_LEN).is_multiple_of(FILTER_ID_LEN);
        match u32::try_from(len) {
            Ok(payload_len) if is_whole && len <= FILTER_HEAD_LEN + ids_max * FILTER_ID_LEN => {
                Ok(Verdict::BlockStatusFilter { payload_len })
            }
            _ => Err((NbdErrno::Inval, "a filter of the wrong length")),
        }
    }

    fn filtered(&self, request: &Request, payload: &[u8]) -> Result<Verdict, Refusal> {
        let malformed = (NbdErrno::Inval, "a filter of the wrong length");
        let mut fields = Reader::new(payload);
        let len = fields.u64().ok_or(malformed)?;
        let mut contexts = ContextSet::EMPTY;
        while !fields.is_empty() {
            let id = fields.u32().ok_or(malformed)?;
            let context = MetaContext::by_id(id).filter(|context| self.contexts.contains(*context));
            let context = context.ok_or((NbdErrno::Inval, "the filter has an unknown context"))?;
            if !contexts.insert(context) {
                return Err((NbdErrno::Inval, "the filter has a context twice"));
            }
        }
        self.status_of(request, len, contexts)
    }

    fn status_of(
        &self,
        request: &Request,
        len: u64,
        contexts: ContextSet,
    ) -> Result<Verdict, Refusal> {
        if len == 0 {
            return Err((NbdErrno::Inval, "the status of nothing"));
        }
        let range = self.range(request, len, NbdErrno::Inval)?;
        if contexts.is_empty() {
            return Ok(Verdict::Done);
        }
        let req_one = request.flags & command_flag::REQ_ONE != 0;
        Ok(Verdict::BlockStatus { range, req_one, contexts })
    }

    /// FUA is fine on every command once it was advertised, even where it means nothing.
    fn check_flags(&self, request: &Request, more_allowed: u16) -> Result<(), Refusal> {
        let fua = if self.has(transmission_flag::SEND_FUA) { command_flag::FUA } else { 0 };
        match request.flags & !(fua | more_allowed) {
            0 => Ok(()),
            _ => Err((NbdErrno::Inval, "a flag that is not valid for this command")),
        }
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        match self.info.read_only {
            true => Err((NbdErrno::Perm, "the export is read-only")),
            false => Ok(()),
        }
    }

    fn check_advertised(&self, flag: u16) -> Result<(), Refusal> {
        match self.has(flag) {
            true => Ok(()),
            false => Err((NbdErrno::Inval, "a command that the export does not have")),
        }
    }

    fn range(&self, request: &Request, len: u64, past_end: NbdErrno) -> Result<ByteRange, Refusal> {
        let range = ByteRange::within(request.offset, len, self.size)
            .map_err(|_| (past_end, "beyond the end of the export"))?;
        if self.block_size_asked
            && !range.is_aligned(u64::from(minimum_block(&self.info, self.size)))
        {
            return Err((NbdErrno::Inval, "not aligned to the minimum block size"));
        }
        Ok(range)
    }

    fn has(&self, flag: u16) -> bool {
        self.transmission_flags & flag != 0
    }
}

const FILTER_HEAD_LEN: u64 = 8;
const FILTER_ID_LEN: u64 = 4;

fn unless_empty(range: ByteRange, verdict: Verdict) -> Verdict {
    if range.is_empty() { Verdict::Done } else { verdict }
}

fn is_fua(request: &Request) -> bool {
    request.flags & command_flag::FUA != 0
}
