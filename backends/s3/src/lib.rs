//! Buckets as stores of object volumes, by the S3 protocol.
//!
//! ```text
//!  S3Store (a bucket, a prefix) ─▶ Connection (an endpoint, shared) ─▶ aws-sdk-s3
//! ```
//!
//! All requests run on one runtime of this crate, whatever polls their futures. The SDK tries each
//! request once; `sheave_object` tries again, as the kind of the error says (`failure`).
#![forbid(unsafe_code)]

mod connection;
mod failure;
mod pace;
mod store;

pub use connection::Endpoint;
pub use store::S3Store;
