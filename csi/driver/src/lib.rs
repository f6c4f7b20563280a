//! The services of the Container Storage Interface. It sees volumes and devices only through the
//! control API.
#![forbid(unsafe_code)]

pub mod authority;
pub mod checks;
pub mod context;
mod daemon_volumes;
mod health;
mod identity;
mod node;
pub mod pending;
mod registration;

use std::sync::Arc;

use sheave_control::{ControlClient, VolumesClient};

pub use health::Health;
pub use identity::IdentityService;
pub use node::NodeService;
pub use registration::{Registered, RegistrationService};

/// What all services of a plugin know.
pub struct Plugin {
    /// The driver's name, such as `csi.sheave.dev`.
    pub name: String,
    /// Of the program.
    pub version: String,
    /// This node's id, at most 256 bytes; `None` of a controller without one.
    pub node_id: Option<String>,
    /// The volumes of pools.
    pub volumes: VolumesClient,
    /// The devices of this node; `None` of a controller without devices.
    pub devices: Option<ControlClient>,
}

/// A plugin that its services share.
pub type SharedPlugin = Arc<Plugin>;

impl Plugin {
    /// The key of the topology of volumes that only one node can use.
    #[must_use]
    pub fn topology_key(&self) -> String {
        format!("topology.{}/node", self.name)
    }
}
