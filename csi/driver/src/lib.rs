//! The services of the Container Storage Interface. It sees volumes and devices only through the
//! control API.
#![forbid(unsafe_code)]

mod authority;
mod calls;
mod capability;
mod checks;
pub mod context;
mod control;
mod controller;
mod health;
mod identity;
mod local;
mod metrics;
mod node;
mod registration;
mod server;
mod sizes;
mod topology;

use std::sync::Arc;

use sheave_control::{ControlClient, VolumesClient};

pub use checks::check_node_id;
pub use metrics::Metrics;
pub use node::NodeService;
pub use registration::registration_socket;
pub use server::{Registration, Serving, serve};

/// What all services of a plugin know.
pub struct Plugin {
    /// The driver's name, such as `csi.sheave.dev`.
    pub name: String,
    /// Of the program.
    pub version: String,
    /// This node's id, at most 256 bytes; `None` of a controller without one.
    pub node_id: Option<String>,
    /// Whether the orchestrator leaves publishing and growing to the node, see `local.rs`.
    pub is_local: bool,
    /// The volumes of pools.
    pub volumes: VolumesClient,
    /// The devices of this node; `None` of a controller without devices.
    pub devices: Option<ControlClient>,
}

/// A plugin that its services share.
pub type SharedPlugin = Arc<Plugin>;
