//! Which nodes can reach a volume.

use std::collections::HashMap;

use sheave_control::v1 as api;
use sheave_csi_proto::v1::{Topology, TopologyRequirement};
use tonic::Status;

use crate::Plugin;

impl Plugin {
    /// The key of the topology of volumes that only one node can use.
    pub(crate) fn topology_key(&self) -> String {
        format!("topology.{}/node", self.name)
    }

    /// From where a volume can be reached; `None` is from everywhere.
    pub(crate) fn topology(&self, local: bool) -> Option<Topology> {
        let node = self.node_id.clone().filter(|_| local)?;
        Some(Topology { segments: HashMap::from([(self.topology_key(), node)]) })
    }

    /// Whether a volume of a pool can be reached from there.
    pub(crate) fn is_here(&self, local: bool, from: Option<&Topology>) -> bool {
        let wanted = from.and_then(|from| from.segments.get(&self.topology_key()));
        !local || wanted.is_none_or(|wanted| Some(wanted) == self.node_id.as_ref())
    }

    /// Checks that a volume can be made where it is wanted.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED when it cannot be reached from there: it may be made by the plugin of
    /// another node. FAILED_PRECONDITION when this controller does not know its node.
    pub(crate) fn check_topology(
        &self,
        local: bool,
        wanted: Option<&TopologyRequirement>,
    ) -> Result<(), Status> {
        let Some(node) = self.node_id.as_ref().filter(|_| local) else {
            return match local {
                false => Ok(()),
                true => Err(Status::failed_precondition(
                    "the pool is of one node, and this controller of none: start it with --node-id",
                )),
            };
        };
        let requisite = wanted.map(|wanted| wanted.requisite.as_slice()).unwrap_or_default();
        if requisite.is_empty() || requisite.iter().any(|one| self.is_here(local, Some(one))) {
            return Ok(());
        }
        let why =
            format!("the pool's volumes can be used on node {node} only, and not where asked");
        Err(Status::resource_exhausted(why))
    }

    /// Checks that a node can use a volume.
    ///
    /// # Errors
    /// NOT_FOUND when it is no node that the volume's pool knows.
    pub(crate) fn check_node(&self, volume: &api::Volume, node: &str) -> Result<(), Status> {
        match &self.node_id {
            Some(own) if volume.local && own != node => Err(Status::not_found(format!(
                "node {node:?} cannot reach {}: its pool is of node {own}",
                volume.id
            ))),
            _ => Ok(()),
        }
    }
}
