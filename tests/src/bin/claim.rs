//! Steps in the life of claims, as the sidecars and kubelet take them: each command is one of them.
//!
//! A step is repeated while its outcome is open, as kubelet does. One that fails prints a line with
//! code and message, and ends with status 1. Several volumes take their steps at once. `simulate`
//! runs the simulator of `sheave_tests::co` on the devices of this machine.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a tool for a terminal")]
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use sheave_control::channel;
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::node_client::NodeClient;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_csi_proto::v1::{ControllerGetVolumeRequest, VolumeCapability};
use sheave_tests::co::{Machine, Report, run};
use sheave_tests::requests::{self, VolumeRequests, at_least};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Longer than any step takes in an emulated guest.
const PATIENCE: Duration = Duration::from_secs(900);
/// Before a step is repeated; twice as long each time, as kubelet's.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(8);
const BLOCK: &str = "block";

/// Takes one step with claims.
#[derive(Parser)]
struct Args {
    /// The plugin's socket
    #[arg(long)]
    socket: PathBuf,
    /// Where volumes are staged and shown: DIR/stage/ID, DIR/pods/POD/ID, with _ for /
    #[arg(long)]
    dir: PathBuf,
    /// The node's id
    #[arg(long)]
    node: String,
    /// A type of filesystem, or block
    #[arg(long, default_value = "ext4")]
    kind: String,
    /// An access mode as in the specification
    #[arg(long, default_value = "SINGLE_NODE_WRITER", value_parser = parse_mode)]
    mode: Mode,
    /// Publish for reading only
    #[arg(long)]
    read_only: bool,
    #[command(subcommand)]
    step: Step,
}

#[derive(Subcommand)]
enum Step {
    /// Make volumes, and print their ids
    Create {
        /// ublk, nbd or auto
        front: String,
        /// Of each
        bytes: i64,
        names: Vec<String>,
    },
    /// Publish volumes to the node, and stage them
    Stage { ids: Vec<String> },
    /// Show volumes to a pod, and print where
    Pod { pod: String, ids: Vec<String> },
    /// Take them from it
    Unpod { pod: String, ids: Vec<String> },
    /// Undo staging and publication
    Unstage { ids: Vec<String> },
    /// Grow volumes that a pod has, and print their bytes
    Expand { pod: String, bytes: i64, ids: Vec<String> },
    /// Delete them
    Delete { ids: Vec<String> },
    /// Print the condition of volumes that a pod has
    Condition { pod: String, ids: Vec<String> },
    /// Start a daemon and a plugin, and have many claims live at once as a seed determines it
    ///
    /// The directory of the plugin's socket has the daemon's configuration, `daemon.toml`.
    Simulate {
        /// ublk, nbd or auto
        front: String,
        /// Of the schedule
        seed: u64,
        /// How long it is
        steps: u64,
    },
}

/// All that steps share.
struct Claims {
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
    args: Args,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Step::Simulate { front, seed, steps } = &args.step {
        simulate(&args, front, *seed, *steps);
        return ExitCode::SUCCESS;
    }
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(take(args))
}

/// Takes a step of volumes.
async fn take(args: Args) -> ExitCode {
    let channel = channel(&args.socket);
    let controller = ControllerClient::new(channel.clone());
    let claims = Arc::new(Claims { controller, node: NodeClient::new(channel), args });
    let mut steps = JoinSet::new();
    let (Step::Create { names: of, .. }
    | Step::Stage { ids: of }
    | Step::Pod { ids: of, .. }
    | Step::Unpod { ids: of, .. }
    | Step::Unstage { ids: of }
    | Step::Expand { ids: of, .. }
    | Step::Delete { ids: of }
    | Step::Condition { ids: of, .. }) = &claims.args.step
    else {
        unreachable!("`main` simulates");
    };
    for (index, of) in of.iter().cloned().enumerate() {
        let claims = Arc::clone(&claims);
        steps.spawn(async move { (index, claims.step(&of).await) });
    }
    let mut ended = steps.join_all().await;
    ended.sort_by_key(|(index, _)| *index);
    let mut exit = ExitCode::SUCCESS;
    for (_, outcome) in ended {
        match outcome {
            Ok(said) if said.is_empty() => {}
            Ok(said) => println!("{said}"),
            Err(status) => {
                eprintln!("{:?}: {}", status.code(), status.message());
                exit = ExitCode::FAILURE;
            }
        }
    }
    exit
}

impl Claims {
    /// One step of one volume, as often as it takes. Returns what is to be printed.
    async fn step(&self, of: &str) -> Result<String, Status> {
        let (begun, mut pause) = (Instant::now(), PAUSE_MIN);
        loop {
            let outcome = match &self.args.step {
                Step::Create { front, bytes, .. } => self.create(of, front, *bytes).await,
                Step::Stage { .. } => self.stage(of).await,
                Step::Pod { pod, .. } => self.publish(of, pod).await,
                Step::Unpod { pod, .. } => self.unpublish(of, pod).await,
                Step::Unstage { .. } => self.unstage(of).await,
                Step::Expand { pod, bytes, .. } => self.expand(of, pod, *bytes).await,
                Step::Delete { .. } => self.delete(of).await,
                Step::Condition { pod, .. } => self.condition(of, pod).await,
                Step::Simulate { .. } => unreachable!("`main` simulates"),
            };
            match outcome {
                Err(status) if is_open(status.code()) && begun.elapsed() < PATIENCE => {
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                outcome => return outcome,
            }
        }
    }

    async fn create(&self, name: &str, front: &str, bytes: i64) -> Result<String, Status> {
        let (size, parameters) = (at_least(bytes), [("front", front)]);
        let request = requests::create(name, size, self.capability(), &parameters);
        let answer = self.controller.clone().create_volume(request).await?.into_inner();
        let volume = answer.volume.ok_or_else(|| Status::internal("no volume"))?;
        match volume.capacity_bytes == bytes {
            true => Ok(volume.volume_id),
            false => Err(Status::internal(format!("{} bytes", volume.capacity_bytes))),
        }
    }

    async fn stage(&self, id: &str) -> Result<String, Status> {
        let staging = self.staging(id);
        // kubelet makes it.
        fs::create_dir_all(&staging)?;
        let request = self.published(id).await?.node_stage(&staging);
        self.node.clone().node_stage_volume(request).await?;
        Ok(String::new())
    }

    /// The requests about a volume that is published to the node. The answers are the same for each
    /// call, so they need not be kept.
    async fn published(&self, id: &str) -> Result<VolumeRequests, Status> {
        let mut requests = self.requests(id);
        let request = ControllerGetVolumeRequest { volume_id: id.to_owned() };
        let answer = self.controller.clone().controller_get_volume(request).await?;
        requests.volume_context = answer.into_inner().volume.unwrap_or_default().volume_context;
        let request = requests.controller_publish(&self.args.node);
        let answer = self.controller.clone().controller_publish_volume(request).await?;
        requests.publish_context = answer.into_inner().publish_context;
        Ok(requests)
    }

    fn requests(&self, id: &str) -> VolumeRequests {
        let read_only = self.args.read_only;
        VolumeRequests { read_only, ..VolumeRequests::new(id, &self.capability()) }
    }

    async fn publish(&self, id: &str, pod: &str) -> Result<String, Status> {
        let target = self.target(id, pod);
        fs::create_dir_all(self.pod(pod))?;
        let request = self.published(id).await?.node_publish(&self.staging(id), &target);
        self.node.clone().node_publish_volume(request).await?;
        Ok(target.to_string_lossy().into_owned())
    }

    async fn unpublish(&self, id: &str, pod: &str) -> Result<String, Status> {
        let target = self.target(id, pod);
        let request = requests::node_unpublish(id, &target);
        self.node.clone().node_unpublish_volume(request).await?;
        match target.exists() {
            true => Err(Status::internal(format!("{} is there", target.display()))),
            false => Ok(String::new()),
        }
    }

    async fn unstage(&self, id: &str) -> Result<String, Status> {
        let staging = self.staging(id);
        let request = requests::node_unstage(id, &staging);
        self.node.clone().node_unstage_volume(request).await?;
        let request = requests::controller_unpublish(id, &self.args.node);
        self.controller.clone().controller_unpublish_volume(request).await?;
        match fs::remove_dir(&staging) {
            Err(error) if staging.exists() => Err(error.into()),
            _ => Ok(String::new()),
        }
    }

    async fn expand(&self, id: &str, pod: &str, bytes: i64) -> Result<String, Status> {
        let (requests, size) = (self.requests(id), at_least(bytes));
        let request = requests.controller_expand(size);
        self.controller.clone().controller_expand_volume(request).await?;
        let request = requests.node_expand(&self.staging(id), &self.target(id, pod), size);
        let answer = self.node.clone().node_expand_volume(request).await?;
        Ok(answer.into_inner().capacity_bytes.to_string())
    }

    async fn delete(&self, id: &str) -> Result<String, Status> {
        self.controller.clone().delete_volume(requests::delete(id)).await?;
        Ok(String::new())
    }

    async fn condition(&self, id: &str, pod: &str) -> Result<String, Status> {
        let request = requests::node_stats(id, &self.staging(id), &self.target(id, pod));
        let answer = self.node.clone().node_get_volume_stats(request).await?.into_inner();
        let condition = answer.volume_condition.unwrap_or_default();
        Ok(if condition.abnormal { condition.message } else { "healthy".to_owned() })
    }

    fn capability(&self) -> VolumeCapability {
        match self.args.kind.as_str() {
            BLOCK => requests::block(self.args.mode),
            fs_type => requests::filesystem(self.args.mode, fs_type),
        }
    }

    fn staging(&self, id: &str) -> PathBuf {
        self.args.dir.join("stage").join(id.replace('/', "_"))
    }

    fn pod(&self, pod: &str) -> PathBuf {
        self.args.dir.join("pods").join(pod)
    }

    fn target(&self, id: &str, pod: &str) -> PathBuf {
        self.pod(pod).join(id.replace('/', "_"))
    }
}

/// Panics when the plugin breaks a rule (`sheave_tests::co`).
fn simulate(args: &Args, front: &str, seed: u64, steps: u64) {
    let begun = Instant::now();
    let mut machine = Machine::start(args.socket.parent().expect("a directory"), &args.node);
    let setup = machine.setup(&args.dir, front, seed, steps);
    let report = run(&setup, &mut machine);
    assert!(report.pods > 0 && report.kills > 0, "{report:?}");
    let Report { calls, uncertain, claims, pods, kills, longest_write } = report;
    println!(
        "{front}: seed {seed}, {steps} steps, {calls} calls ({uncertain} uncertain), \
         {claims} claims, {pods} pods, {kills} kills, longest write {longest_write:.1?}, {} s",
        begun.elapsed().as_secs()
    );
}

/// Whether kubelet takes the outcome for open, and repeats the call.
fn is_open(code: Code) -> bool {
    matches!(
        code,
        Code::Aborted
            | Code::Unavailable
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            // What this library makes of a connection that has died.
            | Code::Unknown
            | Code::Cancelled
    )
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    Mode::from_str_name(text).ok_or_else(|| "no such access mode".to_owned())
}
