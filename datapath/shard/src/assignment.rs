//! What an engine is given to serve, and what it gives back.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use sheave_core::Volume;
use sheave_telemetry::VolumeStats;

use crate::device_queue::DeviceQueue;
use crate::session::Session;

/// A negotiated connection, ready for the data path.
pub struct Assignment {
    /// The socket, in blocking or non-blocking mode.
    pub socket: OwnedFd,
    /// Its protocol state.
    pub session: Box<dyn Session>,
    /// The volume that it uses.
    pub served: Served,
    /// Identifies the connection in calls of the engine ([`Engine::end`], [`Engine::abandon`]). For
    /// the connection of a device it is the key of the device. Without one, [`Engine::quiesce`]
    /// leaves the connection out.
    pub key: Option<u64>,
}

/// A quiesced connection: it is between two requests, and nothing is in flight or unanswered.
#[derive(Debug)]
pub struct Quiesced {
    /// Its [`Assignment::key`].
    pub key: u64,
    /// The socket.
    pub socket: OwnedFd,
}

/// A device's queue, ready to be served.
pub struct QueueAssignment {
    /// The key of the device, for [`crate::Engine::abandon`].
    pub key: u64,
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
    /// A volume, whose statistics show its memory and its link from now on.
    #[must_use]
    pub fn new(volume: Arc<dyn Volume>, stats: Arc<VolumeStats>) -> Self {
        stats.show_held_bytes(volume.held_bytes());
        stats.show_link(volume.link());
        Self { volume, stats }
    }
}
