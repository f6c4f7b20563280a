//! What a call of the service Controller costs: how often it waits for stable storage.

use sheave_csi_proto::v1::ListVolumesRequest;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_tests::co::{Answer, Call, Clients};
use sheave_tests::requests::{self, VolumeRequests, at_least};
use sheave_tests::{Plugin, PoolNode, Trace, have, skip};
use tokio::runtime::Builder;

const NODE: &str = "node-1";
const MIB: i64 = 1 << 20;

fn create(name: &str) -> Call {
    let capability = requests::block(Mode::SingleNodeWriter);
    Call::CreateVolume(requests::create(name, at_least(MIB), capability, &[("pool", "fast")]))
}

/// A record is flushed, and its directory: two. A new volume has an image, a name and a record; one
/// that is deleted loses them, after its record says so.
#[test]
fn calls_flush_what_they_must_and_no_more() {
    if !have("strace") {
        return skip("calls_flush_what_they_must_and_no_more", "strace is not installed");
    }
    let node = PoolNode::new();
    let daemon = node.daemon();
    let dir = node.node.kernel.scratch().path();
    let plugin = Plugin::start(dir, &["--mode", "all", "--node-id", NODE]);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let clients = {
        let _inside = runtime.enter();
        Clients::new(plugin.socket(), plugin.socket())
    };
    let call = |call: Call| runtime.block_on(clients.call(call)).expect("done");
    // The first call looks for what crashes have left.
    call(create("first"));
    let flushes = |what: Call| {
        let trace = Trace::record(daemon.pid(), dir);
        let answer = call(what);
        let counts = trace.counts();
        let of = |name: &str| counts.get(name).copied().unwrap_or_default();
        (answer, of("fsync") + of("fdatasync"))
    };
    let (made, flushed) = flushes(create("second"));
    let Answer::Volume(volume) = made else { panic!("{made:?}") };
    let id = volume.volume_id;
    let requests = VolumeRequests::new(&id, &requests::block(Mode::SingleNodeWriter));
    assert!((1..=6).contains(&flushed), "CreateVolume: {flushed}");
    // The directory: the call before may have failed to flush it.
    let (_, flushed) = flushes(create("second"));
    assert_eq!(flushed, 1, "CreateVolume once more");
    let (_, flushed) = flushes(Call::ControllerPublish(requests.controller_publish(NODE)));
    assert!((1..=2).contains(&flushed), "ControllerPublishVolume: {flushed}");
    let (_, flushed) =
        flushes(Call::ControllerExpand(requests.controller_expand(at_least(2 * MIB))));
    assert!((1..=2).contains(&flushed), "ControllerExpandVolume: {flushed}");
    let (_, flushed) = flushes(Call::ListVolumes(ListVolumesRequest::default()));
    assert_eq!(flushed, 0, "ListVolumes");
    let unpublish = requests::controller_unpublish(&id, NODE);
    let (_, flushed) = flushes(Call::ControllerUnpublish(unpublish));
    assert!((1..=2).contains(&flushed), "ControllerUnpublishVolume: {flushed}");
    let (_, flushed) = flushes(Call::DeleteVolume(requests::delete(&id)));
    assert!((1..=6).contains(&flushed), "DeleteVolume: {flushed}");
}
