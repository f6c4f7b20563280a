//! How large a ring is.

/// Sizes of a ring; each is the named maximum of a queue.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// Submission queue entries; the completion queue has eight times as many.
    pub entries: u32,
    /// Shared receive buffers of a few sockets.
    pub receive_buffers_min: u16,
    /// The most there are, a power of two: one for each socket up to that.
    pub receive_buffers_max: u16,
    /// Bytes in each of them.
    pub receive_buffer_len: usize,
    /// File requests in flight. As many threads of the kernel may block in them
    /// (io_uring_register(2)); by default, and before Linux 5.15, they are 4 a CPU: a few files
    /// whose storage hangs stop all others then.
    pub file_requests_max: usize,
    /// Sockets that can be registered; more are used unregistered.
    pub registered_max: u32,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self {
            entries: 256,
            receive_buffers_min: 8,
            receive_buffers_max: 64,
            // Half of what 32 writes of 4 KiB take: the shard works on the first half while the
            // second arrives. Twice as much made such writes a fifth slower.
            receive_buffer_len: 64 << 10,
            file_requests_max: 1024,
            registered_max: 1024,
        }
    }
}
