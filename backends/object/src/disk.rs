//! The worker's files: a trait, and the real ones.
