//! Sessions with the kernel's client, which has no handshake.

use std::sync::Arc;

use sheave_core::Volume;
use sheave_proto::{ContextSet, Negotiated, ReplyStyle, transmission_flags};
use sheave_shard::Session;

use crate::session::NbdSession;

/// A session in the transmission phase, as nbd.ko speaks it: simple replies, and requests of whole
/// logical blocks, which may be less than the volume's minimum. A layer below handles those. Unlike
/// other connections it follows the volume's size, since the kernel's device can grow.
#[must_use]
pub fn kernel_session(volume: Arc<dyn Volume>) -> Box<dyn Session> {
    let info = volume.info();
    let (style, contexts) = (ReplyStyle::Simple, ContextSet::EMPTY);
    let negotiated = Negotiated {
        export: 0,
        style,
        contexts,
        block_size_asked: false,
        transmission_flags: transmission_flags(info, style, contexts),
        size: volume.size(),
        info: info.clone(),
        tls: false,
    };
    Box::new(NbdSession::of_kernel(negotiated, volume))
}
