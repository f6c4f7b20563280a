//! Volumes outside of pools' directories, for containers: those that the daemon's configuration
//! lists, and no others.

use std::fs;

use sheave_core::percent_encode;
use sheave_tests::{
    DockerPlugin, FlexSpec, FlexVolume, Mounts, PoolNode, Run, append_line, check_failed, have,
    on_devices, skip,
};

const SIZE: u64 = 32 << 20;

/// An image, with a filesystem that this program has not made.
fn image(node: &PoolNode, name: &str, has_fs: bool) -> String {
    let path = node.dir().join(name);
    fs::File::create(&path).expect("a file").set_len(SIZE).expect("a sparse file");
    if has_fs {
        Run::new("mkfs.ext4").args("-q").arg(&path).env("PATH", "/usr/sbin:/sbin:/usr/bin").ok();
    }
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn containers_use_the_volumes_that_the_configuration_lists_and_no_others() {
    let test = "containers_use_the_volumes_that_the_configuration_lists_and_no_others";
    if !have("qemu-nbd") {
        return skip(test, "qemu-nbd is not installed");
    }
    on_devices(test, || {
        let node = PoolNode::with_block_devices();
        let [old, blank, by_program, free] = ["old.img", "blank.img", "program.img", "free.img"]
            .map(|name| image(&node, name, name != "blank.img"));
        let command = format!("qemu-nbd --format=raw {by_program}");
        let command = percent_encode(command.as_bytes(), |c| !"% &".contains(c));
        let tables = format!(
            "[pools.own]\ntrust_attacher = true\n[pools.own.volumes]\nold = \"{old}\"\n\
             blank = \"{blank}\"\nprogram = \"nbd+exec:?command={command}\"\n\
             [pools.readers]\nvolumes = {{ free = \"{free}\" }}\n"
        );
        let node = node.and_pools(&tables);
        let daemon = node.daemon();
        assert_eq!(daemon.volume("own/old")["size_bytes"], SIZE);
        let docker = DockerPlugin::start(node.dir(), &["--node-id", "n1"]);
        let flex = FlexVolume::install(node.dir(), "node = \"n1\"\n");
        let mounts = Mounts::below(node.dir());

        for name in ["old", "program"] {
            let volume = format!("own/{name}");
            docker.create(name, &[("volume", &volume)]).expect("created");
            let at = docker.mount(name, "c1").expect("mounted");
            assert_eq!(append_line(&at, "docker"), "docker\n");
            let spec = FlexSpec::new("data", &volume);
            check_failed(flex.set_up("a", &spec), "in use on this node by CSI or Docker");
            docker.unmount(name, "c1").expect("unmounted");
            let at = flex.set_up("a", &spec).expect("mounted");
            assert_eq!(append_line(&at, "flexvolume"), "docker\nflexvolume\n");
            flex.tear_down("a", &spec).expect("unmounted");
            docker.remove(name).expect("forgotten");
        }

        docker.create("blank", &[("volume", "own/blank")]).expect("created");
        check_failed(docker.mount("blank", "c1"), "it is never formatted");
        let unchanged = fs::read(&blank).expect("a file").iter().all(|byte| *byte == 0);
        assert!(unchanged, "nothing is written to it");

        // Another node may have it, for all that is known.
        let mut spec = FlexSpec::new("data", "readers/free");
        check_failed(flex.set_up("a", &spec), "set trust_attacher = true");
        spec.read_only = true;
        let at = flex.set_up("a", &spec).expect("mounted");
        fs::write(at.join("x"), "").expect_err("it is read-only");
        flex.tear_down("a", &spec).expect("unmounted");

        for other in [&*free, "nbd://127.0.0.1/x", "own/none", "none/x"] {
            docker.create("other", &[("volume", other)]).expect_err(other);
            flex.set_up("b", &FlexSpec::new("other", other)).expect_err(other);
        }
        assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
        assert_eq!(mounts.targets().len(), 0);
    });
}
