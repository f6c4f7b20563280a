//! The volume plugin under Docker itself.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use sheave_tests::{Daemon, DockerEngine, DockerPlugin, PoolNode, Run, on_docker};

struct Site {
    engine: DockerEngine,
    plugin: DockerPlugin,
    daemon: Daemon,
    node: PoolNode,
}

impl Site {
    fn new() -> Self {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        let dir = node.node.kernel.scratch().path().to_owned();
        let engine = DockerEngine::start(&dir);
        let plugin =
            DockerPlugin::start_at(Path::new(DockerEngine::PLUGINS), &dir, &["--node-id", "n1"]);
        Self { engine, plugin, daemon, node }
    }

    fn docker(&self, args: &str) -> Run {
        self.engine.docker(args)
    }
}

#[test]
fn containers_keep_their_volumes_when_plugin_daemon_and_docker_are_killed() {
    let test = "containers_keep_their_volumes_when_plugin_daemon_and_docker_are_killed";
    on_docker(test, || {
        let mut site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        let why = site.docker("volume create --driver sheave --opt sise=1G wrong").fails();
        assert!(why.contains("no option is called \"sise\""), "{why}");
        site.engine.run("db", "echo first >/data/file");
        assert_eq!(site.engine.run("db", "busybox cat /data/file"), "first\n");
        let shown: Value =
            serde_json::from_str(&site.docker("volume inspect db").ok()).expect("JSON");
        assert_eq!(shown[0]["Status"]["filesystem"], "ext4", "{shown}");
        assert!(shown[0]["CreatedAt"].as_str().is_some_and(|at| at.starts_with("20")), "{shown}");
        site.engine.start_writer("db");
        site.docker("volume rm db").fails();
        site.plugin.restart();
        site.engine.goes_on("writer");
        site.daemon.kill();
        site.daemon = site.node.daemon();
        site.engine.goes_on("writer");
        site.engine.kill();
        site.engine.start_again();
        site.engine.goes_on("writer");
        site.docker("volume rm db").fails();
        site.engine.run("db", "busybox test -s /data/log");
        site.engine.goes_on("writer");
        site.docker("rm --force writer").ok();
        site.daemon.wait_for_no_devices();
        assert_eq!(site.engine.run("db", "busybox cat /data/file"), "first\n");
        site.docker("volume rm db").ok();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

/// Docker forgets what it was doing when it is killed; the plugin sees that no container has it.
#[test]
fn a_volume_is_released_when_docker_is_killed_at_any_step() {
    on_docker("a_volume_is_released_when_docker_is_killed_at_any_step", || {
        let mut site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        site.engine.run("db", "echo first >/data/file");
        for after_ms in [60, 150, 300, 600, 1000] {
            let run = site.docker("run --rm --network none --volume db:/data box /bin/sh -c");
            let run = run.arg("busybox cat /data/file");
            let running = thread::spawn(move || run.output());
            thread::sleep(Duration::from_millis(after_ms));
            site.engine.kill();
            site.engine.start_again();
            let _ = running.join().expect("it ends");
            let ids = site.docker("ps --all --quiet").ok();
            for id in ids.split_whitespace() {
                site.docker("rm --force").arg(id).ok();
            }
        }
        // It looks at once.
        site.plugin.restart();
        site.daemon.wait_for_no_devices();
        assert_eq!(site.engine.run("db", "busybox cat /data/file"), "first\n");
        site.docker("volume rm db").ok();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

#[test]
fn a_compose_file_has_its_volume() {
    on_docker("a_compose_file_has_its_volume", || {
        let site = Site::new();
        let file = site.node.node.file("compose.yaml");
        let text = "\
version: '2.4'
services:
  db:
    image: box
    network_mode: none
    command: [/bin/sh, -c, 'busybox test ! -e /data/log && WRITE']
    volumes: ['db:/data']
volumes:
  db:
    driver: sheave
    driver_opts: {pool: fast, size: 32M, mount-options: noatime}
";
        fs::write(&file, text.replace("WRITE", DockerEngine::WRITE)).expect("written");
        let compose = |args: &str| {
            let compose = site.engine.client("docker-compose").args("--project-name app --file");
            compose.arg(&file).args(args)
        };
        compose("up --detach").ok();
        site.engine.goes_on("app_db_1");
        assert_eq!(site.daemon.volume("fast/app_db")["size_bytes"], 32 << 20);
        compose("down --volumes").ok();
        site.daemon.wait_for_no_devices();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

/// Both times are measured in turn, so a busy machine slows both.
#[test]
#[expect(clippy::print_stdout, reason = "how long it took, with --nocapture")]
fn a_container_starts_about_as_fast_as_with_a_local_volume() {
    on_docker("a_container_starts_about_as_fast_as_with_a_local_volume", || {
        let site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        site.docker("volume create here").ok();
        let timed = |volume: &str| {
            let begun = Instant::now();
            site.engine.run(volume, "echo x >>/data/file");
            begun.elapsed()
        };
        // The first makes a file system.
        timed("db");
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..9 {
            times[0].push(timed("db"));
            times[1].push(timed("here"));
        }
        let [own, local] = times.map(|mut times| {
            times.sort();
            times[times.len() / 2]
        });
        println!("docker run: {own:?} with a volume of a pool, {local:?} with a local one");
        assert!(own < local * 3, "docker run: {own:?}, and {local:?} with a local volume");
        site.docker("volume rm db here").ok();
    });
}
