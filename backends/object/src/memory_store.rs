//! A store in memory, with faults, for tests.
