//! A FlexVolume driver of Kubernetes (sig-storage's flexvolume.md; pkg/volume/flexvolume of
//! Kubernetes is what calls it).
//!
//! Each call is a process, run by kubelet in the namespace where its pods' mounts are, or by
//! controller-manager. So the node engine runs in this process: its locks are files, and its states
//! are those of the other callers of the engine on this node.
//!
//! - With `attach`, controller-manager publishes a volume to a node, and kubelet stages it at a
//!   directory of its own, then publishes it to pods.
//! - Without, kubelet only mounts and unmounts: the first pod's mount publishes the volume to this
//!   node and stages it in a directory of ours, and the last pod's unmount undoes that.
#![forbid(unsafe_code)]

mod answer;
mod call;
mod device;
mod driver;
mod options;

pub use answer::Answer;
pub use call::{Call, NotACall};
pub use driver::{Driver, Tidier};
