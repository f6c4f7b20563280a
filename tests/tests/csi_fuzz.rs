//! Arbitrary requests to all services: whatever is asked, the plugin goes on, answers in time with
//! a code that says something, and shows no secret.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sheave_control::channel;
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::identity_client::IdentityClient;
use sheave_csi_proto::v1::node_client::NodeClient;
use sheave_csi_proto::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use sheave_csi_proto::v1::*;
use sheave_tests::co::Rng;
use sheave_tests::{Plugin, PoolNode};
use tokio::runtime::Builder;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// In secrets and mount flags.
const SECRET: &str = "hunter2-correct-horse";
/// Another number for another run.
const SEED: &str = "SHEAVE_FUZZ_SEED";
const REQUESTS: usize = 600;

/// Makes requests of parts that are right, wrong, too long or absent.
struct Maker {
    rng: Rng,
    dir: String,
    ids: Vec<String>,
}

impl Maker {
    /// A number below `end`.
    fn number(&mut self, end: usize) -> usize {
        self.rng.below(end as u64) as usize
    }

    fn text(&mut self) -> String {
        let texts = [
            String::new(),
            "a".to_owned(),
            "ü\u{202e}\n\0%s".to_owned(),
            "n".repeat(128),
            "ü".repeat(2000),
            "\u{7}".repeat(5000),
        ];
        texts[self.number(texts.len())].clone()
    }

    fn id(&mut self) -> String {
        let ids = [
            "fast/01234567-89ab-7cde-8f01-23456789abcd".to_owned(),
            "fast/../../etc".to_owned(),
            "none/x".to_owned(),
            self.text(),
        ];
        let (own, other) = (self.number(self.ids.len()), self.number(ids.len()));
        if self.number(2) == 0 { self.ids[own].clone() } else { ids[other].clone() }
    }

    /// Inside of the test's directory, since the plugin may remove empty places.
    fn path(&mut self) -> String {
        let dir = &self.dir;
        let paths = [
            format!("{dir}/place"),
            format!("{dir}/places/a"),
            format!("{dir}/no/such/place"),
            format!("{dir}/places/../place"),
            format!("{dir}/{}", "p".repeat(3000)),
            format!("{dir}/{}", "p".repeat(6000)),
            format!("{dir}/pl\0ace"),
            "place".to_owned(),
            String::new(),
        ];
        paths[self.number(paths.len())].clone()
    }

    fn map(&mut self, keys: &[&str]) -> HashMap<String, String> {
        let count = self.number(3);
        let pairs = (0..count).map(|_| match self.number(4) {
            0 => (self.text(), self.text()),
            _ => {
                let values = ["fast", "small", "nbd", "5", "none", "99999999999999999999", "true"];
                let key = keys[self.number(keys.len())].to_owned();
                (key, values[self.number(values.len())].to_owned())
            }
        });
        pairs.collect()
    }

    fn parameters(&mut self) -> HashMap<String, String> {
        let keys = ["pool", "front", "limit-bps", "limit-iops", "force-unstage-after", "x"];
        let mut map = self.map(&keys);
        if self.number(4) > 0 {
            map.insert("pool".to_owned(), "fast".to_owned());
        }
        map
    }

    fn context(&mut self) -> HashMap<String, String> {
        self.map(&["epoch", "readonly", "front", "force-unstage-after"])
    }

    fn secrets(&mut self) -> HashMap<String, String> {
        let long = self.number(8) == 0;
        let value = if long { SECRET.repeat(400) } else { SECRET.to_owned() };
        HashMap::from([("password".to_owned(), value)])
    }

    fn capability(&mut self) -> Option<VolumeCapability> {
        let access_type = match self.number(8) {
            0 => None,
            1 => Some(AccessType::Block(BlockVolume {})),
            _ => {
                let types =
                    ["", "ext4", "xfs", "ntfs", "ext4\0", &"t".repeat(3000)].map(str::to_owned);
                let flags = [
                    format!("password={SECRET}"),
                    format!("{SECRET}\0"),
                    format!("remount,{SECRET}"),
                    SECRET.repeat(300),
                    "noatime".to_owned(),
                ];
                Some(AccessType::Mount(MountVolume {
                    fs_type: types[self.number(types.len())].clone(),
                    mount_flags: vec![flags[self.number(flags.len())].clone()],
                    volume_mount_group: if self.number(8) == 0 {
                        self.text()
                    } else {
                        String::new()
                    },
                }))
            }
        };
        let mode = [1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 0, 99, -1][self.number(13)];
        let access_mode = (self.number(12) > 0).then_some(AccessMode { mode });
        (self.number(12) > 0).then_some(VolumeCapability { access_type, access_mode })
    }

    fn range(&mut self) -> Option<CapacityRange> {
        let sizes = [0, 1, 1 << 20, 4 << 20, i64::MAX, -1, i64::MIN];
        let (required, limit) = (self.number(sizes.len()), self.number(sizes.len()));
        let range = CapacityRange { required_bytes: sizes[required], limit_bytes: sizes[limit] };
        (self.number(4) > 0).then_some(range)
    }

    fn node(&mut self) -> String {
        if self.number(2) == 0 { "n1".to_owned() } else { self.text() }
    }
}

async fn controller(maker: &mut Maker, channel: &Channel) -> Result<(), Status> {
    let mut client = ControllerClient::new(channel.clone());
    match maker.number(12) {
        0 | 1 => {
            let request = CreateVolumeRequest {
                name: maker.text(),
                capacity_range: maker.range(),
                volume_capabilities: maker.capability().into_iter().collect(),
                parameters: maker.parameters(),
                mutable_parameters: maker.context(),
                secrets: maker.secrets(),
                volume_content_source: None,
                accessibility_requirements: None,
            };
            client.create_volume(request).await.map(drop)
        }
        2 => {
            let request = DeleteVolumeRequest { volume_id: maker.id(), secrets: maker.secrets() };
            client.delete_volume(request).await.map(drop)
        }
        3 | 4 => {
            let request = ControllerPublishVolumeRequest {
                volume_id: maker.id(),
                node_id: maker.node(),
                volume_capability: maker.capability(),
                readonly: maker.number(4) == 0,
                secrets: maker.secrets(),
                volume_context: maker.context(),
            };
            client.controller_publish_volume(request).await.map(drop)
        }
        5 => {
            let request = ControllerUnpublishVolumeRequest {
                volume_id: maker.id(),
                node_id: maker.node(),
                secrets: maker.secrets(),
            };
            client.controller_unpublish_volume(request).await.map(drop)
        }
        6 => {
            let request = ControllerExpandVolumeRequest {
                volume_id: maker.id(),
                capacity_range: maker.range(),
                secrets: maker.secrets(),
                volume_capability: maker.capability(),
            };
            client.controller_expand_volume(request).await.map(drop)
        }
        7 => {
            let request = ControllerModifyVolumeRequest {
                volume_id: maker.id(),
                secrets: maker.secrets(),
                mutable_parameters: maker.parameters(),
            };
            client.controller_modify_volume(request).await.map(drop)
        }
        which => ask(which, maker, client).await,
    }
}

/// Calls that change nothing.
async fn ask(
    which: usize,
    maker: &mut Maker,
    mut client: ControllerClient<Channel>,
) -> Result<(), Status> {
    match which {
        8 => {
            let request = ValidateVolumeCapabilitiesRequest {
                volume_id: maker.id(),
                volume_context: maker.context(),
                volume_capabilities: maker.capability().into_iter().collect(),
                parameters: maker.parameters(),
                secrets: maker.secrets(),
                mutable_parameters: maker.context(),
            };
            client.validate_volume_capabilities(request).await.map(drop)
        }
        9 => {
            let max_entries = [0, 1, -1, i32::MAX][maker.number(4)];
            let request = ListVolumesRequest { max_entries, starting_token: maker.text() };
            client.list_volumes(request).await.map(drop)
        }
        10 => {
            let request = GetCapacityRequest {
                volume_capabilities: maker.capability().into_iter().collect(),
                parameters: maker.parameters(),
                accessible_topology: None,
            };
            client.get_capacity(request).await.map(drop)
        }
        _ => {
            let request = ControllerGetVolumeRequest { volume_id: maker.id() };
            client.controller_get_volume(request).await.map(drop)
        }
    }
}

async fn node(maker: &mut Maker, channel: &Channel) -> Result<(), Status> {
    let mut client = NodeClient::new(channel.clone());
    match maker.number(8) {
        0 | 1 => {
            let request = NodeStageVolumeRequest {
                volume_id: maker.id(),
                publish_context: maker.context(),
                staging_target_path: maker.path(),
                volume_capability: maker.capability(),
                secrets: maker.secrets(),
                volume_context: maker.context(),
            };
            client.node_stage_volume(request).await.map(drop)
        }
        2 => {
            let request = NodeUnstageVolumeRequest {
                volume_id: maker.id(),
                staging_target_path: maker.path(),
            };
            client.node_unstage_volume(request).await.map(drop)
        }
        3 | 4 => {
            let request = NodePublishVolumeRequest {
                volume_id: maker.id(),
                publish_context: maker.context(),
                staging_target_path: maker.path(),
                target_path: maker.path(),
                volume_capability: maker.capability(),
                readonly: maker.number(2) == 0,
                secrets: maker.secrets(),
                volume_context: maker.context(),
            };
            client.node_publish_volume(request).await.map(drop)
        }
        5 => {
            let request =
                NodeUnpublishVolumeRequest { volume_id: maker.id(), target_path: maker.path() };
            client.node_unpublish_volume(request).await.map(drop)
        }
        6 => {
            let request = NodeGetVolumeStatsRequest {
                volume_id: maker.id(),
                volume_path: maker.path(),
                staging_target_path: maker.path(),
            };
            client.node_get_volume_stats(request).await.map(drop)
        }
        _ => {
            let request = NodeExpandVolumeRequest {
                volume_id: maker.id(),
                volume_path: maker.path(),
                capacity_range: maker.range(),
                staging_target_path: maker.path(),
                volume_capability: maker.capability(),
                secrets: maker.secrets(),
            };
            client.node_expand_volume(request).await.map(drop)
        }
    }
}

#[test]
fn rule_14_whatever_is_asked_no_answer_or_log_has_a_secret_and_nothing_panics() {
    let pools = PoolNode::new();
    let daemon = pools.daemon();
    let dir = pools.node.kernel.scratch().path();
    for name in ["place", "places"] {
        std::fs::create_dir(dir.join(name)).expect("a directory");
    }
    let plugin = Plugin::start(dir, &["--mode", "all", "--node-id", "n1"]);
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or(14);
    let create = |name: &str| {
        daemon.sheave("volume create --size 4M").arg(format!("fast/{name}")).ok();
        daemon.volume_id(&format!("fast/{name}"))
    };
    let ids = vec![create("v0"), create("v1"), create("v2")];
    let dir = dir.to_str().expect("UTF-8").to_owned();
    let mut maker = Maker { rng: Rng::new(seed), dir, ids };
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut codes = HashMap::<Code, usize>::new();
    runtime.block_on(async {
        let channel = channel(plugin.socket());
        for round in 0..REQUESTS {
            let begun = Instant::now();
            let answer = match maker.number(2) {
                0 => controller(&mut maker, &channel).await,
                _ => node(&mut maker, &channel).await,
            };
            let took = begun.elapsed();
            let what = format!("request {round} of seed {seed}");
            assert!(took < Duration::from_secs(10), "{what}: {took:?}");
            let Err(status) = answer else { continue };
            *codes.entry(status.code()).or_default() += 1;
            let message = status.message();
            assert!(!message.is_empty() && message.len() <= 1024, "{what}: {status}");
            assert!(!message.contains(SECRET) && status.details().is_empty(), "{what}: {status}");
            let strange = [Code::Internal, Code::Unknown, Code::Cancelled, Code::DataLoss];
            assert!(!strange.contains(&status.code()), "{what}: {status}");
        }
        // It goes on.
        let mut identity = IdentityClient::new(channel);
        identity.get_plugin_info(GetPluginInfoRequest {}).await.expect("its name");
    });
    assert!(codes.len() >= 5, "not much was tried: {codes:?}");
    for log in [plugin.log(), daemon.log()] {
        assert!(!log.contains(SECRET) && !log.contains("panicked"), "seed {seed}: {log}");
    }
}
