//! Calls of the Container Storage Interface, and the codes with which each may end.

use std::collections::HashMap;
use std::error::Error as _;
use std::path::Path;
use std::time::Duration;

use sheave_control::channel;
use sheave_csi_proto::v1 as csi;
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::node_client::NodeClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// The plugin promises an answer within 10 s; a slow machine gets some more.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// What a status may be long, in bytes.
const MESSAGE_LEN_MAX: usize = 1 << 10;

/// A call with its arguments.
#[derive(Clone)]
#[expect(missing_docs, reason = "those of the interface")]
pub enum Call {
    CreateVolume(csi::CreateVolumeRequest),
    DeleteVolume(csi::DeleteVolumeRequest),
    ControllerPublish(csi::ControllerPublishVolumeRequest),
    ControllerUnpublish(csi::ControllerUnpublishVolumeRequest),
    ControllerExpand(csi::ControllerExpandVolumeRequest),
    ListVolumes(csi::ListVolumesRequest),
    NodeStage(csi::NodeStageVolumeRequest),
    NodePublish(csi::NodePublishVolumeRequest),
    NodeUnpublish(csi::NodeUnpublishVolumeRequest),
    NodeUnstage(csi::NodeUnstageVolumeRequest),
    NodeExpand(csi::NodeExpandVolumeRequest),
    NodeGetVolumeStats(csi::NodeGetVolumeStatsRequest),
}

/// What a call that succeeded has answered.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The volume that was made.
    Volume(csi::Volume),
    /// The context of a publication.
    Context(HashMap<String, String>),
    /// The ids of all volumes.
    Volumes(Vec<String>),
    /// A size, in bytes.
    Size(i64),
    /// Nothing more.
    Done,
}

/// Clients of a plugin.
#[derive(Clone)]
pub struct Clients {
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
    answer_within: Duration,
}

impl Call {
    /// The name of its RPC.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::CreateVolume(_) => "CreateVolume",
            Self::DeleteVolume(_) => "DeleteVolume",
            Self::ControllerPublish(_) => "ControllerPublishVolume",
            Self::ControllerUnpublish(_) => "ControllerUnpublishVolume",
            Self::ControllerExpand(_) => "ControllerExpandVolume",
            Self::ListVolumes(_) => "ListVolumes",
            Self::NodeStage(_) => "NodeStageVolume",
            Self::NodePublish(_) => "NodePublishVolume",
            Self::NodeUnpublish(_) => "NodeUnpublishVolume",
            Self::NodeUnstage(_) => "NodeUnstageVolume",
            Self::NodeExpand(_) => "NodeExpandVolume",
            Self::NodeGetVolumeStats(_) => "NodeGetVolumeStats",
        }
    }

    /// The codes that the specification has for it, beside those of every call.
    fn codes(&self) -> &'static [Code] {
        use Code::{AlreadyExists, FailedPrecondition, NotFound, OutOfRange, ResourceExhausted};
        match self {
            Self::CreateVolume(_) => &[NotFound, AlreadyExists, ResourceExhausted, OutOfRange],
            Self::DeleteVolume(_) => &[FailedPrecondition],
            Self::ControllerPublish(_) => {
                &[NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted]
            }
            Self::ControllerExpand(_) | Self::NodeExpand(_) => {
                &[NotFound, FailedPrecondition, OutOfRange]
            }
            Self::ListVolumes(_) => &[],
            Self::NodeStage(_) | Self::NodePublish(_) => {
                &[NotFound, AlreadyExists, FailedPrecondition]
            }
            // Of a volume that is still in use, which the specification leaves to the plugin.
            Self::ControllerUnpublish(_) | Self::NodeUnstage(_) | Self::NodeUnpublish(_) => {
                &[NotFound, FailedPrecondition]
            }
            Self::NodeGetVolumeStats(_) => &[NotFound],
        }
    }

    /// Checks a failure against the table of the specification, and its rules for messages.
    ///
    /// # Panics
    /// When it breaks them.
    #[track_caller]
    fn check(&self, status: &Status) {
        let name = self.name();
        let common = [
            Code::InvalidArgument,
            Code::Aborted,
            Code::Unavailable,
            Code::DeadlineExceeded,
            Code::Cancelled,
        ];
        let allowed = common.iter().chain(self.codes());
        assert!(allowed.into_iter().any(|code| *code == status.code()), "{name}: {status}");
        assert!(status.details().is_empty(), "{name}: it has details: {status}");
        let message = status.message();
        assert!(!message.is_empty() && message.len() <= MESSAGE_LEN_MAX, "{name}: {status}");
    }
}

/// Whether a call that ended so may have done something, or may go on (as the sidecars and kubelet
/// see it).
#[must_use]
pub fn is_uncertain(code: Code) -> bool {
    matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

impl Clients {
    /// Of the plugins that listen at these sockets; inside of a runtime.
    #[must_use]
    pub fn new(controller: &Path, node: &Path) -> Self {
        Self {
            controller: ControllerClient::new(channel(controller)),
            node: NodeClient::new(channel(node)),
            answer_within: ANSWER_WITHIN,
        }
    }

    /// Clients that wait so many times longer, see [`Setup::slowness`](super::Setup::slowness).
    #[must_use]
    pub fn on_slower(self, slowness: u32) -> Self {
        Self { answer_within: ANSWER_WITHIN * slowness, ..self }
    }

    /// Makes a call. Its failures have only codes that the specification allows.
    ///
    /// # Errors
    /// What the plugin says. A plugin that died is UNAVAILABLE.
    ///
    /// # Panics
    /// When it does not answer in time, or with a code that the call does not have.
    pub async fn call(&self, call: Call) -> Result<Answer, Status> {
        let asked = call.clone();
        let Ok(answer) = tokio::time::timeout(self.answer_within, self.send(call)).await else {
            panic!("{}: no answer within {:?}", asked.name(), self.answer_within);
        };
        answer.map_err(|status| match status.source() {
            // As the library of Go has it when a connection ends.
            Some(_) => Status::unavailable(status.message()),
            None => {
                asked.check(&status);
                status
            }
        })
    }

    async fn send(&self, call: Call) -> Result<Answer, Status> {
        let (mut controller, mut node) = (self.controller.clone(), self.node.clone());
        match call {
            Call::CreateVolume(request) => {
                let made = controller.create_volume(request).await?.into_inner().volume;
                Ok(Answer::Volume(made.expect("a volume")))
            }
            Call::DeleteVolume(request) => done(controller.delete_volume(request).await),
            Call::ControllerPublish(request) => {
                let published = controller.controller_publish_volume(request).await?;
                Ok(Answer::Context(published.into_inner().publish_context))
            }
            Call::ControllerUnpublish(request) => {
                done(controller.controller_unpublish_volume(request).await)
            }
            Call::ControllerExpand(request) => {
                let grown = controller.controller_expand_volume(request).await?.into_inner();
                Ok(Answer::Size(grown.capacity_bytes))
            }
            Call::ListVolumes(request) => {
                let entries = controller.list_volumes(request).await?.into_inner().entries;
                let ids = entries.into_iter().filter_map(|entry| entry.volume);
                Ok(Answer::Volumes(ids.map(|volume| volume.volume_id).collect()))
            }
            Call::NodeStage(request) => done(node.node_stage_volume(request).await),
            Call::NodePublish(request) => done(node.node_publish_volume(request).await),
            Call::NodeUnpublish(request) => done(node.node_unpublish_volume(request).await),
            Call::NodeUnstage(request) => done(node.node_unstage_volume(request).await),
            Call::NodeExpand(request) => {
                let grown = node.node_expand_volume(request).await?.into_inner();
                Ok(Answer::Size(grown.capacity_bytes))
            }
            Call::NodeGetVolumeStats(request) => {
                let usage = node.node_get_volume_stats(request).await?.into_inner().usage;
                Ok(Answer::Size(usage.first().expect("its use").total))
            }
        }
    }
}

fn done<T>(answered: Result<tonic::Response<T>, Status>) -> Result<Answer, Status> {
    answered.map(|_| Answer::Done)
}
