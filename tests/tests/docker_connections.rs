//! The ways by which Docker reaches the volume plugin: TCP with TLS, a socket of the service
//! manager, and the files by which it finds either.

use std::fs;
use std::path::Path;
use std::thread;

use serde_json::{Value, json};
use sheave_tests::{
    Certificates, DockerEngine, DockerPlugin, Mounts, PoolNode, Run, have, on_devices, on_docker,
    skip,
};

/// Where Docker looks for files that say where a plugin is.
const DISCOVERY: &str = "/etc/docker/plugins";
/// Those of this repository.
const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/docker");

/// Calls by TCP, as a client with these certificates, or without.
struct Client<'a> {
    port: u16,
    authority: &'a Certificates,
    own: Option<&'a Certificates>,
}

impl Client<'_> {
    fn run(&self, call: &str, body: &Value) -> Run {
        let curl = Run::new("curl").args("--silent --show-error --max-time 120 --data");
        let curl = curl.arg(body.to_string()).arg(format!("https://localhost:{}{call}", self.port));
        let curl = curl.arg("--cacert").arg(self.authority.file("ca-cert.pem"));
        match self.own {
            Some(own) => {
                let curl = curl.arg("--cert").arg(own.file("client-cert.pem"));
                curl.arg("--key").arg(own.file("client-key.pem"))
            }
            None => curl,
        }
    }

    #[track_caller]
    fn call(&self, call: &str, body: &Value) -> Value {
        let answer = self.run(call, body).ok();
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(answer["Err"], "", "{call}");
        answer
    }
}

#[test]
fn over_tls_volumes_are_those_of_clients_with_a_certificate() {
    let test = "over_tls_volumes_are_those_of_clients_with_a_certificate";
    if !have("curl") {
        return skip(test, "no curl");
    }
    on_devices(test, || {
        let node = PoolNode::with_block_devices();
        let daemon = node.daemon();
        let (certificates, mounts) = (Certificates::new(), Mounts::below(node.dir()));
        let stranger = certificates.stranger();
        let mut args = certificates.mutual_args();
        args.extend(["--node-id".to_owned(), "n1".to_owned()]);
        let (_plugin, port) = DockerPlugin::start_with_tls(node.dir(), &args);
        let client = |own| Client { port, authority: &certificates, own };
        let docker = client(Some(&certificates));
        let options = json!({ "pool": "fast", "size": "32M" });
        let (named, mount) = (json!({ "Name": "db" }), json!({ "Name": "db", "ID": "c1" }));
        let calls = [
            ("/VolumeDriver.Create", json!({ "Name": "db", "Opts": options })),
            ("/VolumeDriver.Mount", mount.clone()),
            ("/VolumeDriver.Unmount", mount.clone()),
            ("/VolumeDriver.Remove", named.clone()),
        ];
        let refused = |when: &str| {
            for own in [None, Some(&stranger)] {
                for (call, body) in &calls {
                    let error = client(own).run(call, body).fails();
                    assert!(error.contains("curl: "), "{when} {call}: {error}");
                }
            }
        };
        refused("before");
        assert_eq!(node.files("fast"), [] as [&str; 0]);
        docker.call(calls[0].0, &calls[0].1);
        let at = docker.call("/VolumeDriver.Mount", &mount)["Mountpoint"].clone();
        let file = Path::new(at.as_str().expect("a path")).join("file");
        fs::write(&file, "data").expect("written");
        refused("while it is mounted");
        assert_eq!(fs::read_to_string(&file).expect("the file"), "data");
        let got = docker.call("/VolumeDriver.Get", &named);
        assert_eq!(got["Volume"]["Mountpoint"], at);
        docker.call("/VolumeDriver.Unmount", &mount);
        assert_eq!(daemon.sheave("ls").ok(), "no devices\n");
        docker.call("/VolumeDriver.Remove", &named);
        assert_eq!(node.files("fast"), [] as [&str; 0]);
        assert_eq!(mounts.targets().len(), 0);
    });
}

#[test]
fn calls_wait_at_the_service_managers_socket_for_the_plugin() {
    on_devices("calls_wait_at_the_service_managers_socket_for_the_plugin", || {
        let node = PoolNode::with_block_devices();
        let _daemon = node.daemon();
        let mounts = Mounts::below(node.dir());
        let mut plugin = DockerPlugin::start_passed(node.dir(), &["--node-id", "n1"]);
        plugin.create("db", &[("pool", "fast"), ("size", "32M")]).expect("created");
        assert!(!node.dir().join("not-passed.sock").exists(), "it takes the manager's");
        let at = plugin.mount("db", "c1").expect("mounted");
        fs::write(at.join("file"), "data").expect("written");
        for _ in 0..3 {
            plugin.kill();
            let socket = plugin.socket().to_owned();
            let asking = thread::spawn(move || {
                let body = json!({ "Name": "db", "ID": "c2" }).to_string();
                DockerPlugin::post_to(&socket, "/VolumeDriver.Mount", &body)
            });
            plugin.start_again();
            let (status, body) = asking.join().expect("no panic").expect("an answer");
            assert_eq!(status, 200, "{body}");
            assert_eq!(fs::read_to_string(at.join("file")).expect("the file"), "data");
            plugin.unmount("db", "c2").expect("unmounted");
        }
        plugin.unmount("db", "c1").expect("unmounted");
        plugin.remove("db").expect("removed");
        assert_eq!(mounts.targets().len(), 0);
    });
}

/// A file of this repository for Docker, with other paths and another address.
fn example(name: &str, changes: &[(&str, &str)]) -> String {
    let text = fs::read_to_string(Path::new(EXAMPLES).join(name)).expect("a file");
    changes.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{name} has no {from}");
        text.replace(from, to)
    })
}

#[test]
fn docker_finds_the_plugin_by_the_example_files() {
    on_docker("docker_finds_the_plugin_by_the_example_files", || {
        let node = PoolNode::with_block_devices();
        let _daemon = node.daemon();
        fs::create_dir_all("/etc/docker").expect("a directory");
        Run::new("mount").args("-t tmpfs none /etc/docker").ok();
        fs::create_dir(DISCOVERY).expect("a directory");
        let engine = DockerEngine::start(node.dir());
        let use_volume = |name: &str| {
            let create = engine.docker("volume create --opt pool=fast --opt size=32M --driver");
            create.arg(name).arg(format!("of-{name}")).ok();
            let said = engine.run(&format!("of-{name}"), "echo x >/data/f; busybox cat /data/f");
            assert_eq!(said, "x\n", "{name}");
            engine.docker("volume rm").arg(format!("of-{name}")).ok();
        };

        let mut plugin = DockerPlugin::start(node.dir(), &["--node-id", "n1"]);
        let socket = plugin.socket().to_str().expect("UTF-8");
        let text = example("sheave.spec", &[("/run/docker/plugins/sheave.sock", socket)]);
        fs::write(Path::new(DISCOVERY).join("by-spec.spec"), text).expect("written");
        use_volume("by-spec");
        plugin.kill();

        let certificates = Certificates::new();
        let mut args = certificates.mutual_args();
        args.extend(["--node-id".to_owned(), "n1".to_owned()]);
        let (_plugin, port) = DockerPlugin::start_with_tls(node.dir(), &args);
        let text = example(
            "sheave.json",
            &[
                ("\"sheave\"", "\"by-json\""),
                ("storage.example:10811", &format!("localhost:{port}")),
                ("/etc/docker/sheave/ca.pem", &certificates.file("ca-cert.pem")),
                ("/etc/docker/sheave/client.pem", &certificates.file("client-cert.pem")),
                ("/etc/docker/sheave/client-key.pem", &certificates.file("client-key.pem")),
            ],
        );
        fs::write(Path::new(DISCOVERY).join("by-json.json"), text).expect("written");
        use_volume("by-json");
    });
}
