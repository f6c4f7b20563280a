//! The daemon of this node by the control API, as the node engine needs it and as FlexVolume and
//! Docker use it: they publish volumes to this node by themselves.
#![forbid(unsafe_code)]

mod daemon;
mod daemon_volumes;

pub use daemon::{Daemon, reached};
pub use daemon_volumes::{DaemonVolumes, check_mountable};
pub use sheave_control::v1::{CreateVolumeRequest, Volume};
