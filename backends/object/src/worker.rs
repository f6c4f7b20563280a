//! The thread that uploads and fetches.
