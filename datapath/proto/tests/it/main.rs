//! Tests of the protocol from outside. A test's name begins with the part of the specification
//! that it holds us to: `h2` is the second rule of the handshake, `o7` option 7, `t8` transmission
//! flag bit 8, `f5` command flag bit 5, `c6` command 6, `r4` the fourth rule of replies.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod blocks;
mod bodies;
mod client;
mod client_body;
mod commands;
mod decoder;
mod foreign;
mod golden;
mod handshake;
mod lies;
mod options;
mod peer;
mod replies;
mod roundtrip;
mod seeded;
mod support;
mod tls;
mod transmission;
