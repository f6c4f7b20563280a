//! `sheave csi --mode node` as a process: kubelet registers and probes it, and clients of all kinds
//! reach it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sheave_control::channel;
use sheave_csi_proto::registration::registration_client::RegistrationClient;
use sheave_csi_proto::registration::{InfoRequest, RegistrationStatus};
use sheave_csi_proto::v1::node_client::NodeClient;
use sheave_csi_proto::v1::{NodeGetInfoRequest, NodeUnstageVolumeRequest};
use sheave_tests::{Daemon, Node, PATIENCE, Run, eventually, sheave};
use tokio::runtime::{Builder, Runtime};
use tonic::{Code, Status};

/// A plugin and its daemon, which end with the test.
struct Plugin {
    child: Child,
    daemon: Daemon,
    node: Node,
    runtime: Runtime,
}

impl Plugin {
    fn start() -> Self {
        let node = Node::new();
        fs::create_dir(node.file("registry")).expect("a directory");
        let daemon = node.daemon();
        let child = Self::spawn(&node);
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let plugin = Self { child, daemon, node, runtime };
        plugin.wait_ready();
        plugin
    }

    fn spawn(node: &Node) -> Child {
        let endpoint = format!("unix://{}", node.file("csi.sock").display());
        let log = fs::File::options().create(true).append(true).open(node.file("csi.log"));
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(sheave())
            .args(["csi", "--mode", "node", "--node-id", "node-1", "--endpoint", &endpoint])
            .arg("--registration-dir")
            .arg(node.file("registry"))
            .args(["--kubelet-endpoint", "/host/csi.sock", "--health", "127.0.0.1:0"])
            .env("SHEAVE_RUNTIME_DIR", node.kernel.scratch().path())
            .env("SHEAVE_STATE_DIR", node.file("state"))
            .stdin(Stdio::null())
            .stderr(log.expect("a log"))
            .spawn()
            .expect("setpriv (util-linux)")
    }

    fn wait_ready(&self) {
        let log = || fs::read_to_string(self.node.file("csi.log")).unwrap_or_default();
        assert!(eventually(|| log().contains(" ready ")), "{}", log());
    }

    fn socket(&self) -> PathBuf {
        self.node.file("csi.sock")
    }

    fn registration_socket(&self) -> PathBuf {
        self.node.file("registry/csi.sheave.dev-reg.sock")
    }

    /// Status and text of a page of its probes.
    fn page(&self, path: &str) -> String {
        let log = fs::read_to_string(self.node.file("csi.log")).expect("its log");
        let address = log.split("probes=").nth(1).and_then(|rest| rest.split_whitespace().next());
        let mut stream = TcpStream::connect(address.expect("an address")).expect("its probes");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .expect("sent");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("an answer");
        page
    }

    /// Unstages a volume that is not staged.
    fn unstage(&self, volume: &str) -> Result<(), Status> {
        let request = NodeUnstageVolumeRequest {
            volume_id: volume.to_owned(),
            staging_target_path: self.node.file("stage").display().to_string(),
        };
        self.runtime.block_on(async {
            let mut node = NodeClient::new(channel(&self.socket()));
            node.node_unstage_volume(request).await.map(drop)
        })
    }

    fn node_id(&self) -> String {
        self.runtime.block_on(async {
            let mut node = NodeClient::new(channel(&self.socket()));
            let info = node.node_get_info(NodeGetInfoRequest {}).await;
            info.expect("its name").into_inner().node_id
        })
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn rule_40_rule_41_kubelet_registers_the_plugin_and_probes_it() {
    let mut plugin = Plugin::start();
    assert!(plugin.page("/healthz").starts_with("HTTP/1.1 200"));
    let page = plugin.page("/readyz");
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("not registered"), "{page}");
    let register = |plugin: &Plugin, plugin_registered| {
        plugin.runtime.block_on(async {
            let mut kubelet = RegistrationClient::new(channel(&plugin.registration_socket()));
            let info = kubelet.get_info(InfoRequest {}).await.expect("its name").into_inner();
            assert_eq!(info.r#type, "CSIPlugin");
            assert_eq!(info.name, "csi.sheave.dev");
            assert_eq!(info.endpoint, "/host/csi.sock");
            assert_eq!(info.supported_versions, ["1.0.0"]);
            let error = "no such file".to_owned();
            let status = RegistrationStatus { plugin_registered, error };
            kubelet.notify_registration_status(status).await.expect("noted");
        });
    };
    register(&plugin, false);
    assert!(plugin.page("/readyz").starts_with("HTTP/1.1 503"));
    // A thread of its own writes the log.
    let log = || fs::read_to_string(plugin.node.file("csi.log")).expect("its log");
    assert!(eventually(|| log().contains("no such file")), "{}", log());
    register(&plugin, true);
    assert!(plugin.page("/readyz").starts_with("HTTP/1.1 200"));
    // Liveness never fails because of the daemon.
    plugin.daemon.kill();
    assert!(plugin.page("/healthz").starts_with("HTTP/1.1 200"));
    assert!(plugin.page("/readyz").contains("daemon does not answer"));
    let away = plugin.unstage("fast/a").expect_err("no daemon");
    assert_eq!(away.code(), Code::Unavailable);
    assert!(away.message().contains("no daemon answers here"), "{away}");
    let logged = ["WARN", "NodeUnstageVolume", "Unavailable", "no daemon answers here"];
    let is_logged = |line: &str| logged.iter().all(|word| line.contains(word));
    assert!(eventually(|| log().lines().any(is_logged)), "{}", log());
    // The next daemon is found, and so is a plugin that was killed.
    plugin.daemon = plugin.node.daemon();
    assert!(eventually(|| plugin.page("/readyz").starts_with("HTTP/1.1 200")));
    plugin.child.kill().expect("killed");
    plugin.child.wait().expect("ended");
    fs::remove_file(plugin.node.file("csi.log")).expect("removed");
    plugin.child = Plugin::spawn(&plugin.node);
    plugin.wait_ready();
    register(&plugin, true);
    assert_eq!(plugin.node_id(), "node-1");
    let counted = "sheave_csi_call_seconds_count{rpc=\"NodeGetInfo\",code=\"Ok\"} 1";
    let metrics = plugin.page("/metrics");
    assert!(metrics.contains(counted), "{metrics}");
    check_histograms(&metrics);
}

/// Checks a page as a scraper reads it (OpenMetrics 1.0, "Histogram").
fn check_histograms(page: &str) {
    let (head, text) = page.split_once("\r\n\r\n").expect("a header");
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    const NAME: &str = "sheave_csi_call_seconds";
    for line in [format!("# TYPE {NAME} histogram"), format!("# UNIT {NAME} seconds")] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    // By the labels of a histogram: the bounds of its buckets, and what they count.
    let mut buckets = BTreeMap::<String, Vec<(f64, u64)>>::new();
    let mut totals = BTreeMap::<String, (u64, f64)>::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_once('{').expect("labels");
        let (labels, value) = rest.split_once("} ").expect("a value");
        let number: f64 = value.parse().expect("a number");
        let total = || (0, -1.0);
        match name.strip_prefix(NAME).expect("the only metric") {
            "_bucket" => {
                let bound = labels.strip_prefix("le=\"").expect("a bound");
                let (bound, labels) = bound.split_once("\",").expect("labels");
                let bound = bound.replace("+Inf", "inf").parse().expect("a number");
                buckets.entry(labels.to_owned()).or_default().push((bound, number as u64));
            }
            "_count" => totals.entry(labels.to_owned()).or_insert_with(total).0 = number as u64,
            "_sum" => totals.entry(labels.to_owned()).or_insert_with(total).1 = number,
            other => panic!("{other} is no part of a histogram"),
        }
    }
    assert!(!totals.is_empty() && totals.keys().eq(buckets.keys()), "{text}");
    for (labels, buckets) in buckets {
        let (count, sum) = totals[&labels];
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{labels}: {buckets:?}");
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, count)), "{labels}");
        assert!(count > 0 && sum >= 0.0, "{labels}: {count} {sum}");
    }
}

#[test]
fn a_signal_ends_it_in_order() {
    let mut plugin = Plugin::start();
    Run::new("kill").arg("-TERM").arg(plugin.child.id().to_string()).ok();
    let mut status = None;
    assert!(eventually(|| {
        status = plugin.child.try_wait().expect("our own child");
        status.is_some()
    }));
    assert!(status.expect("ended").success());
}

/// The bytes that old kubelets and the libraries of C++ and Python send, and what comes back.
#[test]
fn rule_44_clients_whose_authority_is_a_path_are_answered() {
    let plugin = Plugin::start();
    let path = plugin.socket().to_str().expect("UTF-8").to_owned();
    let encoded = path.replace('/', "%2F");
    for authority in [&path, &encoded, "", "localhost", "[::1"] {
        let answer = call_get_info(&plugin.socket(), authority);
        assert!(answer.contains("node-1"), "{authority:?}: {answer:?}");
    }
}

/// Calls NodeGetInfo twice on one connection, with an authority that the second call takes from the
/// table of headers; returns all that comes back, as far as it is text.
fn call_get_info(socket: &Path, authority: &str) -> String {
    let frame = |kind: u8, flags: u8, stream: u32, bytes: &[u8]| {
        let len = u32::try_from(bytes.len()).expect("short").to_be_bytes();
        [&len[1..], &[kind, flags], &stream.to_be_bytes(), bytes].concat()
    };
    let literal = |first: u8, texts: &[&str]| {
        let mut bytes = vec![first];
        for text in texts {
            assert!(text.len() < 0x7f, "one byte says its length");
            bytes.push(text.len() as u8);
            bytes.extend(text.as_bytes());
        }
        bytes
    };
    // POST and http of the static table; path, authority and the rest kept in the table.
    let block = [
        vec![0x83, 0x86],
        literal(0x44, &["/csi.v1.Node/NodeGetInfo"]),
        literal(0x41, &[authority]),
        literal(0x40, &["content-type", "application/grpc"]),
        literal(0x40, &["te", "trailers"]),
    ]
    .concat();
    let again = [0x83, 0x86, 0xc1, 0xc0, 0xbf, 0xbe];
    let mut stream = UnixStream::connect(socket).expect("the plugin");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    for (stream, block) in [(1, &block[..]), (3, &again[..])] {
        bytes.extend(frame(1, 4, stream, block));
        // An empty message, at the stream's end.
        bytes.extend(frame(0, 1, stream, &[0; 5]));
    }
    stream.write_all(&bytes).expect("sent");
    let mut answer = Vec::new();
    let mut ended = 0;
    while ended < 2 {
        let mut header = [0; 9];
        stream.read_exact(&mut header).expect("a frame");
        let len = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload).expect("a frame");
        assert!(!matches!(header[3], 3 | 7), "{authority:?}: it is refused: {payload:?}");
        if header[3] == 0 {
            answer.extend(payload);
        }
        // Trailers end a stream.
        ended += usize::from(header[3] == 1 && header[4] & 1 != 0);
    }
    let text = String::from_utf8_lossy(&answer).into_owned();
    assert_eq!(
        text.matches("node-1").count(),
        4,
        "two answers, each with id and topology: {text:?}"
    );
    text
}
