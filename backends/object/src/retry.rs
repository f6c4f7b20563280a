//! Tries requests again.
