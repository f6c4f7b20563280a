//! The server in this process, used over unix sockets and TCP by a client that accepts replies in
//! any order. Most tests run over both engines.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

mod awkward;
mod conformance;
mod elsewhere;
mod growth;
mod hostile;
mod layers;
mod limits;
mod listen;
mod model;
mod sizes;
mod sockets;
mod starved;
mod stats;
mod stop;
mod tls;
mod waiting;
