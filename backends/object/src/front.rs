//! The state of an open volume: what is written, durable, committed and read where.
