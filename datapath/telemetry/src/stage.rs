//! The stages of an op that are timed.

/// A part of an op's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// From the request's arrival until its reply is sent.
    Total,
    /// Waiting until the backend took it.
    Queue,
    /// In the backend.
    Backend,
    /// Part of that: waiting to be sent to the server of a remote volume.
    RemoteWait,
    /// Part of that: from sending to the server's answer.
    RemoteWire,
}

impl Stage {
    /// All stages, in the order of their discriminants.
    pub const ALL: [Self; 5] =
        [Self::Total, Self::Queue, Self::Backend, Self::RemoteWait, Self::RemoteWire];

    /// The name used in statistics and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Queue => "queue",
            Self::Backend => "backend",
            Self::RemoteWait => "remote/wait",
            Self::RemoteWire => "remote/wire",
        }
    }
}
