//! Garbage collection: how much of each object is needed, and the deletion of what is not.
//!
//! A checkpoint counts. What is dead in the checkpoint that the newest root names is deleted,
//! unless a snapshot needs it. `docs/format.md` has the rules.

mod clean;
mod counts;
mod sweep;
#[cfg(test)]
mod tests;

pub(crate) use clean::{Cleaner, Cleaning};
pub(crate) use counts::{Counts, each_frame};
pub(crate) use sweep::Sweep;
