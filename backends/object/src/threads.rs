//! Threads for calls that wait.
