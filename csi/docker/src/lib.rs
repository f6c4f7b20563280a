//! The volume plugin of Docker (its documents "Docker Plugin API" and "Docker volume plugins").
//!
//! A volume that Docker knows has a record on this node: which volume of a pool it is, how it is
//! mounted, and the references, which are the ids by which Docker mounts it for its containers. It
//! is staged at its mount point while there are references.
//!
//! - A reference is on stable storage before Docker has the mount point, and gone from it before
//!   the volume is unstaged. A volume that is staged without references is unstaged later.
//! - References do not outlive a start of the node: no container does.
//! - A mount whose caller has left before its answer is undone (`answering.rs`).
//! - A reference whose process of Docker has ended, or whose answer may not have arrived, is
//!   forgotten when no container has the volume, as the mounts of all processes show.
//! - Calls about one volume wait for each other. One plugin has the records, by a lock (`lock.rs`).
#![forbid(unsafe_code)]

mod answering;
mod body;
mod caller;
mod lock;
mod options;
mod plugin;
mod record;
mod server;
mod tls;

pub use caller::Caller;
pub use plugin::{Plugin, Scope, Settings};
pub use server::serve;
pub use tls::TlsListener;
pub use tokio_rustls::TlsAcceptor;
