//! Maps from ranges of blocks to values.
