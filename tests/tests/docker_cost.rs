//! What a container costs that gets a volume beside another one.

use sheave_tests::{DockerSite, Trace, have, on_devices, skip};

/// The reference is written before the answer, and once more when Docker has that: each time its
/// record is flushed, and the record's directory.
const FLUSHES_MAX: usize = 4;

#[test]
fn a_second_container_starts_no_program_and_mounts_nothing() {
    let test = "a_second_container_starts_no_program_and_mounts_nothing";
    if !have("strace") {
        return skip(test, "strace is not installed");
    }
    on_devices(test, || {
        let site = DockerSite::new();
        let plugin = &site.plugin;
        plugin.create("db", &[("pool", "fast"), ("size", "32M")]).expect("created");
        let counts = |call: &mut dyn FnMut()| {
            let trace = Trace::record_programs(plugin.pid(), site.dir());
            call();
            let counts = trace.counts();
            move |name: &str| counts.get(name).copied().unwrap_or_default()
        };
        // The first one makes a filesystem and mounts it: what is counted can be seen.
        let first = counts(&mut || drop(plugin.mount("db", "c1").expect("mounted")));
        assert!(first("execve") > 0 && first("mount") == 1 && first("fsync") > 0);
        let second = counts(&mut || drop(plugin.mount("db", "c2").expect("mounted")));
        assert_eq!((second("execve"), second("mount")), (0, 0));
        let flushes = second("fsync") + second("fdatasync");
        assert!((1..=FLUSHES_MAX).contains(&flushes), "{flushes}");
        let end = counts(&mut || plugin.unmount("db", "c2").expect("unmounted"));
        assert_eq!((end("execve"), end("umount2")), (0, 0));
        plugin.unmount("db", "c1").expect("unmounted");
        plugin.remove("db").expect("removed");
    });
}
