//! Calls a FlexVolume driver as kubelet and controller-manager do (pkg/volume/flexvolume of
//! Kubernetes): the same arguments, the same directories, the same reading of what it answers.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::{Daemon, Mounts, PoolNode, Run, sheave};

const VENDOR: &str = "sheave.dev";
const DRIVER: &str = "sheave";
/// A call that takes longer hangs.
const TIMEOUT: Duration = Duration::from_secs(150);

/// An installed driver, with the directory of kubelet.
pub struct FlexVolume {
    kubelet: PathBuf,
    driver: PathBuf,
    env: Vec<(&'static str, PathBuf)>,
    /// Has each call killed after this.
    pub killed_after: Option<Duration>,
}

/// A volume with `flexVolume`, in a pod or a PersistentVolume.
#[derive(Clone, Debug, Default)]
pub struct FlexSpec {
    /// Of the PersistentVolume, or of the volume in its pod.
    pub name: String,
    /// `fsType`.
    pub fs_type: String,
    /// `readOnly`.
    pub read_only: bool,
    /// `options`.
    pub options: BTreeMap<String, String>,
    /// Of its secret.
    pub secrets: BTreeMap<String, String>,
}

impl FlexSpec {
    /// A volume of a pool.
    #[must_use]
    pub fn new(name: &str, volume: &str) -> Self {
        let options = [("volume".to_owned(), volume.to_owned())].into();
        Self { name: name.to_owned(), options, ..Self::default() }
    }

    /// What Kubernetes passes to the driver.
    #[must_use]
    pub fn json(&self, extra: &[(&str, &str)]) -> String {
        let mut all = Map::new();
        let mut add = |key: &str, value: &str| drop(all.insert(key.to_owned(), value.into()));
        add("kubernetes.io/fsType", &self.fs_type);
        add("kubernetes.io/readwrite", if self.read_only { "ro" } else { "rw" });
        add("kubernetes.io/pvOrVolumeName", &self.name);
        for (key, value) in extra {
            add(key, value);
        }
        for (key, value) in &self.options {
            add(key, value);
        }
        Value::from(all).to_string()
    }
}

impl FlexVolume {
    /// Installs the driver with this configuration. Its daemon is in `dir`, and so is its state.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn install(dir: &Path, config: &str) -> Self {
        let kubelet = dir.join("kubelet");
        let place = dir.join("exec").join(format!("{VENDOR}~{DRIVER}"));
        fs::create_dir_all(&place).expect("a directory");
        fs::create_dir_all(&kubelet).expect("a directory");
        fs::write(place.join("flexvolume.toml"), config).expect("a configuration");
        let driver = place.join(DRIVER);
        symlink(sheave(), &driver).expect("a link");
        let env = ["SHEAVE_RUNTIME_DIR", "SHEAVE_STATE_DIR"].map(|name| (name, dir.to_owned()));
        Self { kubelet, driver, env: env.into(), killed_after: None }
    }

    /// Changes its configuration.
    ///
    /// # Panics
    /// When that cannot be written.
    pub fn configure(&self, config: &str) {
        fs::write(self.driver.with_file_name("flexvolume.toml"), config).expect("written");
    }

    /// Calls the driver, and checks what Kubernetes takes for a bug: more than one JSON object,
    /// and an exit code that says something else.
    ///
    /// # Panics
    /// When it has one.
    #[track_caller]
    pub fn call(&self, args: &[&str]) -> Result<Value, String> {
        let mut run = match self.killed_after {
            None => Run::new(&self.driver),
            Some(after) => {
                let seconds = format!("{}", after.as_secs_f64());
                Run::new("timeout").arg("--signal=KILL").arg(seconds).arg(&self.driver)
            }
        };
        for (name, value) in &self.env {
            run = run.env(name, value);
        }
        let done = args.iter().fold(run, |run, arg| run.arg(arg)).timeout(TIMEOUT).output();
        if self.killed_after.is_some() && done.status.code().is_none_or(|code| code > 2) {
            return Err("killed".to_owned());
        }
        assert_eq!(done.stderr, "", "kubelet reads it, too: {}", done.describe());
        let answer: Value = serde_json::from_str(&done.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", done.describe()));
        assert_eq!(done.stdout.trim_end().lines().count(), 1, "{}", done.describe());
        let is_success = answer["status"] == "Success";
        assert_eq!(done.status.success(), is_success, "{}", done.describe());
        match answer["status"].as_str() {
            Some("Success") => Ok(answer),
            Some("Not supported") => Err("Not supported".to_owned()),
            Some("Failure") => Err(answer["message"].as_str().expect("a message").to_owned()),
            _ => panic!("no status of the protocol: {}", done.describe()),
        }
    }

    /// Where kubelet has a pod's volume.
    #[must_use]
    pub fn pod_dir(&self, pod: &str, spec: &FlexSpec) -> PathBuf {
        let volumes = self.kubelet.join("pods").join(pod).join("volumes");
        volumes.join(format!("{VENDOR}~{DRIVER}")).join(&spec.name)
    }

    /// Where kubelet has a volume's device mounted.
    #[must_use]
    pub fn device_dir(&self, spec: &FlexSpec) -> PathBuf {
        let plugin = self.kubelet.join("plugins/kubernetes.io/flexvolume");
        plugin.join(format!("{VENDOR}/{DRIVER}")).join("mounts").join(&spec.name)
    }

    /// `SetUpAt`, for a pod.
    ///
    /// # Errors
    /// What the driver says.
    #[track_caller]
    pub fn set_up(&self, pod: &str, spec: &FlexSpec) -> Result<PathBuf, String> {
        let dir = self.pod_dir(pod, spec);
        if prepare_for_mount(&dir) {
            return Ok(dir);
        }
        let secrets: Vec<_> = spec
            .secrets
            .iter()
            .map(|(key, value)| (format!("kubernetes.io/secret/{key}"), value.clone()))
            .collect();
        let mut extra: Vec<_> = secrets.iter().map(|(key, value)| (&**key, &**value)).collect();
        extra.push(("kubernetes.io/pod.uid", pod));
        extra.push(("kubernetes.io/mounterArgs.FsGroup", "1000"));
        self.call(&["mount", text(&dir), &spec.json(&extra)])?;
        Ok(dir)
    }

    /// `TearDownAt`, of a pod.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// When it leaves a directory that cannot be removed.
    #[track_caller]
    pub fn tear_down(&self, pod: &str, spec: &FlexSpec) -> Result<(), String> {
        let dir = self.pod_dir(pod, spec);
        if !dir.exists() {
            return Ok(());
        }
        self.call(&["unmount", text(&dir)])?;
        if dir.exists() {
            fs::remove_dir(&dir).expect("an empty directory");
        }
        Ok(())
    }

    /// `Attach`, by controller-manager.
    ///
    /// # Errors
    /// What the driver says.
    #[track_caller]
    pub fn attach(&self, spec: &FlexSpec, node: &str) -> Result<String, String> {
        let answer = self.call(&["attach", &spec.json(&[]), node])?;
        Ok(answer["device"].as_str().expect("a device").to_owned())
    }

    /// `Detach`, by controller-manager.
    ///
    /// # Errors
    /// What the driver says.
    #[track_caller]
    pub fn detach(&self, spec: &FlexSpec, node: &str) -> Result<(), String> {
        self.call(&["detach", &spec.name, node]).map(drop)
    }

    /// `VolumesAreAttached`, by controller-manager.
    ///
    /// # Errors
    /// What the driver says.
    #[track_caller]
    pub fn is_attached(&self, spec: &FlexSpec, node: &str) -> Result<bool, String> {
        let answer = self.call(&["isattached", &spec.json(&[]), node])?;
        Ok(answer["attached"].as_bool().expect("a truth value"))
    }

    /// `WaitForAttach` and `MountDevice`, by kubelet.
    ///
    /// # Errors
    /// What the driver says.
    #[track_caller]
    pub fn mount_device(&self, spec: &FlexSpec, device: &str) -> Result<(), String> {
        let answer = self.call(&["waitforattach", device, &spec.json(&[])])?;
        let device = answer["device"].as_str().expect("a device");
        let dir = self.device_dir(spec);
        if prepare_for_mount(&dir) {
            return Ok(());
        }
        self.call(&["mountdevice", text(&dir), device, &spec.json(&[])]).map(drop)
    }

    /// `UnmountDevice`, by kubelet.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// When it leaves a directory that cannot be removed.
    #[track_caller]
    pub fn unmount_device(&self, spec: &FlexSpec) -> Result<(), String> {
        let dir = self.device_dir(spec);
        if !dir.exists() {
            return Ok(());
        }
        if is_mount_point(&dir) {
            self.call(&["unmountdevice", text(&dir)])?;
        }
        if dir.exists() {
            fs::remove_dir(&dir).expect("an empty directory");
        }
        Ok(())
    }
}

/// A node with a daemon, a volume `fast/db` and the driver.
pub struct FlexSite {
    /// What is mounted.
    pub mounts: Mounts,
    /// The driver.
    pub flex: FlexVolume,
    /// The daemon.
    pub daemon: Daemon,
    /// The node.
    pub node: PoolNode,
}

impl FlexSite {
    /// A node whose driver has this configuration.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(config: &str) -> Self {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        daemon.sheave("volume create fast/db --size 32M").ok();
        let flex = FlexVolume::install(node.dir(), config);
        Self { mounts: Mounts::below(node.dir()), flex, daemon, node }
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.node.dir()
    }

    /// What is known of `fast/db`.
    #[must_use]
    pub fn record(&self) -> Value {
        self.daemon.volume("fast/db")
    }

    /// To how many nodes it is published.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn publications(&self) -> usize {
        self.record()["publications"].as_array().expect("publications").len()
    }

    /// Checks that nothing is left of any call.
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
    pub fn check_bare(&self) {
        assert_eq!(self.mounts.targets(), [] as [PathBuf; 0]);
        assert_eq!(self.node.node.kernel.devices(), [] as [PathBuf; 0]);
        assert_eq!(self.publications(), 0);
        for dir in ["node", "flexvolume"] {
            let left: Vec<_> = fs::read_dir(self.dir().join(dir)).into_iter().flatten().collect();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
    }
}

/// Makes a directory as kubelet does; true if something is mounted there already.
fn prepare_for_mount(dir: &Path) -> bool {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(dir).expect("a directory");
    is_mount_point(dir)
}

/// `IsLikelyNotMountPoint` of Kubernetes: not of the device of the directory above.
fn is_mount_point(dir: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).expect("a directory").dev();
    device(dir) != device(dir.parent().expect("a directory above"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
