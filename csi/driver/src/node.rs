//! The service Node: volumes on this node.

use crate::SharedPlugin;

/// Serves Node.
pub struct NodeService {
    /// What it shares with the other services.
    pub plugin: SharedPlugin,
}
