//! The options that a client sends, in order, and the handling of their replies.

use std::mem;

use sheave_core::BlockSizes;

use crate::bytes::{Put, Reader, as_string};
use crate::wire::{
    MINIMUM_BLOCK_MAX, PREFERRED_BLOCK_MIN, ReplyStyle, STRING_LEN_MAX, info_type, magic, option,
    reply_type, transmission_flag,
};

use super::{
    CONTEXTS_MAX, ClientError, ClientHandshake, ClientNegotiated, ClientNext, ExportEntry, Found,
    Goal, State,
};

impl ClientHandshake {
    pub(super) fn first_option(&mut self, out: &mut Vec<u8>) {
        if self.config.tls {
            self.send(option::STARTTLS, &[], out);
        } else {
            self.after_tls(out);
        }
    }

    pub(super) fn after_tls(&mut self, out: &mut Vec<u8>) {
        match (self.config.goal, self.config.style) {
            (Goal::List, _) => self.send(option::LIST, &[], out),
            (_, ReplyStyle::Extended) => self.send(option::EXTENDED_HEADERS, &[], out),
            (_, ReplyStyle::Structured) => self.send(option::STRUCTURED_REPLY, &[], out),
            (_, ReplyStyle::Simple) => self.send_goal(out),
        }
    }

    /// The fallback for servers without newer options.
    pub(super) fn send_export_name(&mut self, out: &mut Vec<u8>) {
        let name = mem::take(&mut self.config.export);
        self.send(option::EXPORT_NAME, name.as_bytes(), out);
        self.state = State::ExportNameReply;
        self.config.export = name;
    }

    /// Takes a whole reply.
    pub(super) fn reply(
        &mut self,
        option: u32,
        kind: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ClientNext, ClientError> {
        self.state = State::ReplyHeader { option };
        if kind & reply_type::ERROR_BIT != 0 {
            return self.refused(option, kind, data, out);
        }
        match (option, kind) {
            (_, reply_type::ACK) if data.is_empty() => self.acknowledged(option, out),
            (_, reply_type::ACK) => Err(ClientError::Violation("an acknowledgement with data")),
            (option::LIST, reply_type::SERVER) => {
                let entry = parse_entry(data);
                self.entries.push(entry.ok_or(ClientError::Violation("a malformed list entry"))?);
                Ok(ClientNext::NeedMore)
            }
            (option::GO | option::INFO, reply_type::INFO) => {
                self.found.take_info(data)?;
                Ok(ClientNext::NeedMore)
            }
            (option::SET_META_CONTEXT, reply_type::META_CONTEXT) => {
                self.found.take_context(data, Listing::Selected)?;
                Ok(ClientNext::NeedMore)
            }
            (option::LIST_META_CONTEXT, reply_type::META_CONTEXT) => {
                self.found.take_context(data, Listing::Offered)?;
                Ok(ClientNext::NeedMore)
            }
            _ => Err(ClientError::Violation("a reply that does not fit its option")),
        }
    }

    fn acknowledged(&mut self, option: u32, out: &mut Vec<u8>) -> Result<ClientNext, ClientError> {
        match option {
            option::STARTTLS => return Ok(ClientNext::StartTls),
            option::EXTENDED_HEADERS => {
                self.style = ReplyStyle::Extended;
                self.send_contexts(out);
            }
            option::STRUCTURED_REPLY => {
                self.style = ReplyStyle::Structured;
                self.send_contexts(out);
            }
            option::SET_META_CONTEXT | option::LIST_META_CONTEXT => self.send_goal(out),
            option::GO => return Ok(ClientNext::Ready(Box::new(self.negotiated()?))),
            option::INFO => {
                let negotiated = self.negotiated()?;
                put_option(option::ABORT, &[], out);
                return Ok(ClientNext::Info(Box::new(negotiated)));
            }
            _ => {
                put_option(option::ABORT, &[], out);
                return Ok(ClientNext::Listed(mem::take(&mut self.entries)));
            }
        }
        Ok(ClientNext::NeedMore)
    }

    /// An error ends the handshake, unless there is a fallback.
    fn refused(
        &mut self,
        option: u32,
        code: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<ClientNext, ClientError> {
        let is_final = matches!(code, reply_type::ERR_SHUTDOWN | reply_type::ERR_TLS_REQD);
        match option {
            option::EXTENDED_HEADERS if !is_final => {
                self.send(option::STRUCTURED_REPLY, &[], out);
            }
            option::STRUCTURED_REPLY if !is_final => self.send_goal(out),
            option::SET_META_CONTEXT | option::LIST_META_CONTEXT if !is_final => {
                self.found.contexts.clear();
                self.send_goal(out);
            }
            option::GO if code == reply_type::ERR_UNSUP && self.style != ReplyStyle::Extended => {
                self.send_export_name(out);
            }
            _ => {
                put_option(option::ABORT, &[], out);
                let text = String::from_utf8_lossy(&data[..data.len().min(STRING_LEN_MAX)]);
                let message = text.into_owned();
                return Err(ClientError::Refused { option, code, message });
            }
        }
        Ok(ClientNext::NeedMore)
    }

    /// Selects metadata contexts, or lists them for [`Goal::Info`]. Without a query the list has
    /// all of them (proto.md, "NBD_OPT_LIST_META_CONTEXT").
    fn send_contexts(&mut self, out: &mut Vec<u8>) {
        let option = match self.config.goal {
            Goal::Info => option::LIST_META_CONTEXT,
            _ if self.config.contexts.is_empty() => return self.send_goal(out),
            _ => option::SET_META_CONTEXT,
        };
        let mut data = Vec::new();
        data.put_string(&self.config.export);
        data.put_u32(u32::try_from(self.config.contexts.len()).expect("at most CONTEXTS_MAX"));
        for query in &self.config.contexts {
            data.put_string(query);
        }
        self.send(option, &data, out);
    }

    fn send_goal(&mut self, out: &mut Vec<u8>) {
        let mut wanted = vec![info_type::NAME, info_type::DESCRIPTION];
        if self.config.block_sizes {
            wanted.push(info_type::BLOCK_SIZE);
        }
        let mut data = Vec::new();
        data.put_string(&self.config.export);
        data.put_u16(u16::try_from(wanted.len()).expect("three at most"));
        wanted.iter().for_each(|kind| data.put_u16(*kind));
        let option = if self.config.goal == Goal::Go { option::GO } else { option::INFO };
        self.send(option, &data, out);
    }

    fn send(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        put_option(option, data, out);
        self.replies = 0;
        self.state = State::ReplyHeader { option };
    }

    pub(super) fn negotiated(&mut self) -> Result<ClientNegotiated, ClientError> {
        let found = mem::take(&mut self.found);
        let (size, flags) = found
            .size_and_flags
            .ok_or(ClientError::Violation("it did not tell the size of the export"))?;
        if flags & transmission_flag::HAS_FLAGS == 0 {
            return Err(ClientError::Violation("transmission flags that say there are none"));
        }
        Ok(ClientNegotiated {
            style: self.style,
            size,
            transmission_flags: meaningful_flags(flags, self.style),
            block: found.block.unwrap_or_default(),
            block_sizes_told: found.block.is_some(),
            contexts: found.contexts,
            name: found.name,
            description: found.description,
            tls: self.is_tls,
        })
    }
}

impl Found {
    fn take_info(&mut self, data: &[u8]) -> Result<(), ClientError> {
        const MALFORMED: ClientError =
            ClientError::Violation("malformed information about the export");
        let mut fields = Reader::new(data);
        let kind = fields.u16().ok_or(MALFORMED)?;
        match kind {
            info_type::EXPORT if data.len() == 12 => {
                self.size_and_flags = fields.u64().zip(fields.u16());
            }
            info_type::BLOCK_SIZE if data.len() == 14 => {
                let mut read = || Some((fields.u32()?, fields.u32()?, fields.u32()?));
                let (minimum, preferred, maximum_payload) = read().ok_or(MALFORMED)?;
                let logical = minimum.max(PREFERRED_BLOCK_MIN);
                let block = BlockSizes { minimum, logical, preferred, maximum_payload };
                self.block = Some(checked(block)?);
            }
            info_type::EXPORT | info_type::BLOCK_SIZE => return Err(MALFORMED),
            info_type::NAME => self.name = Some(text(fields.rest()).ok_or(MALFORMED)?),
            info_type::DESCRIPTION => {
                self.description = Some(text(fields.rest()).ok_or(MALFORMED)?);
            }
            // Servers may send more than requested.
            _ => {}
        }
        Ok(())
    }

    fn take_context(&mut self, data: &[u8], listing: Listing) -> Result<(), ClientError> {
        const MALFORMED: ClientError = ClientError::Violation("a malformed metadata context");
        let mut fields = Reader::new(data);
        let id = fields.u32().ok_or(MALFORMED)?;
        let name = text(fields.rest()).ok_or(MALFORMED)?;
        // The ids in a list mean nothing.
        let is_selected = listing == Listing::Selected;
        if is_selected && self.contexts.iter().any(|(known, _)| *known == id) {
            return Err(ClientError::Violation("two metadata contexts with one id"));
        }
        if self.contexts.len() == CONTEXTS_MAX {
            return Err(ClientError::Violation("too many metadata contexts"));
        }
        self.contexts.push((id, name));
        Ok(())
    }
}

/// The use of a reply with a metadata context.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Listing {
    Selected,
    Offered,
}

fn put_option(option: u32, data: &[u8], out: &mut Vec<u8>) {
    out.put_u64(magic::OPTION);
    out.put_u32(option);
    out.put_u32(u32::try_from(data.len()).expect("options are short"));
    out.extend_from_slice(data);
}

fn parse_entry(data: &[u8]) -> Option<ExportEntry> {
    let mut fields = Reader::new(data);
    let name = fields.string()?.to_owned();
    let description = String::from_utf8_lossy(fields.rest()).into_owned();
    Some(ExportEntry { name, description })
}

fn text(data: &[u8]) -> Option<String> {
    as_string(data).map(str::to_owned)
}

fn checked(block: BlockSizes) -> Result<BlockSizes, ClientError> {
    let BlockSizes { minimum, preferred, maximum_payload, .. } = block;
    let is_valid = minimum.is_power_of_two()
        && minimum <= MINIMUM_BLOCK_MAX
        && preferred.is_power_of_two()
        && preferred >= minimum.max(PREFERRED_BLOCK_MIN)
        && maximum_payload >= preferred;
    is_valid.then_some(block).ok_or(ClientError::Violation("block sizes that cannot be"))
}

/// Drops flags that contradict the negotiation.
fn meaningful_flags(flags: u16, style: ReplyStyle) -> u16 {
    use transmission_flag as flag;
    let mut meaningless = 0;
    if flags & flag::SEND_WRITE_ZEROES == 0 {
        meaningless |= flag::SEND_FAST_ZERO;
    }
    if style == ReplyStyle::Simple {
        meaningless |= flag::SEND_DF;
    }
    if style != ReplyStyle::Extended {
        meaningless |= flag::BLOCK_STATUS_PAYLOAD;
    }
    flags & !meaningless
}
