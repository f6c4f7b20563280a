//! The header of a journal segment.
