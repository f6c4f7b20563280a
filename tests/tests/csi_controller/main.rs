//! The service Controller of `sheave csi`, beside a daemon on a stand-in for a kernel.

mod bad_input;
mod client;
mod pools;
mod races;
mod rules;
mod volumes;
