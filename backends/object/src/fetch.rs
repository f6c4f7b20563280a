//! Reads blocks from log objects.
