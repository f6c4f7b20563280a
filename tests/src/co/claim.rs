//! A claim: what Kubernetes wants, and what its parts know of it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use sheave_csi_proto::v1 as csi;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_node::Fs;

use super::calls::Call;
use super::data::{Content, Writer};
use crate::may_grow;
use crate::requests::{self, VolumeRequests};

/// How a claim is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// As a filesystem of this type.
    Filesystem(&'static str),
    /// As a raw block device.
    Block,
}

/// What one part knows of an effect that it has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    No,
    /// A call ended without an answer that says.
    Perhaps,
    Yes,
}

/// A pod on the node, which uses one claim.
pub(super) struct Pod {
    pub(super) uid: String,
    /// It is to end.
    pub(super) deleted: bool,
    /// What kubelet knows of its mount.
    pub(super) mount: Known,
    /// Its program, once it runs.
    pub(super) writer: Option<Writer>,
}

/// A claim, its volume, its attachment and its pods.
pub(super) struct Claim {
    /// Of the volume, as the provisioner chooses it.
    pub(super) name: String,
    pub(super) used: Use,
    /// ReadWriteOncePod.
    pub(super) for_one_pod: bool,
    /// Bytes that its owner wants.
    pub(super) wanted: i64,
    /// Its owner has deleted it.
    pub(super) deleted: bool,
    /// What the provisioner knows.
    pub(super) made: Known,
    pub(super) volume: Option<csi::Volume>,
    /// What the attacher knows.
    pub(super) attached: Known,
    pub(super) context: HashMap<String, String>,
    /// What kubelet knows of its staging.
    pub(super) staged: Known,
    /// The resizer has made the volume longer, and kubelet has not followed yet.
    pub(super) grows: bool,
    pub(super) pods: Vec<Pod>,
    pub(super) content: Content,
    /// The greatest epoch so far.
    pub(super) epoch: u64,
}

/// Directories of kubelet.
#[derive(Clone, Debug)]
pub(super) struct Kubelet {
    pub(super) dir: PathBuf,
}

impl Claim {
    pub(super) fn new(name: String, used: Use, for_one_pod: bool, wanted: i64) -> Self {
        let content = Content::new(&name);
        Self {
            name,
            used,
            for_one_pod,
            wanted,
            deleted: false,
            made: Known::No,
            volume: None,
            attached: Known::No,
            context: HashMap::new(),
            staged: Known::No,
            grows: false,
            pods: Vec::new(),
            content,
            epoch: 0,
        }
    }

    pub(super) fn id(&self) -> &str {
        self.volume.as_ref().map_or("", |volume| &volume.volume_id)
    }

    /// Nothing is left of it.
    pub(super) fn is_gone(&self) -> bool {
        self.deleted && self.made == Known::No && self.volume.is_none()
    }

    pub(super) fn has_live_pod(&self) -> bool {
        self.pods.iter().any(|pod| !pod.deleted)
    }

    /// Whether this machine lets its filesystem grow.
    pub(super) fn may_grow(&self) -> bool {
        self.used != Use::Filesystem("ext4") || may_grow(Fs::Ext4)
    }

    /// The node may still use it.
    pub(super) fn is_in_use(&self) -> bool {
        self.staged != Known::No || !self.pods.is_empty()
    }

    fn capability(&self) -> csi::VolumeCapability {
        // The sidecars and kubelet do so with drivers that know SINGLE_NODE_MULTI_WRITER.
        let mode = if self.for_one_pod {
            Mode::SingleNodeSingleWriter
        } else {
            Mode::SingleNodeMultiWriter
        };
        match self.used {
            Use::Block => requests::block(mode),
            Use::Filesystem(fs_type) => requests::filesystem(mode, fs_type),
        }
    }

    fn requests(&self) -> VolumeRequests {
        let volume = self.volume.as_ref();
        VolumeRequests {
            publish_context: self.context.clone(),
            volume_context: volume.map(|of| of.volume_context.clone()).unwrap_or_default(),
            ..VolumeRequests::new(self.id(), &self.capability())
        }
    }

    fn range(&self) -> csi::CapacityRange {
        requests::at_least(self.wanted)
    }

    pub(super) fn create(&self, parameters: &HashMap<String, String>) -> Call {
        // The size of the first call: a claim can be changed once it is bound only.
        let create = requests::create(&self.name, self.range(), self.capability(), &[]);
        let parameters = parameters.clone();
        Call::CreateVolume(csi::CreateVolumeRequest { parameters, ..create })
    }

    pub(super) fn delete(&self) -> Call {
        Call::DeleteVolume(requests::delete(self.id()))
    }

    pub(super) fn attach(&self, node: &str) -> Call {
        Call::ControllerPublish(self.requests().controller_publish(node))
    }

    pub(super) fn detach(&self, node: &str) -> Call {
        Call::ControllerUnpublish(requests::controller_unpublish(self.id(), node))
    }

    pub(super) fn grow(&self) -> Call {
        Call::ControllerExpand(self.requests().controller_expand(self.range()))
    }

    pub(super) fn stage(&self, kubelet: &Kubelet) -> Call {
        Call::NodeStage(self.requests().node_stage(&kubelet.staging(self)))
    }

    pub(super) fn unstage(&self, kubelet: &Kubelet) -> Call {
        Call::NodeUnstage(requests::node_unstage(self.id(), &kubelet.staging(self)))
    }

    pub(super) fn mount(&self, kubelet: &Kubelet, pod: &Pod) -> Call {
        let (staging, target) = (kubelet.staging(self), kubelet.target(self, pod));
        Call::NodePublish(self.requests().node_publish(&staging, &target))
    }

    pub(super) fn unmount(&self, kubelet: &Kubelet, pod: &Pod) -> Call {
        Call::NodeUnpublish(requests::node_unpublish(self.id(), &kubelet.target(self, pod)))
    }

    pub(super) fn grow_here(&self, kubelet: &Kubelet, pod: &Pod) -> Call {
        let (staging, target) = (kubelet.staging(self), kubelet.target(self, pod));
        Call::NodeExpand(self.requests().node_expand(&staging, &target, self.range()))
    }

    pub(super) fn stats(&self, kubelet: &Kubelet, pod: &Pod) -> Call {
        let (staging, target) = (kubelet.staging(self), kubelet.target(self, pod));
        Call::NodeGetVolumeStats(requests::node_stats(self.id(), &staging, &target))
    }
}

/// Where kubelet has its volumes (pkg/volume/csi of Kubernetes).
impl Kubelet {
    pub(super) fn staging(&self, claim: &Claim) -> PathBuf {
        let csi = self.dir.join("plugins/kubernetes.io/csi");
        match claim.used {
            Use::Block => csi.join("volumeDevices/staging").join(&claim.name),
            Use::Filesystem(_) => {
                let handle = claim.id().replace('/', "-");
                csi.join("csi.sheave.dev").join(handle).join("globalmount")
            }
        }
    }

    pub(super) fn target(&self, claim: &Claim, pod: &Pod) -> PathBuf {
        match claim.used {
            Use::Block => {
                let publish = self.dir.join("plugins/kubernetes.io/csi/volumeDevices/publish");
                publish.join(&claim.name).join(&pod.uid)
            }
            Use::Filesystem(_) => {
                let volumes = self.dir.join("pods").join(&pod.uid).join("volumes");
                volumes.join("kubernetes.io~csi").join(&claim.name).join("mount")
            }
        }
    }

    /// Makes what the orchestrator has to make before it stages.
    pub(super) fn prepare_staging(&self, claim: &Claim) {
        fs::create_dir_all(self.staging(claim)).expect("a staging directory");
    }

    /// Makes what the orchestrator has to make before it publishes.
    pub(super) fn prepare_target(&self, claim: &Claim, pod: &Pod) {
        let target = self.target(claim, pod);
        fs::create_dir_all(target.parent().expect("a directory")).expect("a pod's directory");
    }

    /// Removes it.
    pub(super) fn remove_staging(&self, claim: &Claim) {
        let staging = self.staging(claim);
        // Nothing is mounted there and nothing is in it, or this fails.
        fs::remove_dir(&staging).expect("an empty staging directory");
    }

    /// Removes the directory of a volume that is unpublished.
    pub(super) fn remove_target(&self, claim: &Claim, pod: &Pod) {
        let target = self.target(claim, pod);
        assert!(!target.exists(), "{} is left", target.display());
        // Of a raw block volume the next pod has the same one.
        let _ = fs::remove_dir(target.parent().expect("a directory"));
    }

    /// What a kubelet knows of claims that was started anew: what directories are there.
    pub(super) fn reconstruct(&self, claim: &mut Claim) {
        let is_there = |path: &Path| if path.exists() { Known::Perhaps } else { Known::No };
        claim.staged = is_there(&self.staging(claim));
        let targets: Vec<_> = claim.pods.iter().map(|pod| self.target(claim, pod)).collect();
        for (pod, target) in claim.pods.iter_mut().zip(targets) {
            pod.mount = is_there(target.parent().expect("a directory"));
        }
    }
}
