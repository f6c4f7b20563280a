//! `sheave docker-plugin`, as Docker calls it.

use std::fs;
use std::net::TcpStream;
use std::path::Path;

use serde_json::{Value, json};
use sheave_tests::{
    Certificates, DockerPlugin, DockerSite, Run, Scratch, check_failed, eventually, have,
    on_devices, sheave, skip,
};

const FAST: (&str, &str) = ("pool", "fast");

#[test]
fn a_container_has_its_volume_and_leaves_nothing() {
    on_devices("a_container_has_its_volume_and_leaves_nothing", || {
        let mut site = DockerSite::new();
        let plugin = &site.plugin;
        let activated = plugin.call("/Plugin.Activate", &json!({})).expect("an answer");
        assert_eq!(activated["Implements"], json!(["VolumeDriver"]));
        let able = plugin.call("/VolumeDriver.Capabilities", &json!({})).expect("an answer");
        assert_eq!(able["Capabilities"]["Scope"], "local");
        check_failed(plugin.get("db"), "no volume is called db");
        let options = [FAST, ("size", "32M"), ("limit-iops", "5000")];
        for _ in 0..2 {
            plugin.create("db", &options).expect("created, also once more");
        }
        check_failed(plugin.create("db", &[FAST]), "other options");
        let record = site.daemon.volume("fast/db");
        assert_eq!(
            (&record["size_bytes"], &record["limit_iops"]),
            (&json!(32 << 20), &json!(5000))
        );
        let got = plugin.get("db").expect("a volume");
        assert_eq!((&got["Name"], &got["Mountpoint"]), (&json!("db"), &json!("")));
        assert_eq!(
            got["Status"]["options"],
            json!({"pool": "fast", "size": "32M", "limit-iops": "5000"})
        );
        for round in 0..2 {
            let at = site.plugin.mount("db", "c1").expect("mounted");
            for id in ["c1", "c2"] {
                assert_eq!(site.plugin.mount("db", id).as_ref(), Ok(&at));
            }
            if round == 1 {
                assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
            }
            fs::write(at.join("file"), "data").expect("written");
            let path = site.plugin.call("/VolumeDriver.Path", &json!({ "Name": "db" }));
            assert_eq!(path.expect("a path")["Mountpoint"], json!(at));
            check_failed(site.plugin.remove("db"), "in use by 2 containers");
            // It survives the plugin.
            site.plugin.restart();
            site.plugin.unmount("db", "c1").expect("unmounted");
            fs::write(at.join("other"), "still there").expect("written");
            for _ in 0..2 {
                site.plugin.unmount("db", "c2").expect("unmounted, also once more");
            }
            site.check_unmounted();
            assert_eq!(site.publications("fast/db"), 0);
        }
        let listed = site.plugin.call("/VolumeDriver.List", &json!({})).expect("a list");
        let created = &got["CreatedAt"];
        let listed_as = json!([{ "Name": "db", "Mountpoint": "", "CreatedAt": created }]);
        assert_eq!(listed["Volumes"], listed_as);
        assert!(created.as_str().is_some_and(|at| at.starts_with("20") && at.ends_with('Z')));
        site.plugin.remove("db").expect("removed");
        check_failed(site.plugin.remove("db"), "no volume is called db");
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

#[test]
fn a_volume_that_exists_is_adopted_and_kept() {
    on_devices("a_volume_that_exists_is_adopted_and_kept", || {
        let site = DockerSite::new();
        site.daemon.sheave("volume create fast/db --size 32M").ok();
        let plugin = &site.plugin;
        check_failed(plugin.create("db", &[FAST, ("size", "64M")]), "make it longer first");
        check_failed(plugin.create("db", &[FAST, ("limit-iops", "500")]), "has its own limits");
        plugin.create("db", &[FAST, ("mkfs", "false")]).expect("adopted");
        check_failed(plugin.mount("db", "c1"), "never formatted");
        site.check_unmounted();
        plugin.remove("db").expect("removed");
        plugin.create("other", &[("volume", "fast/db")]).expect("adopted");
        plugin.mount("other", "c1").expect("mounted");
        plugin.unmount("other", "c1").expect("unmounted");
        plugin.remove("other").expect("removed");
        assert_eq!(site.daemon.volume("fast/db")["formatted"], "ext4", "it is kept");
        plugin.create("made", &[FAST, ("size", "32M")]).expect("created");
        plugin.create("again", &[("volume", "fast/made")]).expect("adopted");
        plugin.remove("made").expect("removed");
        plugin.mount("again", "c1").expect("its data is there");
        plugin.unmount("again", "c1").expect("unmounted");
    });
}

#[test]
fn what_could_never_be_mounted_is_not_created() {
    on_devices("what_could_never_be_mounted_is_not_created", || {
        let site = DockerSite::new();
        let plugin = &site.plugin;
        for (options, why) in [
            (&[("size", "64M"), ("fstype", "btrfs")][..], "are too few for btrfs"),
            (&[("fstype", "xfs")], "4194304 bytes are too few for xfs"),
            (&[("mount-options", "noatime,bind")], "option bind cannot be used"),
            (&[("readonly", "true")], "would be new"),
            (&[("mount-options", "ro")], "would be new"),
        ] {
            let options = [&[FAST][..], options].concat();
            check_failed(plugin.create("db", &options), why);
            assert_eq!(site.node.files("fast"), [] as [&str; 0], "{why}");
        }
        site.daemon.sheave("volume create fast/db --size 32M").ok();
        let adopted = ("volume", "fast/db");
        check_failed(plugin.create("db", &[adopted, ("fstype", "xfs")]), "too few for xfs");
        plugin.create("db", &[adopted]).expect("adopted");
        plugin.mount("db", "c1").expect("mounted");
        plugin.unmount("db", "c1").expect("unmounted");
        check_failed(plugin.create("b", &[adopted, ("fstype", "xfs")]), "it holds ext4");
        plugin.create("b", &[adopted, ("readonly", "true")]).expect("adopted");
        plugin.mount("b", "c1").expect("mounted");
        plugin.unmount("b", "c1").expect("unmounted");
        site.check_unmounted();
    });
}

/// A plugin that was killed between both steps of `docker volume rm` has left the record.
#[test]
fn rule_35_a_volume_whose_removal_was_killed_is_made_anew() {
    on_devices("rule_35_a_volume_whose_removal_was_killed_is_made_anew", || {
        let site = DockerSite::new();
        let plugin = &site.plugin;
        let options = [FAST, ("size", "32M")];
        plugin.create("db", &options).expect("created");
        site.daemon.sheave("volume delete fast/db").ok();
        check_failed(plugin.mount("db", "c1"), "fast");
        plugin.create("db", &options).expect("created");
        plugin.mount("db", "c1").expect("mounted");
        plugin.unmount("db", "c1").expect("unmounted");
        site.daemon.sheave("volume delete fast/db").ok();
        plugin.remove("db").expect("removed");
        site.check_unmounted();
    });
}

#[test]
fn rule_35_a_lock_that_a_killed_plugin_has_left_goes_away() {
    on_devices("rule_35_a_lock_that_a_killed_plugin_has_left_goes_away", || {
        let site = DockerSite::new();
        site.plugin.create("db", &[FAST, ("size", "32M")]).expect("created");
        let lock = site.node.engine_file(&site.daemon.volume_id("fast/db"), "lock");
        // It was killed before it has written a state.
        fs::create_dir(site.dir().join("docker/mounts/db")).expect("a directory");
        fs::write(lock, "").expect("written");
        site.plugin.remove("db").expect("removed");
        site.check_unmounted();
    });
}

#[test]
fn rule_43_a_wrong_call_has_an_answer_without_a_daemon() {
    let dir = tempfile::tempdir().expect("a directory");
    let plugin = DockerPlugin::start(dir.path(), &["--node-id", "n1", "--scope", "global"]);
    let able = plugin.call("/VolumeDriver.Capabilities", &json!({})).expect("an answer");
    assert_eq!(able["Capabilities"]["Scope"], "global");
    for body in ["", "{", "[]", "{}", r#"{"Name": 5}"#, r#"{"Name": "db", "Opts": []}"#] {
        let (status, answer) = plugin.post("/VolumeDriver.Create", body).expect("an answer");
        assert_eq!(status, 500, "{answer}");
        assert!(answer.contains(r#"{"Err":"the request is not the JSON"#), "{answer}");
    }
    for len in [2 << 20, 10 << 20] {
        let body = json!({ "Name": "db", "Opts": { "pool": "f".repeat(len) } }).to_string();
        let (status, answer) = plugin.post("/VolumeDriver.Create", &body).expect("an answer");
        assert_eq!(status, 413, "{answer}");
        assert!(answer.starts_with(r#"{"Err":"the request has more than"#), "{answer}");
    }
    for name in ["", "..", "a/b", "../../etc", "/etc"] {
        check_failed(plugin.create(name, &[]), "is no name of a volume");
        check_failed(plugin.remove(name), "is no name of a volume");
        check_failed(plugin.mount(name, "c1"), "is no name of a volume");
    }
    check_failed(plugin.call("/VolumeDriver.Delete", &json!({})), "is no call of a volume plugin");
    check_failed(
        plugin.create("db", &[("pool", "fast"), ("fsType", "xfs")]),
        "known: pool, volume",
    );
    check_failed(plugin.create("db", &[("pool", "fast")]), "no daemon answers here");
    check_failed(plugin.mount("db", "c1"), "no daemon answers here");
}

/// The other node has a state of its own, and the same pools.
#[test]
fn with_a_global_scope_a_volume_is_on_one_node_at_a_time() {
    on_devices("with_a_global_scope_a_volume_is_on_one_node_at_a_time", || {
        let (site, other) = DockerSite::with_another_node();
        let options = [FAST, ("size", "32M"), ("mount-options", "noatime")];
        site.plugin.create("db", &options).expect("created");
        assert_eq!(other.get("db").expect("it is there, too")["Status"]["options"]["size"], "32M");
        let created = |plugin: &DockerPlugin| plugin.get("db").expect("it")["CreatedAt"].clone();
        assert!(created(&other).is_string() && created(&other) == created(&site.plugin));
        other.create("db", &options).expect("Swarm does so");
        check_failed(other.create("db", &[FAST]), "other options");
        let at = site.plugin.mount("db", "c1").expect("mounted");
        fs::write(at.join("file"), "data").expect("written");
        check_failed(other.mount("db", "c2"), "published to node n1");
        check_failed(other.remove("db"), "detach it first");
        assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
        site.plugin.unmount("db", "c1").expect("unmounted");
        let at = other.mount("db", "c2").expect("mounted");
        assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
        other.unmount("db", "c2").expect("unmounted");
        other.remove("db").expect("removed");
        check_failed(site.plugin.get("db"), "no volume is called db");
        let listed = site.plugin.call("/VolumeDriver.List", &json!({})).expect("a list");
        assert_eq!(listed["Volumes"], json!([]));
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

#[test]
fn the_files_for_docker_are_good() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/docker");
    let text = |name: &str| fs::read_to_string(dir.join(name)).expect("a file");
    let config: Value = serde_json::from_str(&text("config.json")).expect("JSON");
    assert_eq!(config["interface"]["types"], json!(["docker.volumedriver/1.0"]));
    let entry: Vec<_> = config["entrypoint"].as_array().expect("a list").iter().collect();
    assert_eq!(entry[0], "/usr/bin/sheave");
    let run =
        entry[1..].iter().fold(Run::new(sheave()), |run, arg| run.arg(arg.as_str().expect("text")));
    assert!(run.arg("--help").ok().contains("docker-plugin"), "{entry:?}");
    // Mount points lie below what Docker propagates, and the socket is where Docker looks.
    assert!(entry.contains(&&config["propagatedMount"]), "{entry:?}");
    let socket = "/run/docker/plugins/sheave.sock";
    assert_eq!(config["interface"]["socket"], "sheave.sock");
    assert_eq!(text("sheave.spec").trim_end(), format!("unix://{socket}"));
    let unit = fs::read_to_string(dir.join("../systemd/sheave-docker.socket")).expect("a unit");
    assert!(unit.contains(&format!("ListenStream={socket}\n")), "{unit}");
    let of_tls: Value = serde_json::from_str(&text("sheave.json")).expect("JSON");
    assert_eq!(of_tls["TLSConfig"]["InsecureSkipVerify"], false);
}

#[test]
fn a_damaged_state_keeps_no_other_volume_from_being_served() {
    on_devices("a_damaged_state_keeps_no_other_volume_from_being_served", || {
        let mut site = DockerSite::new();
        for name in ["a", "b"] {
            site.plugin.create(name, &[FAST, ("size", "32M")]).expect("created");
        }
        site.plugin.mount("a", "c1").expect("mounted");
        let state = site.node.engine_file(&site.daemon.volume_id("fast/a"), "json");
        let text = fs::read(&state).expect("a state");
        fs::write(&state, "{").expect("written");
        site.plugin.restart();
        site.plugin.mount("b", "c2").expect("mounted");
        site.plugin.unmount("b", "c2").expect("unmounted");
        assert_eq!(site.plugin.get("a").expect("a volume")["Status"]["references"], 1);
        fs::write(&state, text).expect("written");
        site.plugin.unmount("a", "c1").expect("unmounted");
        site.check_unmounted();
    });
}

/// The process that calls ends with its call, as a dockerd that is killed.
#[test]
fn references_of_a_killed_docker_are_forgotten_when_no_container_has_the_volume() {
    let test = "references_of_a_killed_docker_are_forgotten_when_no_container_has_the_volume";
    if !have("curl") {
        return skip(test, "no curl");
    }
    on_devices(test, || {
        let mut site = DockerSite::new();
        site.plugin.create("db", &[FAST, ("size", "32M")]).expect("created");
        let at = site.plugin.mount_by_another("db", "c1");
        // A container that goes on without Docker.
        let container = site.dir().join("container");
        fs::create_dir(&container).expect("a directory");
        Run::new("mount").args("--bind").arg(&at).arg(&container).ok();
        site.plugin.restart();
        check_failed(site.plugin.remove("db"), "in use by 1 containers");
        fs::write(container.join("file"), "data").expect("written");
        Run::new("umount").arg(&container).ok();
        // It looks at once.
        site.plugin.restart();
        assert!(eventually(|| site.mounts.targets().is_empty()), "{}", site.plugin.log());
        assert!(eventually(|| site.publications("fast/db") == 0), "{}", site.plugin.log());
        site.check_unmounted();
        let at = site.plugin.mount("db", "c2").expect("mounted");
        assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
        site.plugin.restart();
        check_failed(site.plugin.remove("db"), "in use by 1 containers");
        site.plugin.unmount("db", "c2").expect("unmounted");
        site.plugin.mount_by_another("db", "c3");
        site.plugin.remove("db").expect("no container has it");
        assert_eq!(site.node.files("fast"), [] as [&str; 0]);
    });
}

#[test]
fn over_tcp_only_clients_with_a_certificate_are_served() {
    if !have("curl") {
        return skip("over_tcp_only_clients_with_a_certificate_are_served", "no curl");
    }
    let (scratch, certificates) = (Scratch::new(), Certificates::new());
    let mut args = certificates.mutual_args();
    args.extend(["--node-id".to_owned(), "n1".to_owned()]);
    let (plugin, port) = DockerPlugin::start_with_tls(scratch.path(), &args);
    // A client that begins no handshake holds up no other.
    let _silent = TcpStream::connect(("127.0.0.1", port)).expect("connected");
    let curl = || {
        let url = format!("https://localhost:{port}/Plugin.Activate");
        let curl = Run::new("curl").args("--silent --show-error --max-time 30 --data {}").arg(url);
        curl.arg("--cacert").arg(certificates.file("ca-cert.pem"))
    };
    let with = |curl: Run, of: &Certificates| {
        let curl = curl.arg("--cert").arg(of.file("client-cert.pem"));
        curl.arg("--key").arg(of.file("client-key.pem"))
    };
    let answer = with(curl(), &certificates).ok();
    assert!(answer.contains("VolumeDriver"), "{answer}");
    curl().fails();
    with(curl(), &certificates.stranger()).fails();
    assert!(eventually(|| plugin.log().contains("TLS: ")), "{}", plugin.log());
    let error = Run::new(sheave()).args("docker-plugin --listen 127.0.0.1:0").output();
    assert_eq!(error.status.code(), Some(2), "never without certificates: {}", error.describe());
}
