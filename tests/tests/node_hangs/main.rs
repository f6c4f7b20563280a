//! Storage that hangs: every call is answered in time, other volumes go on, and all of it converges
//! when the storage answers again, or is given up.

mod calls;
#[allow(dead_code, reason = "another test with this module needs the rest")]
#[path = "../plugin/mod.rs"]
mod plugin;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use sheave_control::channel;
use sheave_csi_proto::v1::NodeGetVolumeHealthRequest;
use sheave_csi_proto::v1::controller_client::ControllerClient;
use sheave_csi_proto::v1::node_server::Node as _;
use sheave_csi_proto::v1::volume_capability::access_mode::Mode;
use sheave_tests::requests::node_stats;
use sheave_tests::{
    FakeKernel, HangingDisk, Node, PATIENCE, Plugin, Wire, cmd, eventually, on_devices,
};
use tokio::runtime::Builder;
use tonic::{Code, Request, Status};

use calls::{all, converge, create, free_calls, hanging_calls, health, publish};
use plugin::{NODE, SIZE, Site, Volume, mount};

/// Within which every call is answered.
const IN_TIME: Duration = Duration::from_secs(10);
/// Volumes that hang: more than a ring of two CPUs has blocking workers by default.
const MANY: usize = 24;

fn is_open(code: Code) -> bool {
    [Code::Aborted, Code::Unavailable, Code::DeadlineExceeded].contains(&code)
}

/// The answer to a call that storage which hangs keeps from its end.
#[track_caller]
fn is_open_in_time(call: impl FnOnce() -> Result<(), Status>) -> Status {
    let begun = Instant::now();
    let status = call().expect_err("the storage hangs");
    assert!(begun.elapsed() < IN_TIME, "{:?}: {status}", begun.elapsed());
    assert!(is_open(status.code()), "{status}");
    status
}

/// Writes and flushes once; true if both are done within this time.
fn writes(device: &Path, within: Duration) -> bool {
    let mut wire = Wire::unix(device).expect("the device");
    wire.set_timeout(within);
    let flushed = |wire: &mut Wire| {
        wire.request(cmd::FLUSH, 7, 0, 0)?;
        wire.simple_reply(7)
    };
    matches!(wire.write(0, &[7; 65536]), Ok(0)) && matches!(flushed(&mut wire), Ok(0))
}

#[test]
fn volumes_whose_storage_hangs_do_not_stop_others() {
    on_devices("volumes_whose_storage_hangs_do_not_stop_others", || {
        let disk = HangingDisk::new();
        let node = Node { kernel: FakeKernel::new(), image: String::new() };
        fs::write(node.file("daemon.toml"), "shards = 1\n").expect("a configuration");
        let config = node.file("daemon.toml").to_str().expect("UTF-8").to_owned();
        let daemon = node.start(&["daemon", "--config", &config]);
        daemon.wait_for_log(" ready ");
        let image = |path: &Path| {
            File::create(path).and_then(|file| file.set_len(1 << 20)).expect("an image");
            daemon.attach(path.to_str().expect("UTF-8"))
        };
        let hung = Vec::from_iter((0..MANY).map(|n| image(&disk.dir().join(n.to_string()))));
        let well = image(&node.file("well"));
        let hang = disk.hang();
        thread::scope(|scope| {
            let writers = hung.iter().map(|device| scope.spawn(|| writes(device, PATIENCE)));
            let writers: Vec<_> = writers.collect();
            assert!(eventually(|| node.kernel.in_flight() == MANY), "all wait");
            for _ in 0..3 {
                assert!(writes(&well, IN_TIME), "another volume hangs, too");
            }
            drop(hang);
            for writer in writers {
                assert!(writer.join().expect("no panic"));
            }
        });
        drop(daemon);
    });
}

/// The status of a page of the plugin's probes.
fn page(plugin: &Plugin, path: &str) -> String {
    let log = plugin.log();
    let address = log.split("probes=").nth(1).and_then(|rest| rest.split_whitespace().next());
    let mut stream = TcpStream::connect(address.expect("an address")).expect("its probes");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("an answer");
    page.lines().next().unwrap_or_default().to_owned()
}

/// All that a claim goes through, in the pool that does not hang.
fn lives(site: &Site, name: &str) {
    let volume = site.volume(name, SIZE, mount(Mode::SingleNodeWriter, ""));
    site.stage(&volume).expect("staged");
    site.publish(&volume, name, false).expect("published");
    let mut file = File::create(site.target(name).join("file")).expect("a file");
    file.write_all(&[7; 1 << 20]).expect("written");
    file.sync_all().expect("synced");
    drop(file);
    site.unpublish(&volume, name).expect("unpublished");
    site.unstage(&volume).expect("unstaged");
    site.unpublish_from_node(&volume);
}

#[test]
fn rule_33_every_call_is_answered_in_time_while_a_pools_storage_hangs() {
    on_devices("rule_33_every_call_is_answered_in_time_while_a_pools_storage_hangs", || {
        let disk = HangingDisk::new();
        let site = Site::with_pool(&disk.dir());
        let args = ["--mode", "all", "--node-id", NODE, "--health", "127.0.0.1:0"];
        let plugin = Plugin::start(site.node.kernel.scratch().path(), &args);
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let channel = {
            let _inside = runtime.enter();
            channel(plugin.socket())
        };
        let controller = || ControllerClient::new(channel.clone());
        let make = |name: &str| {
            let made =
                runtime.block_on(async { controller().create_volume(create(name, "slow")).await });
            made.expect("made").into_inner().volume.expect("a volume").volume_id
        };
        let ids = Vec::from_iter((0..7).map(|n| make(&format!("v{n}"))));
        for id in [&ids[2], &ids[6]] {
            let done = runtime
                .block_on(async { controller().controller_publish_volume(publish(id)).await });
            done.expect("published");
        }
        let reasons = |id: &str| runtime.block_on(health(&channel, id));
        assert_eq!(reasons(&ids[3]), ([].into(), [].into()));
        disk.forget();
        let hang = disk.hang();
        let begun = Instant::now();
        assert_eq!(reasons(&ids[3]), (["StorageHangs".to_owned()].into(), [].into()));
        assert!(begun.elapsed() < IN_TIME, "{:?}", begun.elapsed());
        thread::scope(|scope| {
            let asked = scope.spawn(|| {
                let runtime = Builder::new_current_thread().enable_all().build().expect("one");
                let channel = {
                    let _inside = runtime.enter();
                    sheave_control::channel(plugin.socket())
                };
                all(&runtime, hanging_calls(&channel, &ids, &site))
            });
            for (name, took, answer) in all(&runtime, free_calls(&channel, &ids)) {
                assert!(answer.is_ok() && took < IN_TIME, "{name}: {took:?} {answer:?}");
            }
            lives(&site, "well");
            assert!(page(&plugin, "/healthz").contains("200"));
            for (name, took, answer) in asked.join().expect("answers") {
                assert!(took < IN_TIME, "{name}: {took:?}");
                let status = answer.expect_err(name);
                assert!(is_open(status.code()), "{name}: {status}");
                assert!(status.details().is_empty() && status.message().len() <= 1024);
            }
            // Again: it joins, or is refused at once.
            for (name, took, answer) in all(&runtime, hanging_calls(&channel, &ids, &site)) {
                let status = answer.expect_err(name);
                assert!(took < IN_TIME && is_open(status.code()), "{name}: {took:?} {status}");
            }
        });
        // It was staged in vain.
        assert!(eventually(|| reasons(&ids[6]).1 == ["StorageHangs"]));
        drop(hang);
        converge(&runtime, &|| hanging_calls(&channel, &ids, &site));
        assert_eq!(reasons(&ids[6]), ([].into(), [].into()));
        // One volume of each name, without the deleted one.
        let images = fs::read_dir(disk.dir()).expect("the pool").flatten();
        let images = images.filter(|file| file.path().extension().is_some_and(|end| end == "img"));
        assert_eq!(images.count(), 7);
        drop(plugin);
    });
}

fn stats(site: &Site, volume: &Volume, path: &Path) -> Result<(), Status> {
    let request = node_stats(&volume.id, &site.staging(), path);
    site.wait(site.service.node_get_volume_stats(Request::new(request))).map(drop)
}

/// What is wrong with a volume.
fn reasons(site: &Site, volume: &Volume) -> Vec<String> {
    let request = NodeGetVolumeHealthRequest { volume_id: volume.id.clone(), ..Default::default() };
    let begun = Instant::now();
    let answer = site.wait(site.service.node_get_volume_health(Request::new(request)));
    assert!(begun.elapsed() < IN_TIME, "{:?}", begun.elapsed());
    let health = answer.expect("an answer").into_inner().volume_health.expect("its health");
    health.health_statuses.into_iter().map(|entry| entry.reason).collect()
}

/// Writes without flushing.
fn make_dirty(site: &Site) {
    let mut file = File::create(site.target("a").join("dirty")).expect("a file");
    file.write_all(&[9; 4 << 20]).expect("written");
}

#[test]
fn rule_33_a_volume_in_use_whose_storage_hangs_goes_on_without_an_error() {
    on_devices("rule_33_a_volume_in_use_whose_storage_hangs_goes_on_without_an_error", || {
        let disk = HangingDisk::new();
        let site = Site::with_pool(&disk.dir());
        let volume = site.volume_of("slow", "used", SIZE, mount(Mode::SingleNodeWriter, ""));
        site.stage(&volume).expect("staged");
        site.publish(&volume, "a", false).expect("published");
        assert_eq!(reasons(&site, &volume), [] as [&str; 0]);
        let hang = disk.hang();
        let mut file = File::create(site.target("a").join("file")).expect("a file");
        thread::scope(|scope| {
            let writer = scope.spawn(move || {
                file.write_all(&[7; 1 << 20]).and_then(|()| file.sync_all()).expect("no error");
            });
            assert!(eventually(|| reasons(&site, &volume) == ["StorageHangs"]));
            let begun = Instant::now();
            // What the kernel has in memory may be enough for an answer.
            let answer = stats(&site, &volume, &site.target("a"));
            assert!(begun.elapsed() < IN_TIME, "{:?}", begun.elapsed());
            assert!(answer.is_ok() || answer.is_err_and(|status| is_open(status.code())));
            let status = is_open_in_time(|| site.unpublish(&volume, "a"));
            assert!(status.message().contains("fuser"), "{status}");
            drop(hang);
            writer.join().expect("no panic");
        });
        assert!(eventually(|| reasons(&site, &volume).is_empty()));
        make_dirty(&site);
        let hang = disk.hang();
        site.unpublish(&volume, "a").expect("unpublished");
        is_open_in_time(|| site.unstage(&volume));
        let begun = Instant::now();
        let status = is_open_in_time(|| site.unstage(&volume));
        assert_eq!(status.code(), Code::Aborted, "{status}");
        assert!(begun.elapsed() < Duration::from_secs(1), "it waits for the first call");
        drop(hang);
        assert!(eventually(|| site.unstage(&volume).is_ok()), "it converges");
        site.check_bare();
        site.stage(&volume).expect("staged");
        let content = fs::read(site.staging().join("dirty")).expect("the file");
        assert!(content == [9; 4 << 20], "nothing is lost");
        site.unstage(&volume).expect("unstaged");
    });
}

#[test]
fn rule_33_hanging_storage_is_given_up_where_the_class_says_so() {
    on_devices("rule_33_hanging_storage_is_given_up_where_the_class_says_so", || {
        let disk = HangingDisk::new();
        let site = Site::with_pool(&disk.dir());
        let mut volume = site.volume_of("slow", "lost", SIZE, mount(Mode::SingleNodeWriter, ""));
        volume.context = HashMap::from([("force-unstage-after".to_owned(), "10".to_owned())]);
        site.stage(&volume).expect("staged");
        site.publish(&volume, "a", false).expect("published");
        make_dirty(&site);
        let hang = disk.hang();
        site.unpublish(&volume, "a").expect("unpublished");
        is_open_in_time(|| site.unstage(&volume));
        assert_ne!(site.node.kernel.devices(), [] as [PathBuf; 0], "it waits first");
        // Whether a call is there to be answered when it is done, or the next one finds it done.
        assert!(eventually(|| {
            let answer = site.unstage(&volume);
            if let Err(status) = &answer {
                assert!(is_open(status.code()), "{status}");
            }
            answer.is_ok()
        }));
        assert_eq!(reasons(&site, &volume), ["UnflushedDataLost"]);
        site.check_bare();
        assert!(!site.daemon.log().contains("panic"));
        drop(hang);
        // Until its last requests have ended, the image is in use.
        assert!(eventually(|| site.stage(&volume).is_ok()));
        assert_eq!(reasons(&site, &volume), [] as [&str; 0]);
        site.publish(&volume, "a", false).expect("published");
        site.unpublish(&volume, "a").expect("unpublished");
        site.unstage(&volume).expect("unstaged");
        site.check_bare();
    });
}
