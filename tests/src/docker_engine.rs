//! Docker itself: that of this machine, or Debian's, which `scripts/docker-debian` fetches.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::{Run, eventually, have, on_devices, skip};

const TIMEOUT: Duration = Duration::from_secs(180);

/// Docker's processes. They end with it.
#[derive(Debug)]
pub struct DockerEngine {
    dir: PathBuf,
    containerd: Child,
    dockerd: Child,
}

impl DockerEngine {
    /// Where it looks for plugins.
    pub const PLUGINS: &str = "/run/docker/plugins";
    /// A command that writes a line to a volume at /data again and again, and ends when it cannot.
    pub const WRITE: &str = "while :; do busybox date >>/data/log || exit 9; busybox sync; \
                             busybox usleep 20000; done";

    /// Starts one that has its files in this directory, and an image `box` with a shell. That of
    /// the machine is not touched, nor seen.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn start(dir: &Path) -> Self {
        fs::create_dir_all("/run/docker").expect("a directory");
        Run::new("mount").args("-t tmpfs none /run/docker").ok();
        fs::create_dir(Self::PLUGINS).expect("a directory");
        let dir = dir.join("engine");
        fs::create_dir(&dir).expect("a directory");
        let containerd = spawn(&dir, "containerd", &["root", "state", "address"], &[]);
        assert!(eventually(|| dir.join("address").exists()), "containerd does not start");
        let dockerd = start_dockerd(&dir);
        let engine = Self { dir, containerd, dockerd };
        engine.wait_until_ready();
        engine.import_box();
        engine
    }

    fn import_box(&self) {
        let root = self.dir.join("image");
        fs::create_dir_all(root.join("bin")).expect("a directory");
        let busybox = Run::new("sh").args("-c").arg("command -v busybox").ok();
        fs::copy(busybox.trim(), root.join("bin/busybox")).expect("copied");
        symlink("busybox", root.join("bin/sh")).expect("a link");
        let tar = self.dir.join("image.tar");
        Run::new("tar").arg("-C").arg(root).arg("-cf").arg(&tar).arg(".").ok();
        self.docker("import").arg(tar).arg("box").ok();
    }

    /// A program of Docker, as a client of this.
    #[must_use]
    pub fn client(&self, program: &str) -> Run {
        let host = format!("unix://{}/host", self.dir.display());
        Run::new(program).env("PATH", path()).env("DOCKER_HOST", host).timeout(TIMEOUT)
    }

    /// The command `docker`.
    #[must_use]
    pub fn docker(&self, args: &str) -> Run {
        self.client("docker").args(args)
    }

    #[track_caller]
    fn wait_until_ready(&self) {
        let is_ready = || self.docker("version").output().status.success();
        let log = || fs::read_to_string(self.dir.join("dockerd.log")).unwrap_or_default();
        assert!(eventually(is_ready), "dockerd does not start:\n{}", log());
    }

    /// Runs a command in a container that has the volume at /data, and returns what it prints.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run(&self, volume: &str, command: &str) -> String {
        let run = self.docker("run --rm --network none --volume");
        run.arg(format!("{volume}:/data")).args("box /bin/sh -c").arg(command).ok()
    }

    /// Starts a container `writer` that has the volume and writes to it.
    ///
    /// # Panics
    /// When it does not write.
    #[track_caller]
    pub fn start_writer(&self, volume: &str) {
        let run = self.docker("run --detach --network none --name writer --volume");
        run.arg(format!("{volume}:/data")).args("box /bin/sh -c").arg(Self::WRITE).ok();
        self.goes_on("writer");
    }

    /// Waits until a container has written on.
    ///
    /// # Panics
    /// When it has not.
    #[track_caller]
    pub fn goes_on(&self, container: &str) {
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

    /// Kills dockerd. Containers go on.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn kill(&mut self) {
        self.dockerd.kill().expect("killed");
        self.dockerd.wait().expect("ended");
    }

    /// Starts dockerd again.
    ///
    /// # Panics
    /// When it does not answer.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.dockerd = start_dockerd(&self.dir);
        self.wait_until_ready();
    }
}

impl Drop for DockerEngine {
    fn drop(&mut self) {
        let ids = self.docker("ps --all --quiet").output().stdout;
        for id in ids.split_whitespace() {
            let _ = self.docker("rm --force").arg(id).output();
        }
        // Those that it runs would outlive it.
        let ids = self.docker("plugin ls --quiet").output().stdout;
        for id in ids.split_whitespace() {
            let _ = self.docker("plugin disable --force").arg(id).output();
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

/// Runs the body of the test of this name, with devices that can be mounted, where Docker is to be
/// had.
///
/// # Panics
/// When the body panics.
pub fn on_docker(test: &str, body: impl FnOnce()) {
    if !have("busybox") {
        return skip(test, "busybox is not installed");
    }
    match docker_dir() {
        Ok(_) => on_devices(test, body),
        Err(why) => skip(test, &format!("no Docker: {why}")),
    }
}
