//! csi-sanity, the checks of the Kubernetes project for drivers (kubernetes-csi/csi-test), in the
//! version that tests/tools/go.mod pins: all that concern what the plugin can do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sheave_tests::{Plugin, PoolNode, Run, go_tool, have, in_namespace, skip};

const MIB: u64 = 1 << 20;
const RUN_TIMEOUT: Duration = Duration::from_secs(300);

#[test]
fn csi_sanity_finds_nothing_wrong() {
    let test = "csi_sanity_finds_nothing_wrong";
    if !have("nbdfuse") {
        return skip(test, "nbdfuse (libnbd-bin) is not installed");
    }
    let Some(sanity) = sanity(test) else { return };
    in_namespace(test, || check(&sanity, &[], 2, "Ran 72 of 103 Specs"));
}

/// Without what a central attacher, resizer and modifier would call. Its volumes grow with their
/// devices only, which these cannot; tests/tests/csi_local.rs has that.
#[test]
fn csi_sanity_finds_nothing_wrong_with_a_node_by_itself() {
    let test = "csi_sanity_finds_nothing_wrong_with_a_node_by_itself";
    if !have("nbdfuse") {
        return skip(test, "nbdfuse (libnbd-bin) is not installed");
    }
    let Some(sanity) = sanity(test) else { return };
    in_namespace(test, || check(&sanity, &["--local"], 1, "Ran 52 of 103 Specs"));
}

fn sanity(test: &str) -> Option<PathBuf> {
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools");
    go_tool(test, &module, "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")
}

fn check(sanity: &Path, more: &[&str], growth: u64, ran: &str) {
    let node = PoolNode::with_block_devices();
    let _daemon = node.daemon();
    let dir = node.node.kernel.scratch().path();
    let args = [&["--mode", "all", "--node-id", "n1"], more].concat();
    let plugin = Plugin::start(dir, &args);
    let parameters = dir.join("parameters.yaml");
    fs::write(&parameters, "pool: fast\n").expect("a file");
    let mutable = dir.join("mutable.yaml");
    fs::write(&mutable, "limit-iops: \"5000\"\n").expect("a file");
    let secrets = dir.join("secrets.yaml");
    fs::write(&secrets, SECRETS).expect("a file");
    for access in ["mount", "block"] {
        let flag = |name: &str, value: &str| format!("--csi.{name}={value}");
        let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        let run = Run::new(sanity)
            .arg(flag("endpoint", &path(plugin.socket())))
            .arg(flag("testvolumeaccesstype", access))
            .arg(flag("testvolumesize", &(64 * MIB).to_string()))
            .arg(flag("testvolumeexpandsize", &(growth * 64 * MIB).to_string()))
            .arg(flag("testvolumeparameters", &path(&parameters)))
            .arg(flag("testvolumemutableparameters", &path(&mutable)))
            .arg(flag("secrets", &path(&secrets)))
            .arg(flag("mountdir", &path(&dir.join("target"))))
            .arg(flag("stagingdir", &path(&dir.join("staging"))));
        let output = run.arg("--ginkgo.no-color").timeout(RUN_TIMEOUT).output();
        assert!(output.status.success(), "{access}: {}", output.describe());
        // The others are about snapshots and groups, which the plugin does not claim to have.
        assert!(output.stdout.contains(ran), "{}", output.stdout);
        assert_eq!(node.files("fast"), [] as [&str; 0], "something is left behind");
    }
    for log in [plugin.log(), fs::read_to_string(dir.join("log")).expect("a log")] {
        assert!(!log.contains("sanity-secret"), "{log}");
    }
}

const SECRETS: &str = "\
CreateVolumeSecret: { key: sanity-secret }
DeleteVolumeSecret: { key: sanity-secret }
ControllerPublishVolumeSecret: { key: sanity-secret }
ControllerUnpublishVolumeSecret: { key: sanity-secret }
ControllerValidateVolumeCapabilitiesSecret: { key: sanity-secret }
NodeStageVolumeSecret: { key: sanity-secret }
NodePublishVolumeSecret: { key: sanity-secret }
CreateSnapshotSecret: { key: sanity-secret }
DeleteSnapshotSecret: { key: sanity-secret }
ControllerExpandVolumeSecret: { key: sanity-secret }
ControllerModifyVolumeSecret: { key: sanity-secret }
";
