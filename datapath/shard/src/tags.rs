//! Tags of ops: whose connection or queue, and which request of it.

use sheave_core::{OWN_BITS, Tag};

/// Bits of a tag that tell the request. Those above tell the connection or queue.
const REQUEST_BITS: u32 = 32;
/// A tag has room for so many connections and as many queues.
pub(crate) const CONNECTIONS_MAX: u32 = 1 << (OWN_BITS - REQUEST_BITS - 1);

/// Connection and request in one tag, whose other bits are for layers.
pub(crate) fn tag(connection: u32, request: u32) -> Tag {
    debug_assert!(connection < 2 * CONNECTIONS_MAX);
    Tag(u64::from(connection) << REQUEST_BITS | u64::from(request))
}

/// The reverse of [`tag`].
pub(crate) fn untag(tag: Tag) -> (u32, u32) {
    ((tag.0 >> REQUEST_BITS) as u32, tag.0 as u32)
}

/// Marks the tags of queues, whose numbers overlap with those of connections.
const QUEUE: u32 = CONNECTIONS_MAX;

/// How the tags of a queue name it.
pub(crate) fn owner_of(queue: u32) -> u32 {
    queue | QUEUE
}

/// Which queue a tag's owner is, if it is none of the connections.
pub(crate) fn queue_of(owner: u32) -> Option<usize> {
    (owner & QUEUE != 0).then_some((owner & !QUEUE) as usize)
}
