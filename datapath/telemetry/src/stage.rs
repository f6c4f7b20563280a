//! The stages of an op that are timed.

/// A part of an op's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// From the request's arrival to its reply's sending.
    Total,
    /// Waiting until the backend took it.
    Queue,
    /// In the backend.
    Backend,
    /// Of that, waiting to be sent to the server of a remote volume.
    RemoteWait,
    /// Of that, from the sending to the server's answer.
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
