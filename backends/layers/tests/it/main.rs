//! Layers over volumes, and the conformance suite over both.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod conformance;
mod layers;
mod races;
mod registered;
mod stacks;
