//! The taint of a new node, which the plugin removes from the Node object as soon as it works. The
//! API server is one of this test.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use sheave_control::channel;
use sheave_csi_proto::registration::RegistrationStatus;
use sheave_csi_proto::registration::registration_client::RegistrationClient;
use sheave_tests::{Certificates, Plugin, PoolNode, Run, eventually, in_namespace};
use tokio::runtime::Builder;

const NODE: &str = "n1";
const TAINT: &str = "csi.sheave.dev/agent-not-ready";
const TOKEN: &str = "token-of-the-test";
/// Where pods have it.
const ACCOUNT: &str = "/run/secrets/kubernetes.io/serviceaccount";

/// Serves one Node, as the API server does.
struct ApiServer {
    address: SocketAddr,
    /// The Node, and how often it is still answered otherwise: its patches are refused, and before
    /// the last refusal another object is sent.
    state: Arc<Mutex<(Value, u32)>>,
}

impl ApiServer {
    fn start(certificates: &Certificates, node: Value, refusals: u32) -> Self {
        let file = |name| certificates.dir().join(name);
        let chain = CertificateDer::pem_file_iter(file("server-cert.pem")).expect("certificates");
        let chain = chain.collect::<Result<_, _>>().expect("certificates");
        let key = PrivateKeyDer::from_pem_file(file("server-key.pem")).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("a server");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let state = Arc::new(Mutex::new((node, refusals)));
        let (config, shared) = (Arc::new(config), Arc::clone(&state));
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.expect("a client"), &config, &shared);
            }
        });
        Self { address, state }
    }

    fn taints(&self) -> Value {
        self.state.lock().expect("a state").0["spec"]["taints"].clone()
    }
}

/// Answers one request.
fn answer(stream: TcpStream, config: &Arc<ServerConfig>, state: &Mutex<(Value, u32)>) {
    let tls = ServerConnection::new(Arc::clone(config)).expect("a connection");
    let mut stream = BufReader::new(StreamOwned::new(tls, stream));
    let mut head = Vec::new();
    let mut body_len = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("a line");
        let line = line.trim().to_lowercase();
        if let Some(len) = line.strip_prefix("content-length: ") {
            body_len = len.parse().expect("a length");
        }
        if line.is_empty() {
            break;
        }
        head.push(line);
    }
    let mut body = vec![0; body_len];
    stream.read_exact(&mut body).expect("a body");
    let (status, answer) = respond(&head, &body, &mut state.lock().expect("a state"));
    let answer = answer.to_string();
    let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n", answer.len());
    let stream = stream.get_mut();
    stream.write_all((head + &answer).as_bytes()).expect("sent");
    stream.conn.send_close_notify();
    stream.flush().expect("sent");
}

fn respond(head: &[String], body: &[u8], state: &mut (Value, u32)) -> (u16, Value) {
    let (node, refusals) = state;
    assert!(head.contains(&format!("authorization: bearer {TOKEN}")), "{head:?}");
    let path = format!("/api/v1/nodes/{NODE} http/1.1");
    if head[0] == format!("get {path}") {
        if *refusals > 1 {
            *refusals -= 1;
            return (200, Value::Null);
        }
        return (200, node.clone());
    }
    assert_eq!(head[0], format!("patch {path}"));
    assert!(head.contains(&"content-type: application/merge-patch+json".to_owned()), "{head:?}");
    if *refusals > 0 {
        *refusals -= 1;
        return (409, json!({"message": "the object has been modified"}));
    }
    let patch: Value = serde_json::from_slice(body).expect("JSON");
    assert_eq!(patch["metadata"]["resourceVersion"], node["metadata"]["resourceVersion"]);
    assert_eq!(patch.as_object().map(serde_json::Map::len), Some(2), "{patch}");
    node["spec"]["taints"] = patch["spec"]["taints"].clone();
    (200, node.clone())
}

/// Lays out what a pod has of its account.
fn give_account(authority: &Path) {
    Run::new("mount").args("-t tmpfs tmpfs /run").ok();
    fs::create_dir_all(ACCOUNT).expect("a directory");
    fs::copy(authority, Path::new(ACCOUNT).join("ca.crt")).expect("a certificate");
    fs::write(Path::new(ACCOUNT).join("token"), TOKEN).expect("a token");
}

#[test]
fn rule_40_the_startup_taint_is_removed_once_the_plugin_is_registered() {
    let test = "rule_40_the_startup_taint_is_removed_once_the_plugin_is_registered";
    in_namespace(test, || {
        let certificates = Certificates::new();
        give_account(&certificates.dir().join("ca-cert.pem"));
        let other = json!({"key": "dedicated", "effect": "NoSchedule"});
        let own = json!({"key": TAINT, "effect": "NoExecute"});
        let node = json!({
            "metadata": {"name": NODE, "resourceVersion": "7"},
            "spec": {"podCIDR": "10.0.0.0/24", "taints": [own, other]},
        });
        let api = ApiServer::start(&certificates, node, 2);
        let site = PoolNode::new();
        let _daemon = site.daemon();
        let dir = site.node.kernel.scratch().path();
        let registry = dir.join("registry");
        fs::create_dir(&registry).expect("a directory");
        let registry = registry.to_str().expect("UTF-8");
        let args = ["--mode", "node", "--node-id", NODE, "--startup-taint", TAINT];
        let args = [&args[..], &["--registration-dir", registry]].concat();
        let plugin = Plugin::start_as("csi", dir, &args, |command| {
            command.env("KUBERNETES_SERVICE_HOST", api.address.ip().to_string());
            command.env("KUBERNETES_SERVICE_PORT", api.address.port().to_string());
        });
        let register = |plugin_registered| {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            let path = Path::new(registry).join("csi.sheave.dev-reg.sock");
            runtime.block_on(async {
                let status = RegistrationStatus { plugin_registered, error: String::new() };
                let mut kubelet = RegistrationClient::new(channel(&path));
                kubelet.notify_registration_status(status).await.expect("noted");
            });
        };
        register(false);
        assert_eq!(api.taints().as_array().map(Vec::len), Some(2), "no pod may come yet");
        register(true);
        assert!(eventually(|| api.taints() == json!([other])), "{}", plugin.log());
        assert!(plugin.log().contains("the answer is not this Node"), "{}", plugin.log());
        // The first patch met a node that had changed.
        assert!(plugin.log().contains("the object has been modified"), "{}", plugin.log());
    });
}
