//! Volumes of the control API as those of CSI.

use sheave_control::v1 as api;
use sheave_csi_proto::v1 as csi;

use crate::Plugin;
use crate::context::{FORCE_UNSTAGE_AFTER, FRONT};
use crate::sizes::signed;

pub(crate) fn volume(plugin: &Plugin, of: &api::Volume) -> csi::Volume {
    let keys = [FRONT, FORCE_UNSTAGE_AFTER].into_iter();
    let context = keys.filter_map(|key| Some((key.to_owned(), of.parameters.get(key)?.clone())));
    csi::Volume {
        capacity_bytes: signed(of.size_bytes),
        volume_id: of.id.clone(),
        volume_context: context.collect(),
        content_source: None,
        accessible_topology: plugin.topology(of.local).into_iter().collect(),
    }
}

/// The nodes that have a volume.
pub(crate) fn nodes(of: &api::Volume) -> Vec<String> {
    of.publications.iter().map(|has| has.node.clone()).collect()
}
