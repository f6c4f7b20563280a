//! The managed plugin of Docker, as `make docker-plugin` builds it: Docker runs it in a container,
//! whose mounts reach the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use serde_json::{Value, json};
use sheave_node::Fs;
use sheave_tests::{
    Daemon, DockerEngine, DockerPlugin, PoolNode, Run, eventually, have, may_grow, on_docker,
    sheave, skip,
};

/// A program that is built for tests is large.
const BUILD_TIMEOUT: Duration = Duration::from_secs(300);

struct Site {
    engine: DockerEngine,
    daemon: Daemon,
    node: PoolNode,
    /// Of the plugin, by which its process is found.
    node_id: String,
}

impl Site {
    fn new() -> Self {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        let engine = DockerEngine::start(node.dir());
        let node_id = format!("managed-{}", process::id());
        let site = Self { engine, daemon, node, node_id };
        site.build();
        site.install();
        site
    }

    fn built(&self) -> PathBuf {
        self.node.dir().join("managed")
    }

    fn install(&self) {
        self.docker("plugin create sheave").arg(self.built()).ok();
        let dir = self.node.dir().display();
        let set = self.docker("plugin set sheave");
        let set = set.arg(format!("runtime.source={dir}")).arg(format!("state.source={dir}"));
        set.arg(format!("args=--node-id {}", self.node_id)).ok();
        self.docker("plugin enable sheave").ok();
    }

    fn uninstall(&self) {
        self.docker("plugin disable --force sheave").ok();
        self.docker("plugin rm --force sheave").ok();
    }

    fn docker(&self, args: &str) -> Run {
        self.engine.docker(args)
    }

    /// Builds the plugin. The devices of the stand-in for a kernel are links in a directory, which
    /// the plugin needs as it needs /dev. It gets no capability that this machine lacks.
    fn build(&self) {
        let built = self.built();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/docker/build");
        let build = Run::new(script).arg(&built).arg("/").env("SHEAVE_BIN", sheave());
        build.timeout(BUILD_TIMEOUT).ok();
        let path = built.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        let dir = self.node.dir();
        config["mounts"].as_array_mut().expect("mounts").push(json!({
            "name": "devices", "source": dir, "destination": dir,
            "type": "bind", "options": ["bind"],
        }));
        if !may_grow(Fs::Ext4) {
            let capabilities = config["linux"]["capabilities"].as_array_mut().expect("a list");
            capabilities.retain(|capability| capability != "CAP_SYS_RESOURCE");
        }
        fs::write(path, config.to_string()).expect("written");
    }

    /// Kills the plugin's process, and waits until Docker has started another one.
    #[track_caller]
    fn kill_plugin(&self) {
        let killed = self.plugin().expect("the plugin runs");
        Run::new("kill").args("-KILL").arg(killed.to_string()).ok();
        let is_new = || self.plugin().is_some_and(|pid| pid != killed);
        assert!(eventually(is_new), "{}", self.docker("plugin ls").ok());
    }

    /// Where the plugin listens.
    fn socket(&self) -> PathBuf {
        let id = self.docker("plugin inspect --format {{.Id}} sheave").ok();
        Path::new(DockerEngine::PLUGINS).join(id.trim()).join("sheave.sock")
    }

    fn plugin(&self) -> Option<u32> {
        let entries = fs::read_dir("/proc").expect("/proc").flatten();
        let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.find(|pid: &u32| {
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.starts_with("/usr/bin/sheave\0") && arguments.contains(&self.node_id)
        })
    }

    /// Waits until no volume is a device, nor has a state, which ends a moment later.
    #[track_caller]
    fn check_released(&self) {
        self.daemon.wait_for_no_devices();
        let states = self.node.dir().join("node");
        let staged = || fs::read_dir(&states).expect("a directory").count();
        assert!(eventually(|| staged() == 0), "{} volumes with a state", staged());
    }
}

#[test]
fn a_managed_plugin_keeps_volumes_of_containers_and_forgets_those_of_none() {
    let test = "a_managed_plugin_keeps_volumes_of_containers_and_forgets_those_of_none";
    on_docker(test, || {
        let mut site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        assert_eq!(
            site.engine.run("db", "echo first >/data/file; busybox cat /data/file"),
            "first\n"
        );
        site.check_released();
        site.engine.start_writer("db");
        site.docker("volume rm db").fails();
        site.kill_plugin();
        site.engine.goes_on("writer");
        assert_eq!(site.engine.run("db", "busybox cat /data/file"), "first\n");
        site.engine.goes_on("writer");
        site.daemon.kill();
        site.daemon = site.node.daemon();
        site.engine.kill();
        site.engine.start_again();
        site.engine.goes_on("writer");
        site.docker("volume rm db").fails();
        site.docker("rm --force writer").ok();
        site.check_released();
        assert_eq!(site.engine.run("db", "busybox cat /data/file"), "first\n");
        // An upgrade.
        site.uninstall();
        site.install();
        assert_eq!(site.engine.run("db", "busybox cat /data/file"), "first\n");
        site.docker("volume rm db").ok();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

/// The mount that Docker sees is that of the plugin, and no container.
#[test]
fn references_of_a_killed_docker_are_forgotten_by_a_managed_plugin() {
    let test = "references_of_a_killed_docker_are_forgotten_by_a_managed_plugin";
    if !have("curl") {
        return skip(test, "no curl");
    }
    on_docker(test, || {
        let site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        // It stands for a Docker that is killed before it starts the container.
        DockerPlugin::mount_at_by_another(&site.socket(), "db", "c1");
        site.kill_plugin();
        site.check_released();
        assert_eq!(site.engine.run("db", "busybox ls /data"), "lost+found\n");
        site.docker("volume rm db").ok();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}
