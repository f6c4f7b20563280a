//! Parts of `sheave serve`: its listeners, its exports, and their changes at run time.

pub(crate) mod listeners;
pub(crate) mod prepare;
pub(crate) mod run;
pub(crate) mod settings;
pub(crate) mod tls_watch;
