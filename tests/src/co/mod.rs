//! What an orchestrator does with a plugin: the provisioner, attacher and resizer of Kubernetes and
//! its kubelet, for many claims and pods at once.
//!
//! A seed determines what is wanted and which calls are made when; calls are cut off, doubled and
//! repeated, and processes are killed under them. All calls go through the sockets of a real
//! plugin. After each step all that is known is compared with what is there ([`run`] panics if
//! something is wrong).
//!
//! How the parts behave: `isFinalError` and the retries of external-provisioner, external-attacher
//! and external-resizer; the reconciler and the uncertain states of kubelet
//! (pkg/kubelet/volumemanager and pkg/volume/csi of Kubernetes).

mod calls;
mod check;
mod claim;
mod cluster;
mod data;
mod kills;
mod machine;
mod many;
mod ops;
mod orchestrator;
mod rng;
mod sim;

pub use calls::{Answer, Call, Clients, is_uncertain};
pub use claim::Use;
pub use cluster::Cluster;
pub use kills::{Killed, kill_at_each_step};
pub use machine::Machine;
pub use many::{Memory, all_at_once, cycle, resident_kib};
pub use rng::Rng;
pub use sim::{Process, Processes, Report, Setup, run};
