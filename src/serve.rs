//! What `sheave serve` is made of: where it listens, what it offers, and how that changes.

pub(crate) mod listeners;
pub(crate) mod prepare;
pub(crate) mod run;
pub(crate) mod settings;
pub(crate) mod tls_watch;
