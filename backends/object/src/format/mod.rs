//! The bytes that are stored, as `docs/format.md` draws them.

mod record;
mod segment;
mod superblock;
