//! `sheave docker-plugin` beside faults: a second plugin, a full disk, a Docker that leaves.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use sheave_tests::{
    DockerPlugin, DockerSite, HangingDisk, Mounts, PoolNode, Run, check_failed, eventually, have,
    on_devices, sheave, skip,
};

const FAST: (&str, &str) = ("pool", "fast");

#[test]
fn a_second_plugin_does_not_get_the_records_of_one_that_runs() {
    on_devices("a_second_plugin_does_not_get_the_records_of_one_that_runs", || {
        let mut site = DockerSite::new();
        site.plugin.create("db", &[FAST, ("size", "32M")]).expect("created");
        let at = site.plugin.mount("db", "c1").expect("mounted");
        let sockets = site.dir().join("second");
        fs::create_dir(&sockets).expect("a directory");
        let second = || {
            let run = Run::new(sheave()).args("docker-plugin --node-id n1 --socket");
            let run = run.arg(sockets.join("sheave.sock"));
            run.env("SHEAVE_RUNTIME_DIR", site.dir()).env("SHEAVE_STATE_DIR", site.dir())
        };
        let error = second().fails();
        let why =
            format!("another docker-plugin has these volumes, process {};", site.plugin.pid());
        assert!(error.contains(&why), "{error}");
        // Nor its socket, with records of its own.
        let other = site.dir().join("other");
        fs::create_dir(&other).expect("a directory");
        let run = Run::new(sheave()).args("docker-plugin --node-id n1 --socket");
        let run = run.arg(site.plugin.socket()).env("SHEAVE_STATE_DIR", &other);
        let error = run.fails();
        assert!(error.contains("another process listens there"), "{error}");
        fs::write(at.join("file"), "data").expect("written");
        // One that waits gets them when the first has ended.
        let pid = site.plugin.pid();
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(500));
            Run::new("kill").args(&format!("-KILL {pid}")).ok();
        });
        let second = DockerPlugin::start_at(&sockets, site.dir(), &["--node-id", "n1"]);
        killer.join().expect("it ends");
        site.plugin.kill();
        second.mount("db", "c2").expect("mounted");
        second.unmount("db", "c1").expect("unmounted");
        assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
        second.unmount("db", "c2").expect("unmounted");
        site.check_unmounted();
    });
}

#[test]
fn containers_end_and_volumes_go_on_a_full_disk() {
    on_devices("containers_end_and_volumes_go_on_a_full_disk", || {
        let mut site = DockerSite::new();
        let disks = ["docker", "node"].map(|name| site.dir().join(name));
        site.plugin.kill();
        for disk in &disks {
            Run::new("mount").args("-t tmpfs -o size=64k none").arg(disk).ok();
        }
        site.plugin.restart();
        site.plugin.create("db", &[FAST, ("size", "32M")]).expect("created");
        let at = site.plugin.mount("db", "c1").expect("mounted");
        for id in ["c2", "c3"] {
            site.plugin.mount("db", id).expect("mounted");
        }
        for disk in &disks {
            let mut file = File::create(disk.join("filler")).expect("a file");
            while file.write_all(&[7; 4096]).is_ok() {}
        }
        fs::write(at.join("file"), "data").expect("written");
        check_failed(site.plugin.create("other", &[FAST, ("size", "32M")]), "No space left");
        site.daemon.sheave("volume info fast/other").fails();
        site.plugin.unmount("db", "c1").expect("unmounted");
        site.plugin.restart();
        assert_eq!(site.plugin.get("db").expect("a volume")["Status"]["references"], 2);
        for id in ["c2", "c3"] {
            site.plugin.unmount("db", id).expect("unmounted");
        }
        assert_eq!(site.publications("fast/db"), 0);
        assert_eq!(site.node.node.kernel.devices(), [] as [std::path::PathBuf; 0]);
        site.plugin.remove("db").expect("removed");
        site.daemon.sheave("volume info fast/db").fails();
        site.plugin.kill();
        for disk in &disks {
            Run::new("umount").arg(disk).ok();
        }
        site.check_unmounted();
    });
}

/// The lock that the test takes stands for a mkfs that takes longer than Docker waits.
#[test]
fn a_mount_whose_caller_has_left_is_undone() {
    on_devices("a_mount_whose_caller_has_left_is_undone", || {
        let mut site = DockerSite::new();
        site.plugin.create("db", &[FAST, ("size", "32M")]).expect("created");
        let id = site.daemon.volume_id("fast/db");
        let count = |site: &DockerSite| {
            site.plugin.get("db").expect("a volume")["Status"]["references"].clone()
        };
        for is_in_use in [false, true] {
            if is_in_use {
                site.plugin.mount("db", "c1").expect("mounted");
            }
            let lock = site.node.lock_volume(&id);
            let waiting = || site.plugin.log().matches("waiting: ").count();
            let before = waiting();
            let call = site.plugin.begin_mount("db", "c2").expect("it takes the call");
            // One that waits for the other, and leaves, too.
            let other = site.plugin.begin_mount("db", "c3").expect("it takes the call");
            assert!(eventually(|| waiting() > before), "{}", site.plugin.log());
            drop((call, other));
            // If it does not notice within that, the mount is undone as one without an answer.
            thread::sleep(Duration::from_millis(300));
            drop(lock);
            if is_in_use {
                let at = site.plugin.mount("db", "c1").expect("it is still there");
                assert_eq!(count(&site), 1);
                fs::write(at.join("file"), "data").expect("written");
                site.plugin.unmount("db", "c1").expect("unmounted");
            }
            assert!(eventually(|| count(&site) == 0), "{}", site.plugin.log());
            assert!(eventually(|| site.publications("fast/db") == 0), "{}", site.plugin.log());
            site.check_unmounted();
        }
        // An answer that has arrived is none that is undone, also by another plugin.
        site.plugin.mount("db", "c1").expect("mounted");
        site.plugin.restart();
        assert_eq!(count(&site), 1);
        site.plugin.unmount("db", "c1").expect("unmounted");
        site.check_unmounted();
    });
}

#[test]
fn a_reference_of_a_killed_docker_goes_when_that_of_a_live_one_does() {
    let test = "a_reference_of_a_killed_docker_goes_when_that_of_a_live_one_does";
    if !have("curl") {
        return skip(test, "no curl");
    }
    on_devices(test, || {
        let site = DockerSite::new();
        site.plugin.create("db", &[FAST, ("size", "32M")]).expect("created");
        let count = || site.plugin.get("db").expect("a volume")["Status"]["references"].clone();
        let at = site.plugin.mount_by_another("db", "c1");
        // A container that goes on without Docker.
        let container = site.dir().join("container");
        fs::create_dir(&container).expect("a directory");
        Run::new("mount").args("--bind").arg(&at).arg(&container).ok();
        site.plugin.mount("db", "c2").expect("mounted");
        site.plugin.unmount("db", "c2").expect("unmounted");
        assert_eq!(count(), 1);
        fs::write(container.join("file"), "data").expect("written");
        site.plugin.mount("db", "c2").expect("mounted");
        Run::new("umount").arg(&container).ok();
        // At once, with the next call about the volume.
        site.plugin.unmount("db", "c2").expect("unmounted");
        assert_eq!((count(), site.publications("fast/db")), (0.into(), 0));
        site.check_unmounted();
        site.plugin.mount_by_another("db", "c3");
        site.plugin.mount("db", "c4").expect("mounted");
        assert_eq!(count(), 1, "the volume is that of the present Docker");
        site.plugin.unmount("db", "c4").expect("unmounted");
        site.check_unmounted();
    });
}

#[test]
fn only_what_docker_alone_has_had_is_deleted_with_its_name() {
    on_devices("only_what_docker_alone_has_had_is_deleted_with_its_name", || {
        let site = DockerSite::new();
        let plugin = &site.plugin;
        let is_deleted = |name: &str| {
            let status = plugin.get(name).expect("a volume")["Status"].clone();
            plugin.remove(name).expect("removed");
            check_failed(plugin.get(name), "no volume is called");
            let info = site.daemon.sheave(&format!("volume info fast/{name}")).output();
            let is_deleted = !info.status.success();
            assert_eq!(status["deleted_by_rm"], is_deleted, "{status}");
            is_deleted
        };
        for name in ["unused", "used", "attached", "renamed"] {
            plugin.create(name, &[FAST, ("size", "32M")]).expect("created");
        }
        for name in ["used", "attached"] {
            plugin.mount(name, "c1").expect("mounted");
            plugin.unmount(name, "c1").expect("unmounted");
        }
        site.daemon.sheave("attach fast/attached").ok();
        site.daemon.sheave("detach fast/attached").ok();
        plugin.create("other", &[("volume", "fast/renamed")]).expect("adopted");
        plugin.mount("other", "c1").expect("mounted");
        plugin.unmount("other", "c1").expect("unmounted");
        plugin.remove("other").expect("removed");
        assert!(is_deleted("unused") && is_deleted("used"));
        assert!(!is_deleted("attached") && !is_deleted("renamed"));
        assert!(plugin.log().contains("its data kept"), "{}", plugin.log());
        site.check_unmounted();
    });
}

/// The directory is a pool of both, as where it is on a file server.
#[test]
fn what_docker_of_another_node_has_written_is_not_deleted() {
    on_devices("what_docker_of_another_node_has_written_is_not_deleted", || {
        let site = DockerSite::new();
        let other = DockerPlugin::start_on_another_node(site.dir(), &["--node-id", "n2"]);
        for name in ["db", "own"] {
            site.plugin.create(name, &[FAST, ("size", "32M")]).expect("created");
            other.create(name, &[FAST]).expect("adopted");
        }
        let at = other.mount("db", "c1").expect("mounted");
        fs::write(at.join("file"), "data").expect("written");
        other.unmount("db", "c1").expect("unmounted");
        site.plugin.mount("own", "c1").expect("mounted");
        site.plugin.unmount("own", "c1").expect("unmounted");
        for name in ["db", "own"] {
            site.plugin.remove(name).expect("removed");
        }
        site.daemon.sheave("volume info fast/own").fails();
        let at = other.mount("db", "c1").expect("mounted");
        assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
        other.unmount("db", "c1").expect("unmounted");
        site.check_unmounted();
    });
}

#[test]
fn a_create_that_fails_deletes_only_what_it_has_made() {
    on_devices("a_create_that_fails_deletes_only_what_it_has_made", || {
        let (site, other) = DockerSite::with_another_node();
        let options = [FAST, ("size", "32M")];
        site.plugin.create("db", &options).expect("created");
        // Its record cannot be written there.
        for name in ["db", "new"] {
            let dir = site.dir().join(format!("other/docker/volumes/{name}.new"));
            fs::create_dir(dir).expect("a directory");
        }
        for name in ["db", "new"] {
            other.create(name, &options).expect_err("a directory is there");
        }
        let long = format!("fast/{}", "x".repeat(100_000));
        check_failed(other.create("long", &[("volume", &long)]), "see: sheave volume ls");
        site.daemon.sheave("volume info fast/db").ok();
        site.daemon.sheave("volume info fast/new").fails();
    });
}

#[test]
fn a_client_that_sends_half_a_call_does_not_keep_the_plugin_from_ending() {
    let node = PoolNode::new();
    let mut plugin = DockerPlugin::start(node.dir(), &["--node-id", "n1"]);
    let clients = ["POST /VolumeDriver.List HT", "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"];
    let clients = clients.map(|half| {
        let mut stream = UnixStream::connect(plugin.socket()).expect("it listens");
        stream.write_all(half.as_bytes()).expect("sent");
        stream
    });
    // A whole call behind them is answered.
    plugin.call("/Plugin.Activate", &json!({})).expect("an answer");
    let begun = Instant::now();
    plugin.end();
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    drop(clients);
}

/// A thread of the killed plugin waits in the kernel until the storage answers.
#[test]
fn a_plugin_starts_beside_a_killed_one_whose_storage_hangs() {
    on_devices("a_plugin_starts_beside_a_killed_one_whose_storage_hangs", || {
        let disk = HangingDisk::new();
        let slow = format!("[pools.slow]\nurl = \"file://{}\"\n", disk.dir().display());
        let node = PoolNode::with_block_devices().and_pools(&slow);
        let daemon = node.daemon();
        let mounts = Mounts::below(node.dir());
        let mut first = DockerPlugin::start(node.dir(), &["--node-id", "n1"]);
        for pool in ["slow", "fast"] {
            first.create(pool, &[("pool", pool), ("size", "32M")]).expect("created");
        }
        let at = first.mount("slow", "c1").expect("mounted");
        fs::write(at.join("file"), vec![7; 1 << 20]).expect("written");
        let sockets = node.dir().join("second");
        fs::create_dir(&sockets).expect("a directory");
        let hang = disk.hang();
        let second = thread::scope(|scope| {
            let unmount = scope.spawn(|| first.unmount("slow", "c1"));
            let waits = || {
                let tasks = format!("/proc/{}/task", first.pid());
                let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat"));
                let stats = fs::read_dir(tasks).expect("tasks").flatten().flat_map(stat);
                stats.into_iter().any(|stat| stat.contains(") D "))
            };
            // It waits for a moment for the disk of its records, too.
            let stays = || {
                (0..20).all(|_| {
                    thread::sleep(Duration::from_millis(50));
                    waits()
                })
            };
            assert!(eventually(stays), "{}", first.log());
            Run::new("kill").args("-KILL").arg(first.pid().to_string()).ok();
            let second = DockerPlugin::start_at(&sockets, node.dir(), &["--node-id", "n1"]);
            second.mount("fast", "c2").expect("mounted");
            second.unmount("fast", "c2").expect("unmounted");
            drop(hang);
            unmount.join().expect("no panic").expect_err("it was killed");
            second
        });
        first.kill();
        assert!(eventually(|| second.unmount("slow", "c1").is_ok()), "{}", second.log());
        assert_eq!(mounts.targets(), [] as [std::path::PathBuf; 0]);
        drop(daemon);
    });
}
