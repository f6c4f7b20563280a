//! How long calls of Docker's plugin and of the FlexVolume driver take, with devices of the
//! stand-in for a kernel: `SHEAVE_BIN=target/release/sheave cargo run -p sheave-tests --example
//! front_latency`.

use std::env;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use sheave_tests::{DockerSite, FlexSpec, FlexVolume, PoolNode};

/// Set in the process that has a mount namespace of its own.
const INSIDE: &str = "SHEAVE_LATENCY_NAMESPACE";
/// Calls of one kind; of those that make a device, so many.
const CALLS: usize = 300;
const CYCLES: usize = 100;
const NODE: &str = "n1";

fn main() -> ExitCode {
    if env::var_os(INSIDE).is_none() {
        let mut inside = Command::new("unshare");
        inside.args(["--mount", "--propagation", "private", "--"]);
        inside.arg(env::current_exe().expect("this program")).args(env::args().skip(1));
        let status = inside.env(INSIDE, "1").status().expect("unshare (util-linux)");
        return if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    docker();
    flexvolume_without_attach();
    flexvolume_with_attach();
    ExitCode::SUCCESS
}

/// Times of calls, by what they do.
#[derive(Default)]
struct Times(Vec<(&'static str, Vec<Duration>)>);

impl Times {
    /// Takes a call, and the time that it took.
    fn of<T>(&mut self, what: &'static str, call: impl FnOnce() -> Result<T, String>) -> T {
        let begun = Instant::now();
        let answer = call().unwrap_or_else(|error| panic!("{what}: {error}"));
        let took = begun.elapsed();
        match self.0.iter_mut().find(|(name, _)| *name == what) {
            Some((_, times)) => times.push(took),
            None => self.0.push((what, vec![took])),
        }
        answer
    }

    #[expect(clippy::print_stdout, reason = "what it is for")]
    fn show(self, front: &str) {
        for (what, mut times) in self.0 {
            times.sort();
            let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e3;
            let (count, name) = (times.len(), format!("{front} {what}"));
            println!(
                "{name:48} {count:4} p50 {:6.1} ms p99 {:6.1} ms max {:6.1} ms",
                at(50),
                at(99),
                at(100)
            );
        }
    }
}

fn docker() {
    let site = DockerSite::new();
    let mut times = Times::default();
    let plugin = &site.plugin;
    plugin.create("db", &[("pool", "fast"), ("size", "32M")]).expect("created");
    // The first makes a filesystem.
    for cycle in 0..=CYCLES {
        if cycle == 0 {
            plugin.mount("db", "c").expect("mounted");
            plugin.unmount("db", "c").expect("unmounted");
            continue;
        }
        times.of("Mount, attaches", || plugin.mount("db", "c"));
        times.of("Unmount, detaches", || plugin.unmount("db", "c"));
    }
    plugin.mount("db", "first").expect("mounted");
    for _ in 0..CALLS {
        times.of("Mount of an attached volume", || plugin.mount("db", "c"));
        times.of("Get", || plugin.get("db"));
        times.of("Unmount beside another container", || plugin.unmount("db", "c"));
    }
    plugin.unmount("db", "first").expect("unmounted");
    plugin.remove("db").expect("removed");
    times.show("docker");
}

fn flexvolume_without_attach() {
    let node = PoolNode::with_block_devices();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/db --size 32M").ok();
    let flex = FlexVolume::install(node.dir(), &format!("node = \"{NODE}\"\n"));
    let spec = FlexSpec::new("data", "fast/db");
    let mut times = Times::default();
    flex.set_up("a", &spec).expect("mounted");
    flex.tear_down("a", &spec).expect("unmounted");
    for _ in 0..CYCLES {
        times.of("init", || flex.call(&["init"]));
        times.of("mount, attaches", || flex.set_up("a", &spec));
        times.of("mount of an attached volume", || flex.set_up("b", &spec));
        times.of("unmount beside another pod", || flex.tear_down("b", &spec));
        times.of("unmount, detaches", || flex.tear_down("a", &spec));
    }
    times.show("flexvolume");
}

fn flexvolume_with_attach() {
    let node = PoolNode::with_block_devices();
    let daemon = node.daemon();
    daemon.sheave("volume create fast/db --size 32M").ok();
    let flex = FlexVolume::install(node.dir(), &format!("node = \"{NODE}\"\nattach = true\n"));
    let spec = FlexSpec::new("data", "fast/db");
    let mut times = Times::default();
    for cycle in 0..=CYCLES {
        let mut first = Times::default();
        let of = if cycle == 0 { &mut first } else { &mut times };
        let device = of.of("attach", || flex.attach(&spec, NODE));
        of.of("isattached", || flex.is_attached(&spec, NODE));
        of.of("waitforattach and mountdevice", || flex.mount_device(&spec, &device));
        of.of("mount", || flex.set_up("a", &spec));
        of.of("unmount", || flex.tear_down("a", &spec));
        of.of("unmountdevice", || flex.unmount_device(&spec));
        of.of("detach", || flex.detach(&spec, NODE));
    }
    times.show("flexvolume, attach:");
}
