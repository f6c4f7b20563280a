//! The server's answers to options.

use crate::bytes::{Put, Reader, as_string, truncated};
use crate::context::{ContextSet, MetaContext};
use crate::exports::{ExportInfo, Exports};
use crate::negotiated::{Negotiated, advertised_block, check_exportable, transmission_flags};
use crate::wire::{
    EXPORT_NAME_PADDING_LEN, ReplyStyle, STRING_LEN_MAX, info_type, option, reply_type,
};

use super::{Agreed, CloseReason, Next, ServerHandshake, TlsMode, put_reply};

/// Type and message of an error.
type Refusal = (u32, &'static str);

const MALFORMED: Refusal = (reply_type::ERR_INVALID, "malformed option");
const HAS_DATA: Refusal = (reply_type::ERR_INVALID, "this option has no data");
const NO_SUCH_EXPORT: Refusal = (reply_type::ERR_UNKNOWN, "no such export");
const TLS_REQUIRED: Refusal = (reply_type::ERR_TLS_REQD, "start TLS first");
const SHUTTING_DOWN: Refusal = (reply_type::ERR_SHUTDOWN, "the server is shutting down");
const UNSUPPORTED: Refusal = (reply_type::ERR_UNSUP, "unknown option");
const TOO_BIG: Refusal = (reply_type::ERR_TOO_BIG, "the option's data is too long");

impl ServerHandshake {
    /// Answers an option whose data has arrived.
    pub(super) fn option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
    ) -> (Vec<u8>, Next) {
        let mut out = Vec::new();
        let next = match self.admit(option) {
            // These two have answers of other forms.
            _ if option == option::EXPORT_NAME => self.export_name(data, exports, &mut out),
            Ok(()) => self.dispatch(option, data, exports, &mut out),
            Err(refusal) => Err(refusal),
        };
        let next = next.unwrap_or_else(|(kind, message)| {
            put_reply(&mut out, option, kind, message.as_bytes());
            Next::NeedMore
        });
        (out, next)
    }

    /// Answers an option whose data was too long to be decoded.
    pub(super) fn oversized(&mut self, option: u32) -> (Vec<u8>, Next) {
        let mut out = Vec::new();
        if option == option::ABORT {
            put_reply(&mut out, option, reply_type::ACK, &[]);
            return (out, Next::Close(CloseReason::Aborted));
        }
        if option == option::SET_META_CONTEXT {
            self.agreed.contexts = None;
        }
        let (kind, message) = match (self.admit(option), option) {
            (Err(refusal), _) => refusal,
            (Ok(()), option::LIST | option::STARTTLS) => HAS_DATA,
            (Ok(()), option::STRUCTURED_REPLY | option::EXTENDED_HEADERS) => HAS_DATA,
            (Ok(()), option::INFO | option::GO) => TOO_BIG,
            (Ok(()), option::LIST_META_CONTEXT | option::SET_META_CONTEXT) => TOO_BIG,
            (Ok(()), _) => UNSUPPORTED,
        };
        put_reply(&mut out, option, kind, message.as_bytes());
        (out, Next::NeedMore)
    }

    /// Whether the option is permitted now.
    fn admit(&self, option: u32) -> Result<(), Refusal> {
        match option {
            option::ABORT => Ok(()),
            _ if self.is_shutting_down => Err(SHUTTING_DOWN),
            option::STARTTLS => Ok(()),
            _ if self.mode == TlsMode::Forced && !self.is_tls => Err(TLS_REQUIRED),
            _ => Ok(()),
        }
    }

    fn dispatch(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Next, Refusal> {
        match option {
            option::ABORT => {
                put_reply(out, option, reply_type::ACK, &[]);
                return Ok(Next::Close(CloseReason::Aborted));
            }
            option::LIST => self.list(data, exports, out)?,
            option::STARTTLS => return self.start_tls(data, out),
            option::INFO => _ = self.info(option, data, exports, out)?,
            option::GO => {
                let negotiated = self.info(option, data, exports, out)?;
                put_reply(out, option, reply_type::ACK, &[]);
                return Ok(Next::Transmission(Box::new(negotiated)));
            }
            option::STRUCTURED_REPLY => self.structured_reply(data)?,
            option::LIST_META_CONTEXT => self.list_meta_context(data, exports, out)?,
            option::SET_META_CONTEXT => self.set_meta_context(data, exports, out)?,
            option::EXTENDED_HEADERS => self.extended_headers(data)?,
            _ => return Err(UNSUPPORTED),
        }
        put_reply(out, option, reply_type::ACK, &[]);
        Ok(Next::NeedMore)
    }

    fn list(&self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err(HAS_DATA);
        }
        if !exports.may_list() {
            return Err((reply_type::ERR_POLICY, "listing exports is not allowed"));
        }
        for export in (0..exports.len()).filter_map(|index| exports.export(index)) {
            if self.is_visible(&export) {
                let mut entry = Vec::new();
                entry.put_string(truncated(export.name, STRING_LEN_MAX));
                let description = truncated(export.description, STRING_LEN_MAX);
                entry.extend_from_slice(description.as_bytes());
                put_reply(out, option::LIST, reply_type::SERVER, &entry);
            }
        }
        Ok(())
    }

    fn start_tls(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<Next, Refusal> {
        if !data.is_empty() {
            return Err(HAS_DATA);
        }
        if self.is_tls {
            return Err((reply_type::ERR_INVALID, "TLS has already been started"));
        }
        if !self.client.fixed_newstyle {
            return Err((reply_type::ERR_INVALID, "TLS needs fixed newstyle negotiation"));
        }
        if self.mode == TlsMode::Off {
            return Err((reply_type::ERR_POLICY, "this server does not do TLS"));
        }
        put_reply(out, option::STARTTLS, reply_type::ACK, &[]);
        Ok(Next::StartTls)
    }

    /// The answer to `INFO` and `GO`.
    fn info(
        &self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Negotiated, Refusal> {
        let (name, wanted) = parse_info(data).ok_or(MALFORMED)?;
        let (index, export) = self.find(name, exports)?;
        let block_size_asked = wanted.contains(&info_type::BLOCK_SIZE);
        let negotiated = self.negotiate(index, name, &export, block_size_asked)?;
        if option == option::GO {
            exports.admit(index).map_err(|message| (reply_type::ERR_POLICY, message))?;
        }
        let mut info = |kind: u16, fill: &dyn Fn(&mut Vec<u8>)| {
            let mut reply = Vec::new();
            reply.put_u16(kind);
            fill(&mut reply);
            put_reply(out, option, reply_type::INFO, &reply);
        };
        info(info_type::EXPORT, &|reply| {
            reply.put_u64(export.size);
            reply.put_u16(negotiated.transmission_flags);
        });
        if wanted.contains(&info_type::NAME) {
            let name = truncated(export.name, STRING_LEN_MAX);
            info(info_type::NAME, &|reply| reply.extend_from_slice(name.as_bytes()));
        }
        if wanted.contains(&info_type::DESCRIPTION) && !export.description.is_empty() {
            let text = truncated(export.description, STRING_LEN_MAX);
            info(info_type::DESCRIPTION, &|reply| reply.extend_from_slice(text.as_bytes()));
        }
        info(info_type::BLOCK_SIZE, &|reply| {
            // A client that does not ask promises nothing; requests of any alignment are served.
            reply.put_u32(if block_size_asked {
                advertised_block(export.info, export.size)
            } else {
                1
            });
            reply.put_u32(export.info.block.preferred);
            reply.put_u32(export.info.block.maximum_payload);
        });
        Ok(negotiated)
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err(HAS_DATA);
        }
        if self.agreed.style == ReplyStyle::Extended {
            let message = "extended headers have already been negotiated";
            return Err((reply_type::ERR_EXT_HEADER_REQD, message));
        }
        self.agreed.style = ReplyStyle::Structured;
        Ok(())
    }

    fn extended_headers(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err(HAS_DATA);
        }
        self.agreed.style = ReplyStyle::Extended;
        Ok(())
    }

    fn list_meta_context(
        &self,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let (name, queries) = parse_queries(data).ok_or(MALFORMED)?;
        self.check_known(name, exports)?;
        for context in MetaContext::ALL {
            if queries.is_empty() || queries.iter().any(|query| context.is_listed_by(query)) {
                put_context(out, option::LIST_META_CONTEXT, 0, context);
            }
        }
        Ok(())
    }

    fn set_meta_context(
        &mut self,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        self.agreed.contexts = None;
        if self.agreed.style == ReplyStyle::Simple {
            let message = "contexts need structured replies or extended headers";
            return Err((reply_type::ERR_INVALID, message));
        }
        let (name, queries) = parse_queries(data).ok_or(MALFORMED)?;
        self.check_known(name, exports)?;
        let mut selected = ContextSet::EMPTY;
        for context in MetaContext::ALL {
            if queries.iter().any(|query| context.is_set_by(query)) {
                selected.insert(context);
                put_context(out, option::SET_META_CONTEXT, context.id(), context);
            }
        }
        self.agreed.contexts = Some((name.to_owned(), selected));
        Ok(())
    }

    /// The old option to choose an export, without a way to report errors.
    fn export_name(
        &self,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Next, Refusal> {
        let choose = || {
            self.admit(option::EXPORT_NAME)?;
            if self.agreed.style == ReplyStyle::Extended {
                return Err((reply_type::ERR_INVALID, "extended headers forbid it"));
            }
            let name = as_string(data).ok_or(MALFORMED)?;
            let (index, export) = self.find(name, exports)?;
            exports.admit(index).map_err(|message| (reply_type::ERR_POLICY, message))?;
            self.negotiate(index, name, &export, false)
        };
        Ok(match choose() {
            Ok(negotiated) => {
                out.put_u64(negotiated.size);
                out.put_u16(negotiated.transmission_flags);
                if !self.client.no_zeroes {
                    out.extend_from_slice(&[0; EXPORT_NAME_PADDING_LEN]);
                }
                Next::Transmission(Box::new(negotiated))
            }
            Err((_, message)) => Next::Close(CloseReason::ExportName(message)),
        })
    }

    fn negotiate(
        &self,
        index: usize,
        name: &str,
        export: &ExportInfo<'_>,
        block_size_asked: bool,
    ) -> Result<Negotiated, Refusal> {
        check_exportable(export.info, export.size)
            .map_err(|message| (reply_type::ERR_PLATFORM, message))?;
        let Agreed { style, contexts } = &self.agreed;
        let contexts = match contexts {
            Some((set_for, contexts)) if set_for == name => *contexts,
            _ => ContextSet::EMPTY,
        };
        Ok(Negotiated {
            export: index,
            style: *style,
            contexts,
            block_size_asked,
            transmission_flags: transmission_flags(export.info, *style, contexts),
            size: export.size,
            info: export.info.clone(),
            tls: self.is_tls,
        })
    }

    /// Finds an export for transmission. Without TLS an export that needs it looks like one that
    /// does not exist.
    fn find<'a>(
        &self,
        name: &str,
        exports: &'a dyn Exports,
    ) -> Result<(usize, ExportInfo<'a>), Refusal> {
        let found = exports.find(name).and_then(|index| Some((index, exports.export(index)?)));
        match found {
            Some((index, export)) if self.is_visible(&export) => Ok((index, export)),
            _ if self.mode == TlsMode::Selective && !self.is_tls => Err(TLS_REQUIRED),
            _ => Err(NO_SUCH_EXPORT),
        }
    }

    fn check_known(&self, name: &str, exports: &dyn Exports) -> Result<(), Refusal> {
        self.find(name, exports).map(|_| ()).map_err(|_| NO_SUCH_EXPORT)
    }

    fn is_visible(&self, export: &ExportInfo<'_>) -> bool {
        self.is_tls || !export.tls_only
    }
}

/// The export name and the requested information of `INFO` and `GO`.
fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Reader::new(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let wanted = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
    fields.is_empty().then_some((name, wanted))
}

/// Export name and queries of the two options about metadata contexts.
fn parse_queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Reader::new(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.is_empty().then_some((name, queries))
}

fn put_context(out: &mut Vec<u8>, option: u32, id: u32, context: MetaContext) {
    let mut reply = Vec::new();
    reply.put_u32(id);
    reply.extend_from_slice(context.name().as_bytes());
    put_reply(out, option, reply_type::META_CONTEXT, &reply);
}
