//! What an engine is given to serve, and gives back.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use sheave_core::Volume;
use sheave_telemetry::VolumeStats;

use crate::queue::DeviceQueue;
use crate::session::Session;

/// A negotiated connection, ready for the data path.
pub struct Assignment {
    /// The socket, in blocking or non-blocking mode.
    pub socket: OwnedFd,
    /// Its protocol state.
    pub session: Box<dyn Session>,
    /// What it serves.
    pub served: Served,
    /// The name under which [`Engine::release`], [`Engine::end`] and others know it.
    pub name: Option<u64>,
}

/// A connection that is at rest, between two requests.
#[derive(Debug)]
pub struct Released {
    /// Its [`Assignment::name`].
    pub name: u64,
    /// The socket.
    pub socket: OwnedFd,
}

/// A queue, ready to be served.
pub struct QueueAssignment {
    /// The name under which [`crate::Engine::abandon`] knows the device.
    pub name: u64,
    /// The driver's file for commands and copies.
    pub device: OwnedFd,
    /// The protocol state.
    pub queue: Box<dyn DeviceQueue>,
}

/// A volume, and where the latencies of its ops go.
#[derive(Clone)]
pub struct Served {
    /// The volume.
    pub volume: Arc<dyn Volume>,
    /// Its statistics.
    pub stats: Arc<VolumeStats>,
}

impl Served {
    /// A volume whose statistics show what it holds from now on.
    #[must_use]
    pub fn new(volume: Arc<dyn Volume>, stats: Arc<VolumeStats>) -> Self {
        stats.show_held_bytes(volume.held_bytes());
        stats.show_link(volume.link());
        Self { volume, stats }
    }
}
