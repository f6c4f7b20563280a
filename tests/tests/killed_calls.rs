//! Any calls of Docker and of FlexVolume, in any order, repeated, and with processes that are
//! killed in the middle: nothing is left in the end, and what has its volume has its data.
//!
//! `SHEAVE_CALLS` is how many calls are made, 1 000 without it, or as many as fit in a minute;
//! `SHEAVE_SEED` makes those of an earlier run again.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use sheave_tests::{Calls, DockerSite, FlexSite, FlexSpec, Run, eventually, on_devices};

const FAST: (&str, &str) = ("pool", "fast");
const NODE: &str = "n1";
/// A daemon may be killed so long after a call has begun.
const DAEMON_LIVES_FOR: Duration = Duration::from_millis(120);

/// The plugin is killed, and so is the daemon; a caller may leave before its answer.
#[test]
fn rule_35_calls_of_docker_leave_nothing() {
    on_devices("rule_35_calls_of_docker_leave_nothing", || {
        let mut site = DockerSite::new();
        let mut calls = Calls::new();
        let mut running = BTreeSet::new();
        while calls.more() {
            let name = calls.one_of(["a", "b"]);
            let id = calls.one_of(["1", "2", "3"]);
            let lives_for = calls.sometimes(4, Duration::from_millis(60));
            let killer = lives_for.map(|lives_for| {
                let pid = site.plugin.pid();
                thread::spawn(move || {
                    thread::sleep(lives_for);
                    Run::new("kill").args(&format!("-KILL {pid}")).output()
                })
            });
            let daemon_lives_for = calls.sometimes(10, DAEMON_LIVES_FOR);
            let (plugin, call) = (&site.plugin, calls.choose(10));
            let step = || match call {
                0 => drop(plugin.create(name, &[FAST, ("size", "32M")])),
                1 => {
                    let is_removed = plugin.remove(name).is_ok();
                    let is_used = running.iter().any(|(of, _)| *of == name);
                    assert!(!is_removed || !is_used, "{name} was removed in use");
                }
                2..4 => {
                    running.remove(&(name, id));
                    drop(plugin.unmount(name, id));
                }
                4 => drop(plugin.get(name)),
                5 => drop(plugin.begin_mount(name, id)),
                _ => {
                    if let Ok(at) = plugin.mount(name, id) {
                        let file = at.join(id);
                        if !running.insert((name, id)) {
                            assert_eq!(fs::read_to_string(&file).expect("the file"), id);
                        }
                        fs::write(file, id).expect("written");
                    }
                }
            };
            site.node.beside_kill(&mut site.daemon, daemon_lives_for, step);
            if let Some(killer) = killer {
                killer.join().expect("the killer ends");
                calls.killed += 1;
                site.plugin.restart();
            }
        }
        for name in ["a", "b"] {
            site.plugin.create(name, &[FAST, ("size", "32M")]).expect("created");
            // What a killed plugin has left may still be going on.
            site.plugin.mount(name, "4").expect("mounted");
            for id in ["1", "2", "3", "4"] {
                site.plugin.unmount(name, id).expect("unmounted");
            }
            site.plugin.remove(name).expect("removed");
        }
        site.check_unmounted();
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
        let left = fs::read_dir(site.dir().join("docker/volumes")).expect("the records");
        let left = left.map(|entry| entry.expect("an entry").file_name());
        let left: Vec<_> = left.filter(|name| name != "lock" && name != ".sheave-spare").collect();
        assert!(left.is_empty(), "records are left: {left:?}");
    });
}

/// Pods of one node, and what they have written.
struct Pods {
    site: FlexSite,
    specs: [FlexSpec; 2],
    written: BTreeSet<(&'static str, usize)>,
}

impl Pods {
    fn new(config: &str) -> Self {
        let site = FlexSite::new(config);
        site.daemon.sheave("volume create fast/other --size 32M").ok();
        let specs = [FlexSpec::new("a", "fast/db"), FlexSpec::new("b", "fast/other")];
        Self { site, specs, written: BTreeSet::new() }
    }

    /// A call by kubelet for a pod, or by controller-manager if `call` is 5 or more. Some are
    /// killed, and so is the daemon beside some.
    fn step(&mut self, calls: &mut Calls, call: u64) {
        let (pod, which) = (calls.one_of(["p", "q"]), calls.choose(2) as usize);
        // Most calls take 10 to 60 ms.
        let after = Duration::from_micros(500 << calls.choose(8));
        self.site.flex.killed_after = (calls.choose(3) == 0).then_some(after);
        let daemon_lives_for = calls.sometimes(10, DAEMON_LIVES_FOR);
        let (flex, spec, written) = (&self.site.flex, &self.specs[which], &mut self.written);
        let dir = flex.pod_dir(pod, spec);
        let mut killed = false;
        let step = || {
            let done = match call {
                0 => flex.set_up(pod, spec).map(|_| {
                    let file = dir.join(pod);
                    if !written.insert((pod, which)) {
                        assert_eq!(fs::read_to_string(&file).expect("the file"), pod);
                    }
                    fs::write(file, pod).expect("written");
                }),
                1 => flex.tear_down(pod, spec),
                2 => {
                    let _ = fs::create_dir_all(&dir);
                    flex.call(&["mount", text(&dir), &spec.json(&[])]).map(drop)
                }
                3 => flex.call(&["unmount", text(&dir)]).map(drop),
                4 => flex.unmount_device(spec),
                5 => flex.detach(spec, NODE),
                6 => flex.is_attached(spec, NODE).map(drop),
                _ => flex.attach(spec, NODE).and_then(|device| flex.mount_device(spec, &device)),
            };
            killed = done == Err("killed".to_owned());
        };
        self.site.node.beside_kill(&mut self.site.daemon, daemon_lives_for, step);
        calls.killed += u64::from(killed);
    }
}

#[test]
fn rule_35_calls_of_flexvolume_leave_nothing() {
    on_devices("rule_35_calls_of_flexvolume_leave_nothing", || {
        let mut pods = Pods::new("node = \"n1\"\n");
        let mut calls = Calls::new();
        while calls.more() {
            let call = calls.choose(4);
            pods.step(&mut calls, call);
        }
        let Pods { mut site, specs, .. } = pods;
        site.flex.killed_after = None;
        for spec in &specs {
            // What an interrupted mkfs has left may still be going on.
            assert!(eventually(|| site.flex.set_up("r", spec).is_ok()));
            for pod in ["p", "q", "r"] {
                let dir = site.flex.pod_dir(pod, spec);
                site.flex.call(&["unmount", text(&dir)]).expect("unmounted");
                site.flex.tear_down(pod, spec).expect("unmounted");
            }
        }
        site.check_bare();
    });
}

#[test]
fn rule_35_calls_of_flexvolume_with_attach_leave_nothing() {
    on_devices("rule_35_calls_of_flexvolume_with_attach_leave_nothing", || {
        let mut pods = Pods::new("node = \"n1\"\nattach = true\n");
        let mut calls = Calls::new();
        while calls.more() {
            let call = calls.choose(9);
            pods.step(&mut calls, call);
        }
        let Pods { mut site, specs, .. } = pods;
        site.flex.killed_after = None;
        for spec in &specs {
            for pod in ["p", "q"] {
                // It answers what goes on, such as the mkfs of a call that was killed.
                let done = || site.flex.tear_down(pod, spec).is_ok();
                assert!(eventually(done), "{:?}", site.flex.tear_down(pod, spec));
            }
            let done = || site.flex.unmount_device(spec).is_ok();
            assert!(eventually(done), "{:?}", site.flex.unmount_device(spec));
            // Kubelet does not call for what is not mounted: a call that was killed between
            // unmounting and the end of the device is not repeated.
            let done = || site.flex.detach(spec, NODE).is_ok();
            assert!(eventually(done), "{:?}", site.flex.detach(spec, NODE));
        }
        site.check_bare();
    });
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
