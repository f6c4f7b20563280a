//! An S3 store on a socket of this machine, for tests and figures.
//!
//! It answers the requests that Sheave makes of a store, and few others: buckets, PutObject with
//! conditions, GetObject with a range, HeadObject, ListObjects in both versions, DeleteObject.
//! Path style, HTTP/1.1 without TLS. It checks signatures (version 4) and the digests in them.
//!
//! What stores do is set while it runs: latency and bandwidth per connection, outages, faults by
//! rule ([`Fault`]), stores that ignore conditions or race them ([`Conditions`]), another clock,
//! another region. Every request is in a log ([`Record`]) and counted by kind.
//!
//! Objects are in memory or in a directory. None of them is on stable storage.
#![forbid(unsafe_code)]

mod answer;
mod body;
mod client;
mod date;
mod emulator;
mod fault;
mod log;
mod objects;
mod random;
mod request;
mod service;
mod settings;
mod signature;

pub use client::{Client, Reply};
pub use emulator::Emulator;
pub use fault::{Effect, Fault};
pub use log::{Count, Counts, Kind, Record};
pub use settings::{Access, Conditions, Outage, Settings};
