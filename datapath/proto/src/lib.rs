//! The NBD protocol, both sides, without I/O: bytes go in, bytes and decisions come out.
//!
//! A server makes a [`ServerHandshake`] for each connection and feeds it until it yields
//! [`Negotiated`]; from then on it decodes a [`Request`], asks [`Negotiated::check`] for the
//! [`Verdict`] and answers with the functions of [`reply`] and [`read_chunks`]. A client makes a
//! [`ClientHandshake`] and then a [`Client`], which encodes ops and decodes replies.
#![forbid(unsafe_code)]

mod bytes;
mod client;
mod context;
mod coverage;
mod decoder;
mod exports;
mod negotiated;
pub mod reply;
mod request;
mod server;
mod sparse;
pub mod uri;
mod verdict;
pub mod wire;

pub use client::{
    Answer, CLIENT_IN_FLIGHT_MAX, CONTEXTS_MAX, Client, ClientConfig, ClientError, ClientEvent,
    ClientHandshake, ClientNegotiated, ClientNext, ClientStep, Cookie, ExportEntry, Goal,
    OPTION_REPLIES_MAX, OPTION_REPLY_LEN_MAX, PayloadPlace, REPLY_ERRORS_MAX, ServerError,
};
pub use context::{ContextSet, MetaContext};
pub use coverage::{COVERAGE_GAPS_MAX, ReadCoverage};
pub use decoder::{Decoded, REPLY_LEN_MAX, ReplyBody, ReplyDecoder, ReplyError, ReplyEvent};
pub use exports::{Export, ExportInfo, Exports};
pub use negotiated::{
    Negotiated, advertised_block, check_exportable, minimum_block, transmission_flags,
};
pub use reply::{ReplyTo, StatusQuery};
pub use request::{BadMagic, Request};
pub use server::{
    CloseReason, HandshakeLimits, Next, OPTION_LEN_MAX, OPTION_SKIP_MAX, OPTIONS_MAX,
    ServerHandshake, Step, TlsMode,
};
pub use sparse::{HOLE_LEN_MIN, ReadChunk, read_chunks};
pub use verdict::{PAYLOAD_SKIP_MAX, Verdict};
pub use wire::{ReplyStyle, STRING_LEN_MAX};
