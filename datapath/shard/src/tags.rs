//! Tags of ops: the connection or queue, and its request.

use sheave_core::{OWN_BITS, Tag};

/// Bits of a tag for the request. The bits above are for the connection or queue.
const REQUEST_BITS: u32 = 32;
/// The most connections, and the most queues, for which a tag has room.
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

/// The owner of a queue's tags.
pub(crate) fn owner_of(queue: u32) -> u32 {
    queue | QUEUE
}

/// The queue that is a tag's owner, if it is not a connection.
pub(crate) fn queue_of(owner: u32) -> Option<usize> {
    (owner & QUEUE != 0).then_some((owner & !QUEUE) as usize)
}
