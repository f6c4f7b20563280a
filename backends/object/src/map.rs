//! The map of committed blocks: a fold of the log objects in the order of their numbers.
