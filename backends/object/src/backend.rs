//! The volume's backend in a shard.
