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
}

impl Stage {
    /// All stages, in the order of their discriminants.
    pub const ALL: [Self; 3] = [Self::Total, Self::Queue, Self::Backend];

    /// The name used in statistics and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Queue => "queue",
            Self::Backend => "backend",
        }
    }
}
