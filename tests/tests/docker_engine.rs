//! The volume plugin under Docker itself: that of this machine, or Debian's, which
//! `scripts/docker-debian` fetches.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use sheave_tests::{Daemon, DockerPlugin, PoolNode, Run, eventually, have, on_devices, skip};

/// Where Docker looks for plugins.
const PLUGINS: &str = "/run/docker/plugins";
const TIMEOUT: Duration = Duration::from_secs(180);
const WRITE: &str = "while :; do busybox date >>/data/log || exit 9; busybox sync; \
                     busybox usleep 20000; done";

/// Docker's processes. They end with it.
struct Engine {
    dir: PathBuf,
    containerd: Child,
    dockerd: Child,
}

impl Engine {
    fn start(dir: &Path) -> Self {
        // That of the machine is not touched, nor seen.
        fs::create_dir_all("/run/docker").expect("a directory");
        Run::new("mount").args("-t tmpfs none /run/docker").ok();
        fs::create_dir(PLUGINS).expect("a directory");
        let dir = dir.join("engine");
        fs::create_dir(&dir).expect("a directory");
        let containerd = spawn(&dir, "containerd", &["root", "state", "address"], &[]);
        assert!(eventually(|| dir.join("address").exists()), "containerd does not start");
        let dockerd = start_dockerd(&dir);
        let engine = Self { dir, containerd, dockerd };
        engine.wait_until_ready();
        engine
    }

    fn run(&self, program: &str) -> Run {
        let host = format!("unix://{}/host", self.dir.display());
        Run::new(program).env("PATH", path()).env("DOCKER_HOST", host).timeout(TIMEOUT)
    }

    fn docker(&self, args: &str) -> Run {
        self.run("docker").args(args)
    }

    #[track_caller]
    fn wait_until_ready(&self) {
        let is_ready = || self.docker("version").output().status.success();
        let log = || fs::read_to_string(self.dir.join("dockerd.log")).unwrap_or_default();
        assert!(eventually(is_ready), "dockerd does not start:\n{}", log());
    }

    fn kill(&mut self) {
        self.dockerd.kill().expect("killed");
        self.dockerd.wait().expect("ended");
    }

    fn start_again(&mut self) {
        self.dockerd = start_dockerd(&self.dir);
        self.wait_until_ready();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let ids = self.docker("ps --all --quiet").output().stdout;
        for id in ids.split_whitespace() {
            let _ = self.docker("rm --force").arg(id).output();
        }
        for child in [&mut self.dockerd, &mut self.containerd] {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Where programs are, Docker's first.
fn path() -> String {
    let docker = docker_dir().as_deref().unwrap_or_default();
    format!("{docker}:{}", env::var("PATH").unwrap_or_default())
}

fn docker_dir() -> &'static Result<String, String> {
    static DIR: OnceLock<Result<String, String>> = OnceLock::new();
    DIR.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/docker-debian");
        let output = Run::new(script).timeout(Duration::from_secs(300)).output();
        match output.status.success() {
            true => Ok(output.stdout.trim().to_owned()),
            false => Err(output.stderr.trim().replace('\n', "; ")),
        }
    })
}

fn start_dockerd(dir: &Path) -> Child {
    let address = dir.join("address");
    let fixed = [
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
        "--live-restore",
        "--storage-driver=vfs",
        "--containerd",
        address.to_str().expect("UTF-8"),
        "--host",
        &format!("unix://{}/host", dir.display()),
    ];
    let _ = fs::remove_file(dir.join("pidfile"));
    spawn(dir, "dockerd", &["data-root", "exec-root", "pidfile"], &fixed)
}

/// Starts a program with options that name paths in a directory, and others.
fn spawn(dir: &Path, program: &str, paths: &[&str], more: &[&str]) -> Child {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]).env("PATH", path());
    for name in paths {
        command.arg(format!("--{name}")).arg(dir.join(name));
    }
    let log = File::options().create(true).append(true).open(dir.join(format!("{program}.log")));
    let log = log.expect("log file");
    command.args(more).stdin(Stdio::null()).stdout(log.try_clone().expect("a file")).stderr(log);
    command.spawn().expect("setpriv (util-linux)")
}

struct Site {
    engine: Engine,
    plugin: DockerPlugin,
    daemon: Daemon,
    node: PoolNode,
}

impl Site {
    fn new() -> Self {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        let dir = node.node.kernel.scratch().path().to_owned();
        let engine = Engine::start(&dir);
        let plugin = DockerPlugin::start_at(Path::new(PLUGINS), &dir, &["--node-id", "n1"]);
        let root = dir.join("image");
        fs::create_dir_all(root.join("bin")).expect("a directory");
        let busybox = Run::new("sh").args("-c").arg("command -v busybox").ok();
        fs::copy(busybox.trim(), root.join("bin/busybox")).expect("copied");
        symlink("busybox", root.join("bin/sh")).expect("a link");
        let tar = dir.join("image.tar");
        Run::new("tar").arg("-C").arg(root).arg("-cf").arg(&tar).arg(".").ok();
        engine.docker("import").arg(tar).arg("box").ok();
        Self { engine, plugin, daemon, node }
    }

    fn docker(&self, args: &str) -> Run {
        self.engine.docker(args)
    }

    /// Runs a command in a container with the volume at /data.
    fn run(&self, volume: &str, command: &str) -> String {
        let run = self.docker("run --rm --network none --volume");
        run.arg(format!("{volume}:/data")).args("box /bin/sh -c").arg(command).ok()
    }

    /// Waits until a container has written on.
    #[track_caller]
    fn goes_on(&self, container: &str) {
        let lines = || -> Option<u64> {
            let count = self.docker("exec").arg(container).args("/bin/sh -c");
            count.arg("busybox wc -l </data/log").output().stdout.trim().parse().ok()
        };
        let mut before = None;
        let writes = eventually(|| {
            let now = lines();
            before = before.or(now);
            now > before.map(|before| before + 2) && before.is_some()
        });
        assert!(writes, "it stands still: {}", self.docker("ps --all").ok());
    }

    /// Waits until no volume is a device.
    #[track_caller]
    fn check_released(&self) {
        let is_unused = || self.daemon.sheave("ls").ok() == "no devices\n";
        assert!(eventually(is_unused), "{}\n{}", self.daemon.sheave("ls").ok(), self.plugin.log());
    }
}

fn on_engine(test: &str, body: impl FnOnce()) {
    if !have("busybox") || !have("nbdfuse") {
        return skip(test, "busybox or nbdfuse (libnbd-bin) is not installed");
    }
    match docker_dir() {
        Ok(_) => on_devices(test, body),
        Err(why) => skip(test, &format!("no Docker: {why}")),
    }
}

#[test]
fn containers_keep_their_volumes_when_plugin_daemon_and_docker_are_killed() {
    let test = "containers_keep_their_volumes_when_plugin_daemon_and_docker_are_killed";
    on_engine(test, || {
        let mut site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        let why = site.docker("volume create --driver sheave --opt sise=1G wrong").fails();
        assert!(why.contains("no option is called \"sise\""), "{why}");
        site.run("db", "echo first >/data/file");
        assert_eq!(site.run("db", "busybox cat /data/file"), "first\n");
        let shown: Value =
            serde_json::from_str(&site.docker("volume inspect db").ok()).expect("JSON");
        assert_eq!(shown[0]["Status"]["filesystem"], "ext4", "{shown}");
        let begun = site.docker("run --detach --network none --name writer --volume db:/data box");
        begun.args("/bin/sh -c").arg(WRITE).ok();
        site.goes_on("writer");
        site.docker("volume rm db").fails();
        site.plugin.restart();
        site.goes_on("writer");
        site.daemon.kill();
        site.daemon = site.node.daemon();
        site.goes_on("writer");
        site.engine.kill();
        site.engine.start_again();
        site.goes_on("writer");
        site.docker("volume rm db").fails();
        site.run("db", "busybox test -s /data/log");
        site.goes_on("writer");
        site.docker("rm --force writer").ok();
        site.check_released();
        assert_eq!(site.run("db", "busybox cat /data/file"), "first\n");
        site.docker("volume rm db").ok();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

/// Docker forgets what it was doing when it is killed; the plugin sees that no container has it.
#[test]
fn a_volume_is_released_when_docker_is_killed_at_any_step() {
    on_engine("a_volume_is_released_when_docker_is_killed_at_any_step", || {
        let mut site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        site.run("db", "echo first >/data/file");
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
        site.check_released();
        assert_eq!(site.run("db", "busybox cat /data/file"), "first\n");
        site.docker("volume rm db").ok();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

#[test]
fn a_compose_file_has_its_volume() {
    on_engine("a_compose_file_has_its_volume", || {
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
        fs::write(&file, text.replace("WRITE", WRITE)).expect("written");
        let compose = |args: &str| {
            let compose = site.engine.run("docker-compose").args("--project-name app --file");
            compose.arg(&file).args(args)
        };
        compose("up --detach").ok();
        site.goes_on("app_db_1");
        assert_eq!(site.daemon.volume("fast/app_db")["size_bytes"], 32 << 20);
        compose("down --volumes").ok();
        site.check_released();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

/// Both times are measured in turn, so a busy machine slows both.
#[test]
#[expect(clippy::print_stdout, reason = "how long it took, with --nocapture")]
fn a_container_starts_about_as_fast_as_with_a_local_volume() {
    on_engine("a_container_starts_about_as_fast_as_with_a_local_volume", || {
        let site = Site::new();
        site.docker("volume create --driver sheave --opt pool=fast --opt size=32M db").ok();
        site.docker("volume create here").ok();
        let timed = |volume: &str| {
            let begun = Instant::now();
            site.run(volume, "echo x >>/data/file");
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
