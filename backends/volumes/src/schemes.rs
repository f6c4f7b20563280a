//! The schemes, one file each.

pub(crate) mod dir;
pub(crate) mod exec;
pub(crate) mod file;
pub(crate) mod memory;
pub(crate) mod nbd;
pub(crate) mod null;
mod objects;
pub(crate) mod s3;
